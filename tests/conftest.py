"""Settings of all tests: one thread, no network, a fixed seed."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def valid_model(tmp_path_factory) -> Path:
    """A small model with a sink token. Tests copy it before they change it."""
    from .eval.checkpoints import small_model, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("valid") / "model", small_model(1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
