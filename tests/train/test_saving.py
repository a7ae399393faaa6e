"""A checkpoint written while training goes on is the one that training waited for."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.train import saving
from sinklm.train.run import train
from sinklm.train.snapshot import HostMemory

from .tiny import assert_same_weights, copy_checkpoint, losses, weights
from .worker import fail_to_pin

OFTEN = ["checkpoint.every_steps=2", "checkpoint.keep=null", "validation.every_steps=null"]
CPU = torch.device("cpu")


def slow_disk(run_dir: Path) -> Any:
    """A context in which each checkpoint but the last is written after the step of the next one."""
    write = saving.write_snapshot

    def slow(snapshot, *args):
        while max(losses(run_dir)) < min(snapshot.state.step + 2, 6):
            time.sleep(0.01)
        write(snapshot, *args)

    return patch.object(saving, "write_snapshot", slow)


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_it_is_the_checkpoint_that_training_waited_for(recipe, tmp_path, stage, precision):
    settings = [*OFTEN, "train.num_steps=6", f"deepspeed.zero_stage={stage}", f"train.precision={precision}"]
    train(recipe, [*settings, f"train.run_dir={tmp_path / 'waited'}", "checkpoint.asynchronous=false"])
    with slow_disk(tmp_path / "behind"):
        train(recipe, [*settings, f"train.run_dir={tmp_path / 'behind'}", "checkpoint.asynchronous=true"])
    assert list(list_checkpoints(tmp_path / "behind")) == [2, 4, 6]
    for step in (2, 4, 6):
        assert_same_weights(weights(tmp_path / "behind", step), weights(tmp_path / "waited", step))
    copy_checkpoint(tmp_path / "behind", 2, tmp_path / "resumed")
    train(recipe, [*settings, f"train.run_dir={tmp_path / 'resumed'}"])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "waited")
    assert_same_weights(weights(tmp_path / "resumed", 6), weights(tmp_path / "waited", 6))


def test_it_is_written_while_training_goes_on(recipe, tmp_path, monkeypatch):
    """The folder of step 2 is complete only after step 3 was recorded."""
    write, done = saving.write_snapshot, []

    def slow(snapshot, *args):
        while snapshot.state.step == 2 and max(losses(tmp_path)) < 4:
            time.sleep(0.01)
        write(snapshot, *args)
        done.append((snapshot.state.step, max(losses(tmp_path))))

    monkeypatch.setattr(saving, "write_snapshot", slow)
    train(recipe, [*OFTEN, f"train.run_dir={tmp_path}", "checkpoint.asynchronous=true"])
    assert done[0] == (2, 4)
    assert [step for step, _ in done] == [2, 4, 6, 8]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(recipe, tmp_path, monkeypatch):
    write = saving.write_snapshot

    def failing(snapshot, *args):
        if snapshot.state.step == 4:
            snapshot.path.rename(snapshot.path.with_name("gone"))
        write(snapshot, *args)

    monkeypatch.setattr(saving, "write_snapshot", failing)
    with pytest.raises(ValueError, match=r"cannot save .*step-4 \(earlier checkpoints are intact\)"):
        train(recipe, [*OFTEN, f"train.run_dir={tmp_path}", "checkpoint.asynchronous=true"])
    assert list(list_checkpoints(tmp_path)) == [2]
    assert max(losses(tmp_path)) >= 4


def test_memory_that_cannot_be_pinned_is_done_without(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(HostMemory, "_pin", fail_to_pin)
    threads = []
    monkeypatch.setattr(saving.CheckpointWriter, "_write_behind", lambda *args: threads.append(args))
    train(recipe, [*OFTEN, f"train.run_dir={tmp_path}", "checkpoint.asynchronous=true"])
    assert list(list_checkpoints(tmp_path)) == [2, 4, 6, 8]
    assert not threads
    told = "training will pause while it saves, because host memory cannot be pinned (rank 0: no memory)"
    assert capsys.readouterr().out.count(told) == 1


tensors = st.builds(
    lambda shape, dtype: torch.randn(shape).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
)
states = st.recursive(
    st.one_of(tensors, st.none(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@given(states, st.sampled_from([0, 100, 2**20]))
def test_a_snapshot_is_an_equal_copy_with_storages_of_its_own(state, num_bytes):
    memory = HostMemory(CPU, num_bytes)
    memory.begin()
    copied = memory.copy(state)
    (old, spec), (new, other_spec) = pytree.tree_flatten(state), pytree.tree_flatten(copied)
    assert spec == other_spec
    for left, right in zip(old, new, strict=True):
        if not isinstance(left, torch.Tensor):
            assert left == right
            continue
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
        assert right.untyped_storage().nbytes() == right.numel() * right.element_size()
        assert not left.numel() or left.data_ptr() != right.data_ptr()


def test_files_in_the_page_cache_do_not_count_as_used(tmp_path, monkeypatch):
    contents = {"max": "64000", "current": "62000\n", "stat": "anon 4000\nfile 58000\ninactive_file 50000\n"}
    for name, content in contents.items():
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(saving, "CGROUP", tmp_path)
    assert saving.free_memory() == 52_000
    (tmp_path / "memory.stat").unlink()
    assert saving.free_memory() == 2_000
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert saving.free_memory() > 52_000


def test_a_snapshot_reuses_the_memory_of_the_one_before():
    memory = HostMemory(CPU, 4096)
    state = {"weights": torch.randn(7, 3), "steps": [torch.tensor(1.0)], "view": torch.arange(10)[2:5]}
    memory.begin()
    first = [tensor.data_ptr() for tensor in pytree.tree_leaves(memory.copy(state))]
    memory.begin()
    state["weights"] += 1
    second = memory.copy(state)
    assert [tensor.data_ptr() for tensor in pytree.tree_leaves(second)] == first
    assert torch.equal(second["weights"], state["weights"])
    memory.begin()
    larger = memory.copy({"weights": torch.ones(2000)})
    assert torch.equal(larger["weights"], torch.ones(2000))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_snapshot_fits_into_the_memory_that_was_allocated(recipe, tmp_path, monkeypatch, stage, precision):
    sizes = []
    take = HostMemory._take

    def measured(self, num_bytes):
        taken = take(self, num_bytes)
        sizes.append((self._num_used, len(self._memory)))
        return taken

    monkeypatch.setattr(HostMemory, "_take", measured)
    settings = [f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "train.num_steps=1"]
    monkeypatch.setattr("sinklm.train.disk.SLACK", 2**16)
    train(recipe, [*settings, f"train.run_dir={tmp_path}", "checkpoint.asynchronous=true"])
    used, size = sizes[-1]
    assert 0.5 * size < used <= size


def test_a_copy_that_went_astray_is_noticed():
    memory = HostMemory(CPU, 4096)
    memory.begin()
    memory.copy({"weights": torch.ones(3)})
    memory.end()
    memory.wait_on_host()
    memory._memory[:4096] = bytes(4096)
    with pytest.raises(RuntimeError, match=r"is wrong: set checkpoint\.asynchronous=false"):
        memory.wait_on_host()


@pytest.mark.gpu
def test_memory_at_the_address_of_another_is_pinned_again():
    """As in a second run in the same process."""
    device = torch.device("cuda")
    for value in range(1, 6):
        memory = HostMemory(device, 2**24)
        memory.begin()
        copied = memory.copy(torch.full((2**20,), float(value), device=device))
        memory.end()
        memory.wait_on_host()
        assert bool((copied == value).all())
        del copied
        memory.close()


@pytest.mark.gpu
def test_a_snapshot_is_what_it_was_when_it_was_taken():
    device = torch.device("cuda")
    memory = HostMemory(device, 2**28 + 2**20)
    state = {"large": torch.zeros(2**26, device=device), "small": torch.zeros(3, dtype=torch.bfloat16, device=device)}
    for value in range(1, 6):
        memory.begin()
        for tensor in state.values():
            tensor.fill_(value)
        torch.cuda._sleep(10**8)  # cycles
        copied = memory.copy(state)
        assert not memory._copied.query()  # it was only queued, which requires pinned memory
        memory.end()
        memory.wait_on_device()
        for tensor in state.values():
            tensor.fill_(-1)
        memory.wait_on_host()
        assert memory.pinning_error() == ""
        assert {name: bool((tensor == value).all()) for name, tensor in copied.items()} == dict.fromkeys(state, True)
    memory.close()
