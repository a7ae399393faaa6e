"""Pages of results in docs/results: their tables and pictures are those of their data."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
REPORTS = {  # scripts by the page that they write
    "paper": "report",
    "training-speed": "training_report",
    "muon": "muon_report",
    "windows": "windows_report",
    "recall": "recall_report",
    "quantization": "quantization_report",
    "retrofit": "retrofit_report",
}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    for folder in ("study", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def pages_in(folder: Path) -> list[str]:
    """Return the pages with tables of a script; also those that lack their data, or the reverse."""
    marked = {page.stem for page in folder.glob("*.md") if "<!-- end -->" in page.read_text(encoding="utf-8")}
    return sorted(marked | {name for name in REPORTS for end in ("md", "json") if (folder / f"{name}.{end}").exists()})


def run(module: ModuleType, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.parametrize("name", pages_in(RESULTS))
def test_a_page_is_made_from_its_data(name, tmp_path, monkeypatch):
    module = importlib.import_module(REPORTS[name])
    for end in ("json", "md"):
        shutil.copy(RESULTS / f"{name}.{end}", tmp_path)
    run(module, monkeypatch, "--output", str(tmp_path))
    page = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert page == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    places = set(re.findall(r"<!-- (\w+) -->", page)) - {"end"}
    assert places == module.tables(json.loads((tmp_path / f"{name}.json").read_text())).keys()
    shown = set(re.findall(r"\]\(([\w-]+\.png)\)", page))
    assert shown == {picture.name for picture in tmp_path.glob("*.png")}


def test_a_page_without_data_and_data_without_a_page_are_tested(tmp_path):
    (tmp_path / "recall.md").write_text("No table.")
    (tmp_path / "retrofit.json").write_text("{}")
    (tmp_path / "other.md").write_text("<!-- table -->\n<!-- end -->\n")
    (tmp_path / "free.md").write_text("By hand.")
    assert pages_in(tmp_path) == ["other", "recall", "retrofit"]
    assert {"paper", "windows"} <= set(pages_in(RESULTS))


def test_a_table_replaces_the_one_between_its_marks(tmp_path):
    from pages import write_page

    page = tmp_path / "paper.md"
    write_page(page, {"sinks": "| a |", "zero_shot": "", "tried": "| b |"})
    page.write_text("# By hand\n\n" + page.read_text() + "\nmore by hand\n")
    write_page(page, {"sinks": r"| \1 |", "zero_shot": "", "tried": ""})
    places = "<!-- sinks -->\n| \\1 |\n<!-- end -->\n\n<!-- tried -->\n<!-- end -->\n"
    assert page.read_text() == f"# By hand\n\n{places}\nmore by hand\n"


def test_the_results_of_a_study_become_the_data_of_its_page(tmp_path, monkeypatch, capsys):
    module = importlib.import_module("quantization_report")
    formats = [{"format": "w8", "increase": 1 / 3, "stderr": None}]
    model = {"layers": 8, "arm": "none", "loss": 3.0, "formats": formats}
    model |= {"largest_activation": 2.0, "largest_ratio": 5.0, "massive_activations": []}
    folder, output = tmp_path / "study", tmp_path / "page"
    for path in (folder, output):
        with pytest.raises(
            FileNotFoundError, match=r"study/quantization\.json does not exist: run quantization_study\.py"
        ):
            run(module, monkeypatch, str(folder), "--output", str(output))
        with pytest.raises(
            FileNotFoundError, match=r"page/quantization\.json does not exist: pass the folder of the study"
        ):
            run(module, monkeypatch, "--output", str(output))
        path.mkdir()
    (folder / "quantization.json").write_text(json.dumps({"models": [model]}, indent=2))
    run(module, monkeypatch, str(folder), "--output", str(output))
    data = (output / "quantization.json").read_text()
    assert '"increase": 0.3333333, "stderr": null' in data
    assert "layers_8\n\n| arm | seeds |" in capsys.readouterr().out
    assert "| none | 1 | 2.0 | 5 | 0.0 | 3.0000 | +0.3333 |" in (output / "quantization.md").read_text()
    for found, message in (
        ('{"models": []}', "study has no results yet"),
        ("{", r"study/quantization\.json is damaged \(.*\): run quantization_study\.py"),
    ):
        (folder / "quantization.json").write_text(found)
        with pytest.raises(ValueError, match=message):
            run(module, monkeypatch, str(folder), "--output", str(output))
    run(module, monkeypatch, "--output", str(output))
    assert (output / "quantization.json").read_text() == data
