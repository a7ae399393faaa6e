"""metrics.jsonl and the progress line."""

import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sinklm.train.metrics import MetricsFile, WandbRun, is_logged_in
from sinklm.train.progress import RunProgress, Speedometer, human
from sinklm.train.recipe import load_config
from sinklm.train.run import train


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0})
    first.write({"step": 4, "validation_loss": 1.0})
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    first.close()

    second = MetricsFile(path, 3)
    second.write({"step": 4, "loss": 2.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # flushed before it is closed
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    second.close()


@pytest.mark.parametrize(
    "end", [b'{"step": 2, "loss": 1.0}', b'\xff{"step": 2}\n', b"\0\0\0\0", b'{"loss": 1}\n', b"2\n"]
)
def test_lines_that_a_crash_left_are_dropped(tmp_path, end):
    """Also a whole one without the end of its line: the next one would continue it."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + end)
    resumed = MetricsFile(path, 2)
    resumed.write({"step": 3, "loss": 2.0})
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_speed_and_mfu_by_hand(monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 10.0, 12.0, 20.0, 90.0, 90.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    speed = Speedometer(positions_per_step=1000, flops_per_position=6.0, peak_flops=12_000.0)
    for expected in (2.0, 2.0, 70.0):  # a step that compiles does not affect the median
        speed.start()
        assert speed.lap() == expected
    assert speed.seconds_per_step == 2.0
    assert speed.positions_per_second() == 500
    assert speed.mfu() == pytest.approx(500 * 6 / 12_000)
    assert Speedometer(1000, 6.0, None).mfu(1.0) is None


def test_a_step_takes_at_least_the_time_of_the_host():
    """Before a pause, if the host runs ahead and is slower than the device."""
    speed = Speedometer(1000, 6.0, None)
    assert speed.lap(at_least=20.0) == 20.0
    assert speed.lap() < 20.0


def test_the_progress_line(capsys, monkeypatch):
    """The time left counts validations and saves, but not the first step, which may compile."""
    speed = Speedometer(1000, 6.0, 12_000.0)
    speed.start()
    speed.lap()
    speed._seconds.clear()
    speed._seconds.extend([2.0, 2.0])
    values = {"loss": 3.14159, "lr": 6e-4, "grad_norm": 0.5, "memory_gib": 1.25}
    progress = RunProgress(100, is_silent=False)
    for step, now in ((31, 1000.0), (32, 1002.0), (33, 1042.0), (100, 1200.0)):  # step 32 has a validation
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        progress.update(step, values, speed, is_kept=True)
    line = "step {}/100{}  loss 3.1416  lr 6.00e-04  grad 0.50  500 tokens/s  MFU 25.0%  1.2 GiB\n"
    lefts = ((31, ""), (32, "  0:02:16 left"), (33, "  0:23:27 left"), (100, ""))
    assert capsys.readouterr().out == "".join(line.format(step, left) for step, left in lefts)
    RunProgress(100, is_silent=True).update(40, values, speed, is_kept=True)
    assert capsys.readouterr().out == ""


def test_progress_outlives_its_terminal(monkeypatch):
    """The terminal of an ssh connection is closed: writing fails with EIO."""
    terminal, output = os.openpty()
    with os.fdopen(output, "w") as stdout, monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", stdout)
        with RunProgress(100, is_silent=False) as progress:
            assert progress.console.is_terminal
            os.close(terminal)
            values = {"loss": 3.14159, "lr": 6e-4, "grad_norm": 0.5, "memory_gib": 1.25}
            progress.update(1, values, Speedometer(1000, 6.0, None))
            progress.say("saved")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (999.6, "1K"), (1234, "1.23K"), (999_700, "1M"), (299_892_736_000, "300B")],
)
def test_human_numbers(number, text):
    assert human(number) == text


class FakeRun:
    """Replaces the result of wandb.init; its service dies after the first step."""

    offline = True

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        if step > 1:
            raise BrokenPipeError("the service is gone")
        self.logged.append((step, values))


@pytest.fixture
def wandb_asked(monkeypatch, tmp_path) -> list[dict]:
    """The options of each call of wandb.init, without a login."""
    wandb = pytest.importorskip("wandb")
    asked: list[dict] = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options) or FakeRun())
    return asked


def wandb_run(tmp_path, mode: str, said: list[str] | None = None) -> WandbRun:
    config = load_config("quickstart", [f"wandb.mode={mode}"])
    return WandbRun(config, tmp_path, (said if said is not None else []).append)


def test_wandb_is_offline_unless_logged_in(wandb_asked, tmp_path, monkeypatch):
    wandb_run(tmp_path, "auto")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    wandb_run(tmp_path, "auto")
    wandb_run(tmp_path, "disabled")
    assert [options["mode"] for options in wandb_asked] == ["offline", "online"]
    assert wandb_asked[0]["id"] == wandb_asked[1]["id"]  # a resumed run continues the same wandb run
    assert [options["resume"] for options in wandb_asked] == ["allow", "allow"]


def test_the_names_of_the_environment_count_unless_a_recipe_has_its_own(wandb_asked, tmp_path, monkeypatch):
    wandb_run(tmp_path, "auto")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "this")
    wandb_run(tmp_path, "auto")
    config = load_config("quickstart", ["wandb.mode=auto", "wandb.project=ours", "wandb.name=that", "wandb.tags=[a]"])
    WandbRun(config, tmp_path, print)
    assert [options["project"] for options in wandb_asked] == ["sinklm", "theirs", "ours"]
    assert [options["name"] for options in wandb_asked] == [tmp_path.name, "this", "that"]
    assert [options["tags"] for options in wandb_asked] == [None, None, ["a"]]  # None: wandb reads WANDB_TAGS


def test_the_mode_of_the_environment_counts_with_auto(wandb_asked, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb_run(tmp_path, "auto")
    wandb_run(tmp_path, "online")  # as the recipe says
    assert [options["mode"] for options in wandb_asked] == [None, "online"]  # None: wandb reads the environment


def test_wandb_online_requires_a_login(wandb_asked, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"not logged in: run `wandb login`, or set wandb\.mode=offline"):
        wandb_run(tmp_path, "online")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match=r"^WANDB_MODE=online, but .* or set WANDB_MODE=offline"):
        wandb_run(tmp_path, "auto")


def test_a_missing_login_is_named_before_the_run_has_a_folder_and_by_a_dry_run(wandb_asked, recipe, tmp_path, capsys):
    settings = ["wandb.mode=online", f"train.run_dir={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match="you are not logged in: run `wandb login`"):
        train(recipe, settings)
    assert not (tmp_path / "run").exists()
    train(recipe, settings, only_describe=True)
    assert "Not on this machine: wandb.mode=online, but you are" in " ".join(capsys.readouterr().out.split())


def test_a_login_is_found_where_wandb_puts_it(wandb_asked, tmp_path):
    assert not is_logged_in()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert is_logged_in()


def test_training_begins_without_a_server_of_wandb(wandb_asked, tmp_path, monkeypatch):
    wandb, said = pytest.importorskip("wandb"), []

    def fail(error):
        def init(**options):
            raise error

        monkeypatch.setattr(wandb, "init", init)

    fail(wandb.errors.CommError("no answer\nfor 90 s"))
    wandb_run(tmp_path, "auto", said).write({"step": 1, "loss": 1.0})
    assert said == ["wandb failed and is disabled for the rest of the run (CommError: no answer for 90 s)"]
    for error in (wandb.errors.UsageError("Invalid project name"), ValueError("Invalid project name")):
        fail(error)
        with pytest.raises(
            ValueError, match=r"does not accept the settings \(.*Invalid project name\): correct the keys"
        ):
            wandb_run(tmp_path, "auto")


@pytest.mark.parametrize("content", ["", "a/b", "0123"])
def test_a_damaged_id_of_wandb_is_replaced(wandb_asked, tmp_path, content):
    path = tmp_path / "wandb" / "run-id"
    path.parent.mkdir()
    path.write_text(content)  # a run that was killed while it wrote it leaves an empty file
    wandb_run(tmp_path, "auto")
    assert re.fullmatch("[0-9a-f]{12}", wandb_asked[0]["id"])
    assert path.read_text() == wandb_asked[0]["id"]


def test_training_outlives_wandb(wandb_asked, tmp_path):
    said: list[str] = []
    run = wandb_run(tmp_path, "auto", said)
    for step in (1, 2, 3):
        run.write({"step": step, "loss": 1.0})
    run.close()
    assert [line for line in said if "wandb failed" in line] == [
        "wandb failed and is disabled for the rest of the run (BrokenPipeError: the service is gone)"
    ]


def wandb_records(path: Path) -> Iterator[Any]:
    """Read a `.wandb` file: protobuf records in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position < len(content):
        if (left := 32768 - position % 32768) < 7:  # the rest of a block is empty
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(record)
            record = b""


def test_what_lands_in_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = ["mode=offline", "project=sinks", "entity=team", "name=first try", "group=arms", "tags=[small, sink]"]
    config = load_config("quickstart", [f"wandb.{setting}" for setting in settings])
    run = WandbRun(config, tmp_path, lambda _: None)
    run.write({"step": 1, "loss": 2.5, "samples": [7, 8], "spikes": {"loss": {"mean": 1.0}}, "sample_text": "a b"})
    run.write({"step": 1, "validation_loss": 2.25})
    run.write({"step": 2, "loss": 2.0})
    run.close()
    wandb.teardown()  # waits until its process has written everything
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.entity, begun.display_name, begun.run_group) == ("sinks", "team", "first try", "arms")
    assert list(begun.tags) == ["small", "sink"]
    told = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert told["train"] == config.model_dump()["train"]
    history = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    logged = [{key: value for key, value in line.items() if not key.startswith("_")} for line in history]
    assert logged == [
        {"loss": 2.5, "spikes.loss.mean": 1, "sample_text": "a b", "validation_loss": 2.25},
        {"loss": 2.0},
    ]
