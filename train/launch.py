"""Ranks: how a process joins the others, and how a run ends if one fails or receives a signal."""

import atexit
import contextlib
import faulthandler
import io
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers

from . import deepspeed_patches
from .hangs import RESUME
from .ranks import check_ranks, read_count
from .stopping import restored_handlers
from .watchdog import EXIT_TIMEOUT, Watchdog

CONNECT_TIMEOUT = timedelta(minutes=10)  # for all ranks to start
LONGEST_JOIN = 2 * CONNECT_TIMEOUT.total_seconds()  # for all ranks to start and to connect to each other
COLLECTIVE_TIMEOUT = timedelta(hours=24)  # longer than any limit of the watchdog, which knows what a rank is doing
NOTICE_AFTER = 10.0  # seconds of waiting for other ranks, after which a rank says so
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class SameOnAllRanks(ValueError):
    """An error that every rank raises with the same message, so only one reports it."""


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of ranks.

    Attributes:
        cpu_group: process group for Python objects; None if there is one rank.
        watchdog: ends the run if a rank dies or hangs.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: object) -> list:
        """Return ``value`` of every rank, in rank order."""
        return _gather(value, self.size, self.cpu_group)

    def mark(self, where: str, *, step: int | None = None) -> None:
        """Tell the watchdog what this rank does next (`Watchdog.mark`). Every rank calls it."""
        if self.watchdog is not None:
            self.watchdog.mark(where, step=step)

    def longer(self, seconds: float, *, is_saving: bool = False) -> AbstractContextManager[None]:
        """Context in which the watchdog waits longer (`Watchdog.longer`). Every rank enters it."""
        if self.watchdog is None:
            return contextlib.nullcontext()
        return self.watchdog.longer(seconds, is_saving=is_saving)

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
            if isinstance(error, (SameOnAllRanks, torch.OutOfMemoryError)):
                raise  # out of memory in a collective, the others do not come here: the watchdog ends them
            caught = error
        messages = self.gather(None if caught is None else str(caught) or type(caught).__name__)
        if any(messages):
            if len(set(messages)) > 1:
                messages = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message]
            raise SameOnAllRanks(prefix + "; ".join(dict.fromkeys(messages))) from caught


@contextmanager
def connected(*, patches: bool = True, hang_timeout_minutes: float | None = None) -> Iterator[World]:
    """Connect to the ranks started by a launcher (``deepspeed``, ``torchrun``, ``srun``), if any.

    Args:
        patches: the recipe's ``deepspeed.patches``.
        hang_timeout_minutes: the recipe's ``train.hang_timeout_minutes``.

    Raises:
        ConnectionError: another rank died or hangs.
    """
    quieten_libraries()
    with _restored_environment():
        fill_environment(os.environ)
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = _claim_device(local_rank)
        if patches and device.type == "cpu":
            deepspeed_patches.skip_op_build(is_main=rank == 0)
        cpu_group = _join(rank, size, device)
        with restored_handlers(), _watched(rank, size, cpu_group, hang_timeout_minutes) as watchdog:
            yield World(rank, size, local_rank, device, cpu_group, watchdog)
    atexit.unregister(_leave)
    atexit.register(_leave)


def _join(rank: int, size: int, device: torch.device) -> dist.ProcessGroup | None:
    """Create torch's and DeepSpeed's process groups. Returns one for the CPU."""
    import deepspeed

    with _connecting(rank, size):
        if not dist.is_initialized():  # DeepSpeed keeps its process groups, so a second run in a process reuses them
            backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            # Port 0: the system chooses a free port, so that two runs that start together do not
            # collide.
            store = _meet(rank, size) if size > 1 else dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
            dist.init_process_group(
                backend, timeout=COLLECTIVE_TIMEOUT, device_id=device_id, store=store, rank=rank, world_size=size
            )
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT)
        return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if size > 1 else None


