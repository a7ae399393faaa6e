"""One tiny store for all tests of training."""

from pathlib import Path

import pytest

from .plain import play_kernel
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


@pytest.fixture(params=["no kernel", "kernel"])
def update_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused update without its kernel, as on a CPU, and with it, replaced by plain torch."""
    if request.param == "kernel":
        play_kernel(monkeypatch.setattr)
