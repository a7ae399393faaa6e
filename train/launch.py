"""Ranks: who this process is, how it finds the others, and how a run ends when one of them fails or is told to stop."""

import atexit
import contextlib
import io
import os
import re
import signal
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers

from . import deepspeed_patches

STEP_TIMEOUT = timedelta(minutes=10)  # a rank that is silent for so long within a step is dead
PATIENT_TIMEOUT = timedelta(hours=6)  # checkpoints of large models take their time to write and convert
SECOND_INTERRUPT_AFTER = 3.0  # seconds; launchers send several signals for one Ctrl-C


RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SameOnAllRanks(ValueError):
    """An error that every rank raises alike, so that one of them can report it."""


@dataclass(frozen=True)
class World:
    """This process among the others.

    Attributes:
        patient_group: a CPU process group for what may take long; None in a world of one.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    patient_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: object) -> list:
        """``value`` of every rank, in their order. Waits for them, as long as it takes."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient_group)
        return values

    @contextmanager
    def all_or_none(self, prefix: str = "") -> Iterator[None]:
        """A part of the work in which all ranks fail if one does: they wait for each other at its end.

        Raises:
            SameOnAllRanks: says what went wrong, and on which rank if not on all.
        """
        caught: Exception | None = None
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, SameOnAllRanks):
                raise
            caught = error
        messages = self.gather(None if caught is None else str(caught))
        if any(messages):
            if len(set(messages)) > 1:
                messages = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message]
            raise SameOnAllRanks(prefix + "; ".join(dict.fromkeys(messages))) from caught


@contextmanager
def connected(*, patches: bool = True) -> Iterator[World]:
    """Join the other ranks that a launcher started (``deepspeed``, ``torchrun``, ``srun``), or be the only one.

    Args:
        patches: the recipe's ``deepspeed.patches``.

    Raises:
        ConnectionError: another rank died or fell silent.
    """
    quieten_libraries()
    with _restored_environment():
        yield from _join(patches)


def _join(patches: bool) -> Iterator[World]:
    import deepspeed

    fill_environment(os.environ)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = _claim_device(local_rank)
    if patches and device.type == "cpu":
        deepspeed_patches.skip_op_build(is_main=rank == 0)
    try:
        if not dist.is_initialized():  # DeepSpeed keeps its process groups, so a second run in a process shares them
            backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            # A single rank lets the system choose the port: two runs that start at once must not choose the same.
            store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True) if size == 1 else None
            where: dict[str, Any] = {"store": store, "rank": rank, "world_size": size} if store else {}
            dist.init_process_group(backend, timeout=STEP_TIMEOUT, device_id=device_id, **where)
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=STEP_TIMEOUT)
        patient_group = dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT) if size > 1 else None
        yield World(rank, size, local_rank, device, patient_group)
    except RuntimeError as error:
        if size > 1 and _is_lost_contact(error):
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise ConnectionError(
                f"rank {rank} lost contact with another rank, which died or hangs: see what that one wrote last, then "
                f"start the same command again to resume from the newest checkpoint ({reason})"
            ) from error
        raise
    atexit.unregister(_leave)
    atexit.register(_leave)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Take back the variables of the rendezvous: whatever this process starts later is no rank of this run."""
    before = {name: os.environ[name] for name in RENDEZVOUS if name in os.environ}
    try:
        yield
    finally:
        for name in RENDEZVOUS:
            os.environ.pop(name, None)
        os.environ.update(before)


def _leave() -> None:
    """Take leave of the other ranks in good order; a rank that failed does not."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quieten_libraries() -> None:
    """Keep DeepSpeed and torch from writing over the progress line. Call it before DeepSpeed is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without this it warns that it found no GPU
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # The interpreter's own folder holds `ninja`, which torch and DeepSpeed look for on the path when they compile.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed|deepspeed")
    # What is left in float32 on a GPU is left there on purpose: TensorFloat32 would round the rotary angles.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)


@contextmanager
def silent_stdout() -> Iterator[None]:
    """For the calls of DeepSpeed that print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def fill_environment(environment: "os._Environ[str] | dict[str, str]") -> None:
    """Set the variables that torch's rendezvous reads (RANK, WORLD_SIZE …), where no launcher has.

    ``srun`` says who we are in variables of its own; without any launcher we are rank 0 of 1. A batch script that is
    not run by ``srun`` has no SLURM_STEP_NUM_TASKS, and is one process however many tasks the job may have.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_RANK", "0")
        return
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        environment.setdefault("MASTER_PORT", str(10_000 + int(environment["SLURM_JOB_ID"]) % 20_000))
        return
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def first_host(node_list: str) -> str:
    """The first of Slurm's hosts: ``gpu[003-007,9],login`` is ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST {node_list!r} names no host: set MASTER_ADDR")
    return match[1] + (match[2] or "")


def _claim_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        # Ranks on one machine share its cores; torch alone would give each of them all.
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if num_devices == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        local_rank = 0  # Slurm shows each task a GPU of its own
    if local_rank >= num_devices:
        raise ValueError(f"local rank {local_rank} has no GPU: this machine shows {num_devices}; start as many ranks")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return bool(re.search(r"gloo|Connection (closed|reset)|Timed out waiting|recv, errno|Broken pipe", str(error)))


class StopRequest:
    """SIGTERM and SIGINT, remembered until the step is done. As a context manager it puts the old handlers back.

    A second SIGINT some seconds after the first ends the process at once.

    Attributes:
        signal_number: the first signal received, or 0.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_number = 0
        self._received_at = 0.0

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if not self.signal_number:
            self.signal_number, self._received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > SECOND_INTERRUPT_AFTER:
            raise KeyboardInterrupt
