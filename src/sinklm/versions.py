"""The library versions that the test suite was run with, and a warning outside of them."""

import warnings
from importlib import metadata

from packaging.version import Version

# Oldest and newest version of each library, by its name on the package index. A newer patch release of the newest
# version counts as tested. `pyproject.toml` requires the oldest; CI runs the suite on both ends.
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
                f"sinklm was not tested with {name} {installed}, only with {tested_range(name)}: check results, or "
                f'install a tested version (pip install "{name}=={TESTED[name][1]}.*")',
                RuntimeWarning,
                stacklevel=3,
            )


def tested_range(name: str) -> str:
    """``5.17 to 5.24``, or the one tested version."""
    return " to ".join(dict.fromkeys(TESTED[name]))


def is_tested(name: str, version: str) -> bool:
    """Whether a version is in the tested range. Patch releases of the newest minor version are in it."""
    oldest, newest = (Version(bound) for bound in TESTED[name])
    release = Version(version).release
    return oldest.release <= release and release[: len(newest.release)] <= newest.release
