"""The state of a run is read from its folder, whatever is in it."""

import json
import os
import shlex
from pathlib import Path

import pytest
import yaml

from sinklm.checkpoints import runs
from sinklm.checkpoints.folders import CheckpointState
from sinklm.checkpoints.manifest import Manifest, describe_files, write_manifest
from sinklm.checkpoints.runs import find_runs, summarize
from sinklm.files import locked


def make_run(folder: Path, *, saved: tuple[int, ...] = (), num_ranks: int = 1, **config: dict) -> Path:
    """A run of 100 steps that has recorded 30 of them."""
    folder.mkdir(parents=True)
    settings = {"train": {"num_steps": 100, "run_dir": str(folder)}, "checkpoint": {"resume": "auto"}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "lock").touch()
    records = [{"step": step, "loss": 5 - step / 100} for step in range(1, 31)]
    records.insert(20, {"step": 20, "validation_loss": 4.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in saved:
        checkpoint = folder / "checkpoints" / f"step-{step}"
        (checkpoint / "model").mkdir(parents=True)
        (checkpoint / "model" / "config.json").write_text("{}")
        state = CheckpointState(step, 0, "", num_ranks, 1, "bf16")
        (checkpoint / "state.json").write_text(state.to_json())
        files = describe_files(checkpoint, ["model/config.json", "state.json"])
        write_manifest(checkpoint, Manifest(step, files))
    return folder


def test_a_stopped_run_tells_where_it_is_and_how_to_resume(tmp_path):
    run = make_run(tmp_path / "a run", saved=(10, 20))
    found = summarize(run)
    assert (found.state, found.step, found.num_steps, found.saved_step) == ("stopped", 30, 100, 20)
    assert (found.loss, found.validation_loss) == (4.7, 4.5)
    assert found.age is not None
    assert found.age < 60
    assert shlex.split(found.command or "") == ["sinklm", "train", f"{run}/config.yaml"]


def test_a_locked_run_is_running_and_a_full_one_finished(tmp_path):
    run = make_run(tmp_path / "run", saved=(10,))
    with locked(run / "lock", "busy"):
        assert summarize(run).state == "running"
        assert summarize(run).command is None
    assert summarize(run).state == "stopped"
    assert summarize(make_run(tmp_path / "other", saved=(100,))).state == "finished"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        ({}, "sinklm train {}/config.yaml"),
        ({"num_ranks": 8, "saved": (20,)}, "torchrun --nproc-per-node 8 --module sinklm.train {}/config.yaml"),
        ({"num_ranks": 9, "saved": (20,)}, "srun --ntasks 9 python -m sinklm.train {}/config.yaml"),
        ({"train": {"num_steps": 100, "run_dir": "old"}}, "sinklm train {}/config.yaml train.run_dir={}"),
        (
            {"saved": (20,), "checkpoint": {"resume": "never"}},
            "sinklm train {}/config.yaml checkpoint.resume=auto",
        ),
        ({"checkpoint": {"resume": "never"}}, "sinklm train {}/config.yaml"),
    ],
)
def test_the_command_resumes_from_the_newest_checkpoint_on_the_same_ranks(tmp_path, make, expected):
    run = make_run(tmp_path / "run", **make)
    (run / "environment.json").write_text(json.dumps({"devices": ["a GPU"] * 8}))
    assert summarize(run).command == expected.replace("{}", str(run))


def damage_config(run: Path) -> None:
    (run / "config.yaml").write_text("train: [")


def another_config(run: Path) -> None:
    (run / "config.yaml").write_bytes(b"\xff\xfe")


def nest_config(run: Path) -> None:
    (run / "config.yaml").write_text("[" * 5000)


def damage_state(run: Path) -> None:
    (run / "checkpoints" / "step-20" / "state.json").write_text("{")


def remove_state(run: Path) -> None:
    (run / "checkpoints" / "step-20" / "state.json").unlink()


def remove_model(run: Path) -> None:
    (run / "checkpoints" / "step-20" / "model" / "config.json").unlink()


@pytest.mark.parametrize("damage", [damage_config, another_config, nest_config])
def test_a_run_without_a_recipe_is_damaged(tmp_path, damage):
    run = make_run(tmp_path / "run", saved=(10, 20))
    damage(run)
    found = summarize(run)
    assert (found.state, found.step, found.command) == ("damaged", 30, None)
    assert found.note == f"{run}/config.yaml is damaged: it is not a recipe"


@pytest.mark.parametrize("damage", [damage_state, remove_state, remove_model])
def test_a_run_resumes_from_its_newest_intact_checkpoint(tmp_path, damage):
    run = make_run(tmp_path / "run", saved=(10, 20))
    damage(run)
    found = summarize(run)
    assert (found.state, found.saved_step) == ("stopped", 10)
    assert found.note.startswith(f"{run}/checkpoints/step-20 is damaged: ")
    other = make_run(tmp_path / "other", saved=(20,))
    damage(other)
    assert (summarize(other).state, summarize(other).command) == ("damaged", None)
    assert summarize(other).note.startswith(f"{other}/checkpoints/step-20 is damaged: ")


def test_the_error_that_stopped_a_run_is_its_note(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "error": "step 31: the loss is nan"}\n{"step": 32, "lo')
    assert (summarize(run).note, summarize(run).step, summarize(run).loss) == ("step 31: the loss is nan", 31, 4.7)


def test_a_run_whose_checkpoints_were_all_set_aside_is_damaged(tmp_path):
    run = make_run(tmp_path / "run", saved=(20,))
    (run / "checkpoints" / "step-20").rename(run / "checkpoints" / "step-20.damaged")
    found = summarize(run)
    assert (found.state, found.command, found.note) == ("damaged", None, "step-20.damaged was set aside")


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_records_are_read_from_the_end_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    run = make_run(tmp_path / "run")
    expected = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][::-1]
    monkeypatch.setattr(runs, "FIRST_BLOCK", block)
    assert list(runs._latest_records(run / "metrics.jsonl")) == expected


def test_runs_are_found_in_folders_and_not_inside_of_runs(tmp_path):
    names = ["runs/b", "runs/paper/sink", "runs/a"]
    made = [make_run(tmp_path / name, saved=(10,)) for name in names]
    (tmp_path / "runs" / "notes").mkdir()
    make_run(made[0] / "checkpoints" / "copy")
    assert find_runs(tmp_path / "runs") == [made[2], made[0], made[1]]
    assert find_runs(made[1]) == [made[1]]
    with pytest.raises(FileNotFoundError, match="missing: no such folder"):
        find_runs(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_damaged(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").chmod(0)
    assert summarize(run).state == "damaged"
