"""One tiny store and one run on it for all tests of training."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from sinklm.train import universal
from sinklm.train.run import train

from .plain import play_kernel
from .processes import run_python
from .tiny import RECIPE, make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, store: Path) -> str:
    """Path of a recipe for a model of 30 thousand parameters: 8 steps, saved at 4 and 8."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(f"{RECIPE}\ndata: {{path: {store}}}\n")
    return str(path)


@pytest.fixture(scope="session")
def whole_run(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on one rank, saved at 4 and 8. Tests copy it before they change it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, [f"train.run_dir={run_dir}"])
    return run_dir


@pytest.fixture(scope="session")
def muon_run(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole_run` with Muon."""
    run_dir = tmp_path_factory.mktemp("muon") / "run"
    train(recipe, ["optimizer.name=muon", f"train.run_dir={run_dir}"])
    return run_dir


@pytest.fixture(autouse=True, scope="session")
def _forked_converter() -> Iterator[None]:
    """Start DeepSpeed's converter without its imports, which take seconds. Ranks import them."""
    with patch.object(universal, "subprocess", SimpleNamespace(run=run_python)):
        yield


@pytest.fixture(params=["no kernel", "kernel"])
def update_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused update without its kernel, as on a CPU, and with it, replaced by plain torch."""
    if request.param == "kernel":
        play_kernel(monkeypatch.setattr)
