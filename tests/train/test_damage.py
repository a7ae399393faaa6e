"""Damaged checkpoints are noticed and set aside, and the run goes on from the one before."""

import errno
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklm.checkpoints.folders import DamagedCheckpointError, list_checkpoints
from sinklm.checkpoints.manifest import FileInfo, Manifest, find_damage, owned_files, owner, read_manifest
from sinklm.train.launch import World
from sinklm.train.run import train
from sinklm.train.verification import verified_state

from ..checkpoints.seal import seal
from .tiny import assert_same_weights, edit_state, flip_bit, losses, weights


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A run that has done all its 8 steps, with checkpoints at 4 and 8."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def change_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 8', '"step": 3'))


DAMAGES = [
    ("deepspeed/mp_rank_00_model_states.pt", flip_bit, "mp_rank_00_model_states.pt has another sha256"),
    ("deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt", truncate, "has 100 bytes instead of"),
    ("rng/rank-00000.pt", flip_bit, "rng/rank-00000.pt has another sha256"),
    ("model/model.safetensors", flip_bit, "model/model.safetensors has another sha256"),
    ("state.json", change_step, "state.json has another sha256"),
    ("state.json", Path.unlink, "state.json is missing"),
    ("config.yaml", lambda path: path.write_text("model: ["), "config.yaml has 8 bytes"),
    ("COMPLETE", flip_bit, "COMPLETE is damaged"),
    ("COMPLETE", lambda path: path.write_bytes(b""), "COMPLETE is damaged"),
    ("COMPLETE", lambda path: path.write_text("[" * 100_000), "COMPLETE is damaged"),
    ("COMPLETE", lambda path: [path.unlink(), path.mkdir()], "COMPLETE is missing"),
    ("deepspeed", lambda path: shutil.copy(path / "mp_rank_00_model_states.pt", path / "x.pt"), "x.pt is not in COM"),
    (".", lambda path: [shutil.rmtree(path), path.mkdir(), (path / "COMPLETE").touch()], "state.json is missing"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(recipe, whole_run, run, capsys, name, damage, reason):
    damage(run / "checkpoints" / "step-8" / name)
    train(recipe, [f"train.run_dir={run}"])
    output = capsys.readouterr().out
    assert re.search(rf"warning: .*step-8 is damaged: .*{re.escape(reason)}.*; it is now step-8\.damaged", output)
    assert "step-4 (step 4)" in output
    assert (run / "checkpoints" / "step-8.damaged").is_dir()
    assert list(list_checkpoints(run)) == [4, 8]
    assert losses(run) == losses(whole_run)
    assert_same_weights(weights(run, 8), weights(whole_run, 8))


@pytest.mark.parametrize("name", ["COMPLETE", "state.json", "config.yaml"])
def test_a_file_that_the_disk_cannot_read_is_damaged(run, monkeypatch, name):
    damaged = run / "checkpoints" / "step-8" / name

    def unreadable(path, *args, **options):
        if Path(path) == damaged:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(path, *args, **options)

    open_file = io.open
    monkeypatch.setattr(io, "open", unreadable)  # of pathlib
    monkeypatch.setattr("builtins.open", unreadable)
    with pytest.raises(DamagedCheckpointError, match=rf"{name} cannot be read \(Input/output error\)"):
        verified_state(damaged.parent, World(0, 1, 0, torch.device("cpu")), is_trusted=False)


def test_the_steps_of_a_checkpoint_must_agree(recipe, run, capsys):
    checkpoint = run / "checkpoints" / "step-8"
    edit_state(checkpoint, step=3)
    train(recipe, [f"train.run_dir={run}"])
    assert "different steps in state.json (3), COMPLETE (8), its name (8)" in capsys.readouterr().out
    checkpoint.rename(checkpoint.with_name("step-12"))
    train(recipe, [f"train.run_dir={run}"])
    assert "different steps in state.json (8), COMPLETE (8), its name (12)" in capsys.readouterr().out


def test_a_run_with_damaged_checkpoints_only_does_not_start_again(recipe, run):
    for step in (4, 8):
        flip_bit(run / "checkpoints" / f"step-{step}" / "rng" / "rank-00000.pt")
    for _ in range(2):  # both when they are found and afterwards
        with pytest.raises(ValueError, match=r"no intact checkpoint to resume from, only .*step-4\.damaged"):
            train(recipe, [f"train.run_dir={run}"])
    train(recipe, [f"train.run_dir={run}", "checkpoint.resume=never", "train.num_steps=1"])
    assert list(list_checkpoints(run)) == [1]


def test_a_damaged_checkpoint_that_was_named_is_an_error(recipe, run, tmp_path):
    named = run / "checkpoints" / "step-8"
    flip_bit(named / "rng" / "rank-00000.pt")
    for choice in (named, run):
        with pytest.raises(ValueError, match=r"step-8 is damaged: rng/rank-00000\.pt has another sha256"):
            train(recipe, [f"train.run_dir={tmp_path / 'new'}", f"checkpoint.resume={choice}"])
    assert named.is_dir()


def test_a_checkpoint_without_checksums_must_be_trusted(recipe, whole_run, run):
    shutil.rmtree(run / "checkpoints" / "step-8")
    checkpoint = run / "checkpoints" / "step-4"
    edit_state(checkpoint, format_version=1)
    (checkpoint / "COMPLETE").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-4 has no checksums .*: repeat the command with --trust-checkpoint"):
        train(recipe, [f"train.run_dir={run}"])
    train(recipe, [f"train.run_dir={run}"], trust_checkpoint=True)
    assert losses(run) == losses(whole_run)


def test_two_checkpoints_of_a_step_can_be_damaged(recipe, run):
    for _ in range(2):
        flip_bit(run / "checkpoints" / "step-8" / "state.json")
        train(recipe, [f"train.run_dir={run}"])
    assert (run / "checkpoints" / "step-8.damaged-2").is_dir()


def test_only_interrupted_checkpoints_are_deleted_by_the_next_save(recipe, run, capsys):
    folder = run / "checkpoints"
    for name in ("step-6", "step-6.damaged", "step-06", "notes"):
        (folder / name).mkdir()
    shutil.rmtree(folder / "step-8")
    (run / "step-2-universal").mkdir()
    train(recipe, [f"train.run_dir={run}"])
    assert {path.name for path in folder.iterdir()} == {"step-4", "step-8", "step-6.damaged", "step-06", "notes"}
    assert not (run / "step-2-universal").exists()
    output = capsys.readouterr().out
    assert "step-6, which was interrupted; the next save deletes it" in output
    assert "step-6.damaged, which is damaged" in output


def test_damaged_lines_of_the_metrics_do_not_block_a_restart(recipe, whole_run, run):
    shutil.rmtree(run / "checkpoints" / "step-8")
    path = run / "metrics.jsonl"
    path.write_bytes(b"\xff{\n" + b"[" * 100_000 + b"\n" + path.read_bytes())
    train(recipe, [f"train.run_dir={run}"])
    assert losses(run) == losses(whole_run)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_saves_and_resumes_again(recipe, tmp_path, stage):
    often = ["checkpoint.every_steps=1", "validation.every_steps=null", f"deepspeed.zero_stage={stage}"]
    for num_steps in (1, 4, 7):
        train(recipe, [f"train.run_dir={tmp_path}", *often, f"train.num_steps={num_steps}"])
    assert list(list_checkpoints(tmp_path)) == [5, 6, 7]
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]


# -- the manifest ----------------------------------------------------------------------------------

NAMES = st.from_regex(
    r"(deepspeed/(bf16_)?zero_pp_rank_[0-9]{1,3}_mp_rank_00|rng/rank-[0-9]{5}|model/[a-z]+)", fullmatch=True
)


@given(st.sets(NAMES), st.integers(1, 9))
def test_every_file_belongs_to_one_rank(names, world_size):
    shares = [[name for name in names if owner(name, world_size) == rank] for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(names)


@given(st.data())
def test_no_flipped_bit_of_a_manifest_is_unnoticed(data):
    manifest = Manifest(8, {"model/config.json": FileInfo(7, "ab" * 32), "rng/rank-00000.pt": FileInfo(9, "cd" * 32)})
    content = bytearray(manifest.to_json().encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "COMPLETE").write_bytes(content)
        with pytest.raises(DamagedCheckpointError):
            read_manifest(Path(folder))


def test_the_manifest_of_a_checkpoint_covers_every_file(whole_run):
    checkpoint = whole_run / "checkpoints" / "step-8"
    manifest = read_manifest(checkpoint)
    assert set(manifest.files) == {
        path.relative_to(checkpoint).as_posix()
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "COMPLETE"
    }
    assert sorted(owned_files(checkpoint, 0, 2) + owned_files(checkpoint, 1, 2)) == sorted(manifest.files)
    assert find_damage(checkpoint, manifest.files) == []
    again = json.loads((checkpoint / "COMPLETE").read_text())
    seal(checkpoint)
    assert json.loads((checkpoint / "COMPLETE").read_text()) == again
