"""The libraries that the base installation leaves out, and the error that names the extra with them."""

import sys
from importlib.util import find_spec

DATA = ("datasets", "numpy", "orjson", "pyarrow", "pydantic", "zstandard")

# What a part needs beyond the base installation. `pyproject.toml` has an extra of the same name that installs it, and
# with it what the part can do without (wandb, accelerate).
EXTRAS = {
    "data": DATA,
    "train": ("deepspeed", "omegaconf", "psutil", *DATA),
    "eval": ("lm_eval", "matplotlib", "psutil", *DATA),
}


class MissingExtraError(ImportError):
    """A part of sinklm was imported, and a library of its extra is not installed."""


def require_extra(name: str) -> None:
    """Check that the libraries of an extra are installed. Each part that has an extra calls this first.

    Raises:
        MissingExtraError: if one of them is not.
    """
    missing = next((module for module in EXTRAS[name] if find_spec(module) is None), None)
    if missing is None:
        return
    message = f'sinklm.{name} needs {missing}, which is in the extra "{name}": pip install "sinklm[{name}]"'
    if sys.argv[:1] == ["-m"]:  # `python -m sinklm.train` imports the package before any code could catch the error
        sys.exit(f"error: {message}")
    raise MissingExtraError(message)
