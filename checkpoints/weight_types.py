"""Data types of exported weights."""

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_dtype(name: str) -> None:
    """Raise a ValueError for what is neither a name in `DTYPES` nor ``auto``."""
    if name not in ("auto", *DTYPES):
        raise ValueError(f"dtype is {name!r}: choose from auto, {', '.join(DTYPES)}")


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a data type, such as ``float16``."""
    return str(dtype).removeprefix("torch.")


def cast(weight: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    """Return a weight in another data type.

    Args:
        key: the name of the weight, for the error.

    Raises:
        ValueError: a value is too large for the data type.
    """
    stored = weight.detach().to(dtype)
    if not stored.isfinite().all():
        raise ValueError(f"{key} has values too large for {name_of(dtype)}: use bfloat16")
    return stored
