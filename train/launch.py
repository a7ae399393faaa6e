"""Ranks: how a process joins the others, and how a run ends if one fails or receives a signal."""

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
from .rendezvous import await_rank_0, check_ranks, read_count

STEP_TIMEOUT = timedelta(minutes=10)  # a rank that does not respond for this long within a step is considered dead
PATIENT_TIMEOUT = timedelta(hours=6)  # writing and converting checkpoints of large models takes long
SECOND_INTERRUPT_AFTER = 3.0  # seconds; launchers send several signals for one Ctrl-C


RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SameOnAllRanks(ValueError):
    """An error that every rank raises with the same message, so only one reports it."""


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of ranks.

    Attributes:
        patient_group: CPU process group with a long timeout; None if there is one rank.
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
        """Return ``value`` of every rank, in rank order. Waits up to ``PATIENT_TIMEOUT``."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient_group)
        return values

    @contextmanager
    def all_or_none(self, prefix: str = "") -> Iterator[None]:
        """Context in which all ranks fail if one does. They wait for each other at its end.

        Raises:
            SameOnAllRanks: states the error, and the rank if it did not occur on all.
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
    """Connect to the ranks started by a launcher (``deepspeed``, ``torchrun``, ``srun``), if any.

    Args:
        patches: the recipe's ``deepspeed.patches``.

    Raises:
        ConnectionError: another rank died or does not respond.
    """
    quieten_libraries()
    with _restored_environment():
        yield from _join(patches)


def _join(patches: bool) -> Iterator[World]:
    import deepspeed

    fill_environment(os.environ)
    if not dist.is_initialized():
        await_rank_0(os.environ)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = _claim_device(local_rank)
    if patches and device.type == "cpu":
        deepspeed_patches.skip_op_build(is_main=rank == 0)
    try:
        if not dist.is_initialized():  # DeepSpeed keeps its process groups, so a second run in a process reuses them
            backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            # Port 0: the system chooses a free port, so that two runs that start together do not
            # collide.
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
                f"rank {rank} lost contact with another rank, which died or hangs: check the output of that rank, then "
                f"run the same command again to resume from the newest checkpoint ({reason})"
            ) from error
        raise
    atexit.unregister(_leave)
    atexit.register(_leave)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """Restore the rendezvous variables: later child processes are not ranks of this run."""
    before = {name: os.environ[name] for name in RENDEZVOUS if name in os.environ}
    try:
        yield
    finally:
        for name in RENDEZVOUS:
            os.environ.pop(name, None)
        os.environ.update(before)


def _leave() -> None:
    """Destroy the process groups at exit. A rank that failed skips this."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quieten_libraries() -> None:
    """Silence DeepSpeed's and torch's output. Call it before DeepSpeed is imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # torch and DeepSpeed need `ninja` on the path to compile; it is in the interpreter's folder.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed|deepspeed")
    # The remaining float32 operations are intentional: TensorFloat32 would round the rotary angles.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Suppress the output of DeepSpeed calls that print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def fill_environment(environment: "os._Environ[str] | dict[str, str]") -> None:
    """Set the variables that torch's rendezvous reads (RANK, WORLD_SIZE …) if no launcher has.

    ``srun`` sets its own variables; without a launcher this is rank 0 of 1. A batch script that is
    not run by ``srun`` has no SLURM_STEP_NUM_TASKS, and is one process regardless of the job's
    number of tasks.

    Raises:
        ValueError: a variable is not a number, or they contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        environment.setdefault("LOCAL_RANK", "0")
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        environment["RANK"] = str(read_count(environment, "SLURM_PROCID"))
        environment["WORLD_SIZE"] = str(read_count(environment, "SLURM_STEP_NUM_TASKS", at_least=1))
        environment["LOCAL_RANK"] = str(read_count(environment, "SLURM_LOCALID"))
        environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_STEP_NODELIST", "")))
        environment.setdefault("MASTER_PORT", str(10_000 + read_count(environment, "SLURM_JOB_ID") % 20_000))
    else:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    check_ranks(environment)


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: ``gpu003`` for ``gpu[003-007,9],login``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, which contains no host name: set MASTER_ADDR")
    return match[1] + (match[2] or "")


def _claim_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        # Ranks on one machine share its cores; by default torch would use all cores in each.
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if num_devices == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        local_rank = 0  # Slurm makes one GPU visible to each task
    if local_rank >= num_devices:
        raise ValueError(
            f"local rank {local_rank} has no GPU: {num_devices} are visible on this machine; start one rank per GPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo raises plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return bool(re.search(r"gloo|Connection (closed|reset)|Timed out waiting|recv, errno|Broken pipe", str(error)))


class StopRequest:
    """Records SIGTERM and SIGINT until the step is done. On exit it restores the old handlers.

    A second SIGINT more than 3 seconds after the first ends the process immediately.

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
