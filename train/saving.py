"""Saves a run's state: takes a snapshot, and writes it while training goes on."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist

from ..checkpoints.folders import CHECKPOINTS_FOLDER, DEEPSPEED_FOLDER, CheckpointState
from . import deepspeed_patches
from .checkpoint import Snapshot, make_folders, write_snapshot
from .disk import checkpoint_bytes, snapshot_bytes
from .engine import deepspeed_config, optimizer_layout, parameter_groups
from .launch import COLLECTIVE_TIMEOUT, World
from .memory import GIB
from .model_files import gather_weights
from .plan import Plan
from .rank_state import rank_path, rank_state
from .resume import interpolated_settings
from .snapshot import HostMemory, copy_to_host
from .unpickling import pickle_enums_by_value

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SLOW_DISK, TYPICAL_DISK = 20e6, 200e6  # bytes per second; a save that is slower than the first counts as a hang
CGROUP = Path("/sys/fs/cgroup")


class CheckpointWriter:
    """Writes a run's checkpoints, with ``checkpoint.asynchronous`` in a thread. Every rank has one.

    One checkpoint at a time is written. The next save waits for it.

    Args:
        run_dir: the run's folder.
        fingerprint: fingerprint of the data, which must be the same when the run resumes.
        tokenizer_path: the ``tokenizer.json`` to save with the weights.
        on_saved: called with the path and the seconds that it took once a checkpoint is complete.
        say: called with a message if there is too little memory to save asynchronously, or it
            cannot be pinned.

    Attributes:
        num_bytes: size of a checkpoint.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        world: World,
        *,
        fingerprint: str,
        tokenizer_path: Path,
        on_saved: Callable[[Path, float], None],
        say: Callable[[str], None],
    ):
        self.num_bytes = checkpoint_bytes(plan, tokenizer_path)
        self._folder = run_dir / CHECKPOINTS_FOLDER
        self._plan, self._world, self._on_saved, self._say = plan, world, on_saved, say
        self._fingerprint, self._tokenizer_path = fingerprint, tokenizer_path
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._memory: HostMemory | None = None
        self._is_pinned = False
        if self._is_asynchronous():
            self._memory = HostMemory(world.device, snapshot_bytes(plan, is_main=world.is_main))
        # The thread's collectives need a group that the main thread does not use.
        group = (
            dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            if self._memory is not None and world.size > 1
            else None
        )
        self._thread_world = replace(world, cpu_group=group, watchdog=None)

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise an error."""
        return self._error is not None

    def save(self, engine: "DeepSpeedEngine", step: int) -> Path:
        """Save the state after ``step`` updates. Every rank calls it.

        Raises:
            SameOnAllRanks: a rank could not write this checkpoint or the one before. Older ones are
                unchanged.
        """
        self.finish()
        if self._memory is not None and not self._is_pinned:
            self._check_pinning(self._memory)
        path = self._folder / f"step-{step}"
        began = time.monotonic()
        with self._world.longer(self.num_bytes / SLOW_DISK, is_saving=True):
            self._world.mark("saving a checkpoint", step=step)
            snapshot = self._take(engine, path, step)
            if self._memory is None:
                self._write(snapshot, self._world, began)
        if self._memory is not None:
            self._thread = threading.Thread(
                target=self._write_behind, args=(snapshot, began), name="sinklm save", daemon=True
            )
            self._thread.start()
        return path

    def before_update(self) -> None:
        """Let the device's next update wait until the state before it is copied."""
        if self._memory is not None:
            self._memory.wait_on_device()

    def finish(self) -> None:
        """Wait until the latest checkpoint is complete. Every rank calls it.

        Raises:
            SameOnAllRanks: a rank could not write it.
        """
        with self._world.longer(self.num_bytes / SLOW_DISK, is_saving=True):
            self._world.mark("waiting until a checkpoint is written")
            self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the thread, ignore its error, and give its memory back."""
        self._join()
        if self._memory is not None:
            self._memory.close()

    def abandon(self) -> None:
        """Let the thread be, which ends with the process. Its checkpoint stays incomplete."""
        self._thread = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _take(self, engine: "DeepSpeedEngine", path: Path, step: int) -> Snapshot:
        state = self._describe(step)
        failed = Snapshot(path, state, [], {}).failed
        with self._world.all_or_none(failed):
            if self._world.is_main:
                make_folders(path, self.num_bytes)
            if self._memory is not None:
                self._memory.begin()
        with self._world.all_or_none(failed):
            files = self._deepspeed_files(engine, path)
            if self._memory is not None:
                files = self._memory.copy(files)
            files.append((rank_path(path, self._world.rank), rank_state(engine)))
            weights = gather_weights(engine, self._world, self._copy_weight)
            if self._memory is not None:
                self._memory.end()
        return Snapshot(path, state, files, weights)

    def _copy_weight(self, weight: torch.Tensor) -> torch.Tensor:
        if self._memory is None:
            return copy_to_host(weight)  # ZeRO's weights share one storage
        copied = self._memory.copy(weight)
        if self._plan.config.deepspeed.zero_stage == 3:
            self._memory.wait_if_large()  # gathered weights, which DeepSpeed would have freed
        return copied

    def _write(self, snapshot: Snapshot, world: World, began: float) -> None:
        with world.all_or_none(snapshot.failed):
            if self._memory is not None:
                self._memory.wait_on_host()
        write_snapshot(snapshot, self._plan, self._tokenizer_path, world)
        self._on_saved(snapshot.path, time.monotonic() - began)

    def _write_behind(self, snapshot: Snapshot, began: float) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)
        try:
            self._write(snapshot, self._thread_world, began)
        except BaseException as error:
            self._error = error

    def _deepspeed_files(self, engine: "DeepSpeedEngine", path: Path) -> list[tuple[Path, Any]]:
        client_state: dict = {"universal_checkpoint_info": {}}  # required by `ds_to_universal`
        if self._plan.config.deepspeed.zero_stage == 0:
            # In the order of the numbers in the optimizer's `state_dict`.
            groups = parameter_groups(engine.module, self._plan.config.optimizer)
            client_state["optimizer_parameter_names"] = [name for group in groups for name in group]
        config = engine.config
        engine.config = deepspeed_config(self._plan, is_saved=True)  # it is stored with the weights
        pickle_enums_by_value()
        try:
            return deepspeed_patches.collect_files(engine, path, tag=DEEPSPEED_FOLDER, client_state=client_state)
        finally:
            engine.config = config

    def _describe(self, step: int) -> CheckpointState:
        config = self._plan.config
        return CheckpointState(
            step=step,
            positions=step * config.train.batch_size_tokens,
            data_fingerprint=self._fingerprint,
            world_size=self._world.size,
            zero_stage=config.deepspeed.zero_stage,
            precision=config.train.precision,
            optimizer_layout=optimizer_layout(self._plan),
            interpolated=interpolated_settings(config) or None,
        )

    def _check_pinning(self, memory: HostMemory) -> None:
        """Do without the host memory if a rank could not pin it. Every rank calls it."""
        errors = self._world.gather(memory.pinning_error())
        if any(errors):
            failed = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
            self._say(f"training will pause while it saves, because host memory cannot be pinned ({failed})")
            memory.close()
            self._memory = None
        self._is_pinned = True

    def _is_asynchronous(self) -> bool:
        """Whether to save in a thread: if the recipe says so and all hosts have the memory."""
        wanted = self._plan.config.checkpoint.asynchronous
        if not (self._world.device.type == "cuda" if wanted is None else wanted):
            return False
        free = min(self._world.gather(free_memory()))
        if free > self.num_bytes:  # as if all ranks were on one host
            return True
        self._say(
            f"training will pause while it saves, because a copy of the state needs {self.num_bytes / GIB:.1f} GiB of "
            f"host memory and {free / GIB:.1f} GiB are free"
        )
        return False


def free_memory() -> int:
    """Return how many bytes this process could still use, of the host and of its cgroup.

    Files in the page cache that were not read lately count as free: the kernel drops them first.
    """
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or without a limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - used + _unused_cache(), 0))
    return free


def _unused_cache() -> int:
    """Return the bytes of such files in the cgroup, 0 if they are not known."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(statistics["inactive_file"])
    return 0
