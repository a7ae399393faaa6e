"""The command `sinklm runs`."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from sinklm.cli import runs as module
from sinklm.cli.main import app
from sinklm.cli.runs import human_age
from sinklm.train.run import train

from ..checkpoints.test_runs import make_run
from ..train.tiny import RECIPE, losses, make_store


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["runs", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_real_run_is_resumed_by_the_command_that_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "store")
    (tmp_path / "tiny.yaml").write_text(f"{RECIPE}\ndata: {{path: {store}}}\n")
    train("tiny.yaml", ["train.num_steps=4"])
    (found,) = json.loads(call("--json"))
    assert (found["path"], found["state"], found["step"], found["command"]) == ("runs/tiny", "finished", 4, None)

    config = tmp_path / "runs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace("num_steps: 4", "num_steps: 6"))
    (found,) = json.loads(call("--json", "runs", "runs/tiny"))
    assert (found["state"], found["saved_step"], found["num_steps"]) == ("stopped", 4, 6)
    program, command, *arguments = shlex.split(found["command"])
    assert (program, command) == ("sinklm", "train")
    train(arguments[0], arguments[1:])
    (found,) = json.loads(call("--json"))
    assert (found["state"], found["loss"]) == ("finished", losses(tmp_path / "runs" / "tiny")[6])


def test_names_from_outside_are_shown_as_they_are(tmp_path):
    run = make_run(tmp_path / "[red]a[/b]\x1b[31m", saved=(10,))
    output = call(str(run))
    assert "\x1b" not in output
    assert r"[red]a[/b]\x1b[31m" in output.replace("\n", "")
    assert "stopped" in output
    assert "30/100" in output


def test_the_windows_of_a_run_are_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make_run(tmp_path / "plain")
    assert "attention" not in call(str(tmp_path))
    for name, attention in {
        "drawn": {"pattern": "window", "window": [32, 2047], "num_kept": None},
        "hybrid": {"pattern": ["window", "full"], "window": 255, "num_kept": 4},
    }.items():
        make_run(tmp_path / name, model={"attention": attention})
    found = {row["path"].rpartition("/")[2]: row["attention"] for row in json.loads(call("--json", str(tmp_path)))}
    assert found == {"plain": None, "drawn": "window 32–2047", "hybrid": "1 of 2 255"}
    output = call(str(tmp_path))
    assert "window 32–2047" in output
    assert "full" in output


def test_folders_without_runs(tmp_path, monkeypatch):
    assert call(str(tmp_path)) == "no runs\n"
    assert json.loads(call(str(tmp_path), "--json")) == []
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs: no such folder"):
        module.runs(None)


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (90, "2 min"), (7200, "2 h"), (200_000, "2 d")])
def test_ages(seconds, text):
    assert human_age(seconds) == text
