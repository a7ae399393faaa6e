"""The space that checkpoints take: predicted, checked before a save, and a disk that is full."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import disk
from sinklm.train.config import CheckpointSection
from sinklm.train.disk import checkpoint_bytes, checkpoints_kept, run_bytes
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.schedule import is_pythia_step, saves_after

LARGER = ["model.hidden_size=128", "model.num_hidden_layers=4", "model.vocab_size=4096", "validation.every_steps=null"]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("stage", "precision", "more"),
    [
        *product([0, 1, 2, 3], ["bf16", "fp32"], [[]]),
        (0, "fp32", ["optimizer.name=muon"]),
        (1, "bf16", ["optimizer.name=muon"]),
        (0, "bf16", ["train.only_sinks=true", "model.init_from=START"]),
    ],
)
def test_the_predicted_size_of_a_checkpoint_is_right(recipe, store, tmp_path, stage, precision, more):
    settings = [*LARGER, f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.num_steps=1"]
    if more[-1:] == ["model.init_from=START"]:
        start = tmp_path / "start"
        train(recipe, [f"train.run_dir={start}", *settings])
        more = [*more[:-1], f"model.init_from={start}"]
    settings += more
    train(recipe, [f"train.run_dir={tmp_path}", *settings])
    plan = Plan(load_config(recipe, settings), 1, 300)
    predicted = checkpoint_bytes(plan, store / "tokenizer.json")
    assert predicted == pytest.approx(size_of(tmp_path / "checkpoints" / "step-1"), rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        ["deepspeed.zero_stage=1"],
        ["deepspeed.zero_stage=0", "optimizer.name=muon"],
        ["deepspeed.zero_stage=0", "train.only_sinks=true", "model.init_from=START"],
    ],
)
def test_the_predicted_size_of_a_run_has_only_moments_that_exist(recipe, store, tmp_path, more):
    """There are none at step 0, and none of frozen weights."""
    settings = [*LARGER, "train.num_steps=2", "checkpoint.pythia_steps=true"]
    if more[-1] == "model.init_from=START":
        plan = Plan(load_config(recipe, settings), 1, 300)
        SinkGPTNeoXForCausalLM(plan.model_config).save_pretrained(tmp_path / "start")
        more = [*more[:-1], f"model.init_from={tmp_path / 'start'}"]
    settings += more
    train(recipe, [f"train.run_dir={tmp_path / 'run'}", *settings])
    plan = Plan(load_config(recipe, settings), 1, 300)
    predicted = run_bytes(plan, checkpoints_kept(plan.config)[0], store / "tokenizer.json")
    assert predicted == pytest.approx(size_of(tmp_path / "run" / "checkpoints"), rel=0.01)


@pytest.mark.parametrize(
    ("settings", "kept_and_most"),
    [
        (["checkpoint.keep=2", "checkpoint.every_steps=1"], (2, 3)),
        (["checkpoint.keep=null", "checkpoint.every_steps=4"], (2, 2)),
        (["checkpoint.keep=3", "checkpoint.every_steps=null"], (1, 1)),
        (["checkpoint.keep=1", "checkpoint.every_steps=3", "checkpoint.pythia_steps=true"], (6, 6)),
    ],
)
def test_the_number_of_checkpoints_is_that_of_a_run(recipe, tmp_path, monkeypatch, settings, kept_and_most):
    counts = []
    check = disk.check_free_space
    monkeypatch.setattr(
        "sinklm.train.checkpoint.check_free_space",
        lambda folder, needed: (counts.append(len(list(folder.parent.iterdir()))), check(folder, needed)),
    )
    settings = [*settings, "validation.every_steps=null", "train.num_steps=8"]
    train(recipe, [f"train.run_dir={tmp_path}", *settings])
    assert checkpoints_kept(load_config(recipe, settings)) == kept_and_most
    assert (len(list_checkpoints(tmp_path)), max(counts)) == kept_and_most


def kept_step_by_step(section: CheckpointSection, num_steps: int) -> tuple[int, int]:
    is_saved, saved, most = saves_after(num_steps, section), [], 0
    for step in range(num_steps + 1):
        if is_saved(step):
            saved.append(step)
            most = max(most, len(saved))
            passing = [each for each in saved if not (section.pythia_steps and is_pythia_step(each))]
            if section.keep:
                saved = [each for each in saved if each not in passing or each in passing[-section.keep :]]
    return len(saved), most


sections = st.builds(
    CheckpointSection,
    every_steps=st.none() | st.integers(1, 60) | st.sampled_from([100, 125, 256, 400, 512, 1000, 2000]),
    keep=st.none() | st.integers(1, 5),
    pythia_steps=st.booleans(),
)


@given(sections, st.integers(1, 300) | st.sampled_from([511, 512, 513, 999, 1000, 1001, 2999, 3000, 4001]))
def test_the_number_of_checkpoints_is_that_of_a_loop(section, num_steps):
    config = SimpleNamespace(checkpoint=section, train=SimpleNamespace(num_steps=num_steps))
    assert checkpoints_kept(config) == kept_step_by_step(section, num_steps)


def test_the_checkpoints_of_the_longest_run_are_counted_at_once(recipe):
    settings = [f"train.num_steps={10**15}", "checkpoint.every_steps=1500", "checkpoint.pythia_steps=true"]
    kept_forever = 11 + 10**12  # 0, 1, 2, 4 … 512 and all multiples of 1000
    assert checkpoints_kept(load_config(recipe, settings)) == (kept_forever + 3, kept_forever + 3)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", folder]).returncode:
        pytest.skip("needs permission to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_saving(recipe, small_disk, capsys):
    with pytest.raises(
        ValueError,
        match=r"cannot save .*step-8 \(earlier .*\): it takes 1\.\d\d MiB, but 0\.\d\d MiB are free",
    ):
        train(recipe, [f"train.run_dir={small_disk}", "checkpoint.keep=1"])
    output = capsys.readouterr().out
    assert re.search(
        r"warning: .* are free on the disk of .*\(2 at once\): free space, or set checkpoint\.keep", output
    )
    assert list(list_checkpoints(small_disk)) == [4]


def test_a_disk_that_fills_while_saving_costs_nothing(recipe, small_disk, monkeypatch):
    """Another program writes to it after the check."""
    monkeypatch.setattr("sinklm.train.checkpoint.check_free_space", lambda folder, needed: None)
    with pytest.raises(ValueError, match=r"cannot save .*step-8 \(earlier .*: writing failed with 0\.00 MiB free"):
        train(recipe, [f"train.run_dir={small_disk}", "checkpoint.keep=1"])
    assert list(list_checkpoints(small_disk)) == [4]
    monkeypatch.undo()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    train(recipe, [f"train.run_dir={small_disk}", "checkpoint.keep=1"])
    assert list(list_checkpoints(small_disk)) == [8]
