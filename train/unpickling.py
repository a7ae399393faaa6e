"""Reads DeepSpeed's pickles without running code that they contain.

A pickle can call any function. torch's ``weights_only`` reads tensors, containers and numbers, and
in addition here the few classes that DeepSpeed's files need.
"""

import copyreg
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

# Classes in the files of DeepSpeed's optimizers: none of them runs code when it is created.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def deepspeed_classes() -> list[Any]:
    """Return the classes of ``DEEPSPEED_CLASSES`` that this version of DeepSpeed has."""
    found = []
    for name in DEEPSPEED_CLASSES:
        module, _, attribute = name.rpartition(".")
        found.append(getattr(importlib.import_module(module), attribute, None))
    return [each for each in found if each is not None]


def pickle_enums_by_value() -> None:
    """Let this process pickle DeepSpeed's enums as their class and value.

    The first versions of Python 3.11, such as 3.11.2, pickle an enum as a call of ``getattr``,
    which is refused when the file is read.
    """
    for each in deepspeed_classes():
        if issubclass(each, Enum):
            copyreg.pickle(each, lambda member: (type(member), (member.value,)))


@contextmanager
def restricted_unpickling(*, is_trusted: bool = False) -> Iterator[None]:
    """Context in which ``torch.load`` reads no other classes, here and in child processes.

    DeepSpeed passes ``weights_only=False``, which torch's environment variable overrides.

    Args:
        is_trusted: read pickles without this restriction.
    """
    if is_trusted:
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(deepspeed_classes()):
            yield
    finally:
        del os.environ[FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def refused_names(path: Path) -> list[str]:
    """Return the classes and functions in a file of ``torch.save`` that would not be read.

    The file is not unpickled. Of a file in another format or a damaged one, nothing is returned:
    reading it raises an error.
    """
    with torch.serialization.safe_globals(deepspeed_classes()):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except (ValueError, RuntimeError, UnpicklingError):
            return []
