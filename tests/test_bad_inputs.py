"""Each bad input ends a command with one line that names it, and nothing of a model is run."""

import io
import re
import shlex
import shutil
import sys

import pytest

from sinklm.cli.main import main

from .bad_inputs import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_one_line(case: Case, valid_model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(valid_model, model)
    (tmp_path / "text.txt").write_text("a text of some words and lines\n" * 40)
    case.damage(model)
    for name, value in (case.environment or {}).items():
        monkeypatch.setenv(name, value)

    if "--to gguf" in case.command:
        pytest.importorskip("gguf")
    command = case.command.format(model=model, here=tmp_path) if "${" not in case.command else case.command
    monkeypatch.setattr(sys, "argv", ["sinklm", *shlex.split(command)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))  # yes to any question
    with pytest.raises(SystemExit) as end:
        main()
    said = capfd.readouterr().err + (end.value.code if isinstance(end.value.code, str) else "")
    assert end.value.code not in (0, None)
    is_note = re.compile(r"\[|[Ww]arning|(loading|reading) .* …$")
    (line,) = (line for line in said.splitlines() if line and not is_note.match(line))  # rich 13 ends with a blank one
    assert re.fullmatch(f"error: {case.message}", line), line
    remedies = re.findall(r"\b(?:check|copy|correct|pass|remove|restore|run|set|use) \w+ \w+", line)
    assert len(remedies) == len(set(remedies)), line
    assert not (tmp_path / "ran").exists()


def test_the_names_of_the_cases_differ():
    assert len({case.name for case in CASES}) == len(CASES) >= 100
