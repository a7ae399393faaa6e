"""The library versions that sinklm was tested with, and a warning for other versions."""

import warnings
from importlib import metadata

from packaging.version import Version

# Oldest and newest tested version of each library, by its name on the package index. Newer patch
# releases of the newest version count as tested. `pyproject.toml` requires the oldest; CI tests
# both.
TESTED = {
    "torch": ("2.11", "2.15"),
    "transformers": ("5.17", "5.24"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "lm-eval": ("0.4.13", "0.4.13"),
}


def warn_if_untested(*names: str) -> None:
    """Warn once if an installed version is outside the tested range."""
    for name in names:
        installed = metadata.version(name)
        if not is_tested(name, installed):
            warnings.warn(
                f"sinklm was not tested with {name} {installed}, only with {tested_range(name)}: check your results or "
                f'install a tested version (pip install "{name}=={TESTED[name][1]}.*")',
                RuntimeWarning,
                stacklevel=3,
            )


def tested_range(name: str) -> str:
    """Return the tested versions, such as ``5.17 to 5.24``, or the only tested version."""
    return " to ".join(dict.fromkeys(TESTED[name]))


def is_tested(name: str, version: str) -> bool:
    """Whether a version is in the tested range, which includes newer patch releases."""
    oldest, newest = (Version(bound) for bound in TESTED[name])
    release = Version(version).release
    return oldest.release <= release and release[: len(newest.release)] <= newest.release
