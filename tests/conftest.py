"""Settings of all tests: one thread, no network, no waiting for the disk, a fixed seed."""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until the tests are collected, which makes hardly any garbage


class TorchRandom:
    """torch's generator for hypothesis, which seeds it before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds it by a weak reference
hypothesis.register_random(TORCH_RANDOM)  # type: ignore[arg-type]
# The same examples in every run, however long they take; `--hypothesis-profile new` draws others.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so none needs its files on the disk."""
    with patch("os.fsync", lambda descriptor: None):
        yield


@pytest.fixture(autouse=True, scope="module")
def _short_garbage_collections() -> None:
    """Leave what exists already, such as imported modules, out of those that DeepSpeed starts."""
    gc.collect()
    gc.freeze()


def fix_seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    fix_seeds()


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Fixtures of modules and sessions draw the same whichever tests ran before them."""
    if fixturedef.scope != "function":
        fix_seeds()


@pytest.fixture(scope="session")
def valid_model(tmp_path_factory) -> Path:
    """A small model with a sink token. Tests copy it before they change it."""
    from .eval.checkpoints import small_model, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("valid") / "model", small_model(1))


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes: slow tests first, so that all end together
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
