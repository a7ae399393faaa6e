"""Libraries that only the extras install, and the error for a missing one."""

import sys
from importlib.util import find_spec

DATA = ("datasets", "numpy", "orjson", "pyarrow", "pydantic", "zstandard")

# Libraries that a part requires beyond the base installation. The extra of the same name in
# `pyproject.toml` also installs optional ones (wandb, accelerate).
EXTRAS = {
    "data": DATA,
    "train": ("deepspeed", "omegaconf", "psutil", *DATA),
    "eval": ("lm_eval", "matplotlib", "psutil", *DATA),
    "gguf": ("gguf",),  # of `sinklm export --to gguf`
    "quantization": ("torchao",),  # of `sinklm eval quantization`
}


class MissingExtraError(ImportError):
    """A part of sinklm was imported, but a library of its extra is not installed."""


def require_extra(name: str) -> None:
    """Check that the libraries of an extra are installed. Each part with an extra calls this first.

    Raises:
        MissingExtraError: a library is not installed.
    """
    missing = next((module for module in EXTRAS[name] if find_spec(module) is None), None)
    if missing is None:
        return
    message = f'sinklm.{name} requires {missing}, which is not installed; run: pip install "sinklm[{name}]"'
    if sys.argv[:1] == ["-m"]:  # `python -m sinklm.train` imports the package before code can catch the error
        sys.exit(f"error: {message}")
    raise MissingExtraError(message)