@contextmanager
def _connecting(rank: int, size: int) -> Iterator[None]:
    """Context in which the ranks connect to each other. It ends with one error if they cannot.

    If a rank fails, gloo and NCCL may wait for it forever in the others.
    """
    failed = f"rank {rank} of {size} on {socket.gethostname()} cannot connect to the other ranks"
    remedy = (
        "Check that every host reaches the others on all ports, and set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to "
        "the network interface that they share"
    )

    def end() -> None:
        try:
            print(f"error: {failed} within {LONGEST_JOIN / 60:.0f} minutes. {remedy}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    timer = threading.Timer(LONGEST_JOIN, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConnectionError(f"{failed} ({reason}). {remedy}") from error
    finally:
        timer.cancel()


def _meet(rank: int, size: int) -> dist.Store:
    """Wait for the other ranks, and return the store through which they exchange addresses.

    Raises:
        ConnectionError: they cannot be reached, or do not start within ``CONNECT_TIMEOUT``.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise ValueError(f"rank {rank} of {size}: MASTER_ADDR and MASTER_PORT are not set; start it with a launcher")
    where = f"MASTER_ADDR={host}, MASTER_PORT={port}"
    notice = threading.Timer(NOTICE_AFTER, lambda: print(f"rank {rank} waits for other ranks ({where}) …", flush=True))
    notice.daemon = True
    notice.start()
    try:
        socket.getaddrinfo(host, port)
        store, *_ = next(dist.rendezvous("env://", rank, size, timeout=CONNECT_TIMEOUT))
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConnectionError(
            f"rank {rank} of {size} cannot meet the other ranks ({where}): {reason}. Check that this is the host of "
            "rank 0, that the port is free there, and that all ranks were started"
        ) from error
    finally:
        notice.cancel()
    store.set_timeout(CONNECT_TIMEOUT)
    return dist.PrefixStore("sinklm", store)


@contextmanager
def _watched(
    rank: int, size: int, cpu_group: dist.ProcessGroup | None, hang_timeout_minutes: float | None
) -> Iterator[Watchdog]:
    """Context in which a watchdog runs. It learns why the context is left."""
    watchdog = Watchdog(
        rank,
        size,
        hang_timeout=None if hang_timeout_minutes is None else 60 * hang_timeout_minutes,
        exchange=lambda value: _gather(value, size, cpu_group),
        warn=lambda message: warnings.warn(message, RuntimeWarning, stacklevel=2),
    )
    failure = ""
    try:
        yield watchdog
    except (SameOnAllRanks, SystemExit):
        raise
    except BaseException as error:
        failure = str(error).splitlines()[0] if str(error) else "it was interrupted"
        if not isinstance(error, RuntimeError) or size == 1 or not _is_lost_contact(error):
            raise
        verdict, is_reported_here = watchdog.verdict()
        if not is_reported_here:
            raise SameOnAllRanks(verdict) from error
        raise ConnectionError(verdict or f"rank {rank} lost contact with another rank: {failure}. {RESUME}") from error
    finally:
        watchdog.close(failure)


def _gather(value: object, size: int, group: dist.ProcessGroup | None) -> list:
    if size == 1:
        return [value]
    values: list = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


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
        faulthandler.dump_traceback_later(EXIT_TIMEOUT, exit=True)  # another rank may have died by now
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
        # Jobs and steps on one host need different ports. Linux itself uses those from 32768 on.
        number = read_count(environment, "SLURM_JOB_ID") + 1009 * read_count(
            {"SLURM_STEP_ID": "0", **environment}, "SLURM_STEP_ID"
        )
        environment.setdefault("MASTER_PORT", str(10_000 + number % 20_000))
    else:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    check_ranks(environment)


def first_host(node_list: str) -> str:
    """Return the first host of a Slurm node list: ``gpu003`` for ``gpu[003-007,9],login``."""
    match = re.match(r"(?:[^\[\],]|\[[\w,-]+\])+", node_list)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {node_list!r}, which contains no host name: set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])


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
