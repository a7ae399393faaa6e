"""README.md: its Python runs, its versions are the tested ones, its picture has its data."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from docs.pictures import sink_lost_figure
from sinklm.cli.main import app
from sinklm.versions import TESTED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
NUM_TOKENS = 140  # generated instead of the 200 of the page: still more than the cache contains


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_python_of_the_readme_prints_a_text(snippet, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shortened, num_replaced = re.subn(r"max_new_tokens=\d+", f"max_new_tokens={NUM_TOKENS}", snippet)
    assert num_replaced == 1
    names: dict = {}
    exec(shortened, names)
    assert capsys.readouterr().out.startswith("In the beginning")
    assert 3 < names["tokens"].shape[1] <= NUM_TOKENS + 10  # a text may end early


def test_the_versions_of_the_readme_are_the_tested_ones():
    for library in ("torch", "transformers"):
        oldest, newest = TESTED[library]
        assert f"{library} {oldest} to {newest}" in README


def test_commands_of_the_readme_exist():
    block = README.partition("## The job in five commands")[2].partition("```bash\n")[2].partition("```")[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 5
    for program, name, *_ in commands:
        assert program == "sinklm"
        assert name in get_command(app).commands


def test_the_picture_of_the_readme_comes_from_its_data():
    report = json.loads((ROOT / "docs" / "results" / "sink-lost.json").read_text(encoding="utf-8"))
    alternative = re.search(r"!\[([^\]]*)\]\(docs/results/sink-lost\.png\)", README)
    assert all(f"{perplexity:.1f}" in alternative[1] for perplexity in report["perplexity"].values())
    evicted, kept = sink_lost_figure(report).axes[0].lines
    assert all(a > b for a, b in zip(evicted.get_ydata(), kept.get_ydata(), strict=True))
