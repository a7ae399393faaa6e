"""The documentation: links are valid, and versions and folders agree with the code."""

import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from docs.absolute_links import absolute_links, relative_links
from docs.site import FILES, recipe_keys
from sinklm.train.config import TrainingConfig
from sinklm.train.recipe import dotted_keys
from sinklm.versions import TESTED

from .test_imports import MAY_IMPORT

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page):
    for link in relative_links(page.read_text()):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_tests_that_pages_name_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in sources or list((ROOT / "tests").rglob(f"{name}.py")), f"{page}: {name}"


def test_the_page_on_the_package_index_has_no_relative_link():
    text = absolute_links((ROOT / "README.md").read_text(), "https://example.org/sinklm/", "1.2")
    assert not relative_links(text)
    assert "](https://example.org/sinklm/blob/v1.2/docs/streaming.md#which-models)" in text
    assert re.search(r"!\[[^\]]*\]\(https://example\.org/sinklm/raw/v1\.2/docs/results/[\w-]+\.png\)", text)
    assert "](https://arxiv.org/abs/2309.17453)" in text


def test_every_page_and_all_that_it_links_to_is_on_the_site():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(paths_of(nav)) == sorted(str(page.relative_to(ROOT)) for page in PAGES)
    for page in PAGES:
        for link in relative_links(page.read_text()):
            target = page.parent / link.partition("#")[0] if link[0] != "#" else page
            target = target / "README.md" if target.is_dir() else target
            assert target.exists(), link
            assert any(fnmatch(target.name, pattern) for pattern in FILES), f"{link} is not on the site"


def paths_of(nav: Any) -> Iterator[str]:
    """The pages of a navigation: a path, or lists and tables of them."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from paths_of(entry)


def test_the_reference_of_recipes_has_every_key():
    keys = re.findall(r"^\| `([\w.]+)` \|", recipe_keys(), flags=re.MULTILINE)
    assert sorted(keys) == sorted(dotted_keys(TrainingConfig))


def test_the_page_of_versions_is_up_to_date():
    page = (ROOT / "docs" / "versions.md").read_text()
    table = page.partition("|---|---|---|\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| {name} | {oldest} | {newest} |" for name, (oldest, newest) in TESTED.items()]
    pythons = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert f"Python {pythons[0]} to {pythons[-1]}" in page
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_the_table_of_folders_is_the_rule_of_imports():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| `sinklm\.(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert {
        folder: set(allowed.replace("–", "").replace(",", " ").split()) for folder, _, allowed in rows
    } == MAY_IMPORT
    assert all(folder == name for folder, name, _ in rows)


def test_the_extras_are_in_the_readme():
    page = (ROOT / "README.md").read_text()
    for extra in PROJECT["optional-dependencies"]:
        assert f'`pip install "sinklm[{extra}]"`' in page
