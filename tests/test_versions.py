"""The tested versions of libraries, and the warning for others."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from sinklm import versions

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", versions.TESTED)
def test_the_installed_version_is_a_tested_one(name):
    installed = metadata.version(name)
    assert versions.is_tested(name, installed), f"{name} {installed}: run the suite, then extend sinklm.versions.TESTED"


def test_the_oldest_tested_version_is_the_oldest_allowed_one():
    extras = [text for texts in PROJECT.get("optional-dependencies", {}).values() for text in texts]
    required = {r.name: r for r in map(Requirement, [*PROJECT["dependencies"], *extras])}
    for name, (oldest, newest) in versions.TESTED.items():
        assert required[name].specifier.contains(oldest), name
        assert required[name].specifier.contains(newest), name
        (floor,) = (spec.version for spec in required[name].specifier if spec.operator == ">=")
        assert Version(floor) == Version(oldest), name


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("5.16.1", False),
        ("5.17", True),
        ("5.17.0", True),
        ("5.20.3", True),
        ("5.24.0", True),
        ("5.24.7", True),
        ("5.25.0", False),
        ("6.0", False),
        ("5.24.0+cpu", True),
        ("5.25.0.dev0", False),
    ],
)
def test_patch_releases_of_the_newest_version_are_tested_ones(version, expected, monkeypatch):
    monkeypatch.setitem(versions.TESTED, "transformers", ("5.17", "5.24"))
    assert versions.is_tested("transformers", version) == expected


def test_an_untested_version_warns(monkeypatch, recwarn):
    monkeypatch.setattr(versions.metadata, "version", lambda name: "5.25.0")
    with pytest.warns(RuntimeWarning, match=r"not tested with transformers 5\.25\.0, only with 5\.17 to 5\.24"):
        versions.warn_if_untested("transformers")
    monkeypatch.setattr(versions.metadata, "version", lambda name: "5.23.0")
    recwarn.clear()
    versions.warn_if_untested("transformers")
    assert not recwarn


@pytest.mark.parametrize("name", versions.TESTED)
def test_a_part_checks_the_version_of_each_library(name):
    root = Path(__file__).parent.parent
    sources = "".join(path.read_text() for part in ("models", "train", "eval") for path in (root / part).rglob("*.py"))
    assert re.search(rf'(warn_if_untested|is_tested)\([^)]*"{name}"', sources)
