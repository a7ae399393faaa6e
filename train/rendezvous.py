"""The environment variables of ranks: their values, and whether rank 0 can be reached."""

import socket
import time
from collections.abc import Mapping

JOIN_SECONDS = 300.0  # rank 0 may start this long after the others
RETRY_SECONDS = 1.0


def read_count(environment: Mapping[str, str], name: str, *, at_least: int = 0) -> int:
    """Return a variable as a number.

    Raises:
        ValueError: it is not set, or not a whole number of at least ``at_least``.
    """
    text = environment.get(name)
    if text is None:
        raise ValueError(f"{name} is not set, but other variables of a launcher are: {REMEDY}")
    if not (text.isascii() and text.strip().isdecimal() and int(text) >= at_least):
        raise ValueError(f"{name} is {text!r}: it must be a whole number of at least {at_least}; {REMEDY}")
    return int(text)


REMEDY = "start the run with deepspeed, torchrun or srun, or unset the variables for a single process"


def own_rank(environment: Mapping[str, str]) -> int:
    """Return the rank of this process before it has joined the others; 0 without a launcher."""
    name = next((name for name in ("RANK", "SLURM_PROCID") if name in environment), None)
    return 0 if name is None else read_count(environment, name)


def check_ranks(environment: Mapping[str, str]) -> None:
    """Check RANK, WORLD_SIZE and the variables that belong to them.

    Raises:
        ValueError: a variable is not a number, or they contradict each other.
    """
    size = read_count(environment, "WORLD_SIZE", at_least=1)
    rank, local_rank = read_count(environment, "RANK"), read_count(environment, "LOCAL_RANK")
    if rank >= size:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {size}: ranks count from 0 to {size - 1}; {REMEDY}")
    if local_rank > rank:
        raise ValueError(f"LOCAL_RANK is {local_rank}, but RANK is {rank}: a rank has at most its own number; {REMEDY}")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if environment.get(name):
            read_count(environment, name, at_least=1)


def await_rank_0(environment: Mapping[str, str]) -> None:
    """Wait until rank 0 listens at MASTER_ADDR:MASTER_PORT; on rank 0, check that the port is free.

    Waits at most `JOIN_SECONDS`. A single process needs no address.

    Raises:
        ValueError: the address or the port is not set or wrong, or the port is in use.
        ConnectionError: rank 0 cannot be reached.
    """
    if read_count(environment, "WORLD_SIZE") == 1:
        return
    host, port = environment.get("MASTER_ADDR", ""), read_count(environment, "MASTER_PORT", at_least=1)
    if not host or port > 65_535:
        wrong = f"MASTER_PORT is {port}" if host else "MASTER_ADDR is not set"
        raise ValueError(f"{wrong}: set both to an address of rank 0's machine and a free port from 1 to 65535 on it")
    rank = read_count(environment, "RANK")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun listens itself, and has checked the address
    if rank == 0:
        _check_free(port)
    _connect(rank, host, port)


def _check_free(port: int) -> None:
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as error:
        raise ValueError(f"rank 0 cannot listen at MASTER_PORT={port} ({error.strerror}): set another port") from error


def _connect(rank: int, host: str, port: int) -> None:
    """Connect to rank 0; on rank 0 itself, which does not listen yet, only resolve the name."""
    deadline, has_said = time.monotonic() + JOIN_SECONDS, False
    while True:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            if rank == 0:
                return
            left = max(RETRY_SECONDS, deadline - time.monotonic())
            with socket.create_connection(addresses[0][4][:2], timeout=left):
                return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                reason = getattr(error, "strerror", None) or str(error)
                raise ConnectionError(
                    f"rank {rank} cannot reach rank 0 at MASTER_ADDR={host} MASTER_PORT={port} within "
                    f"{JOIN_SECONDS:.0f} s ({reason}): check the address, the firewall, and the output of rank 0"
                ) from error
            if not has_said:
                print(f"rank {rank} waits up to {JOIN_SECONDS:.0f} s for rank 0 at {host}:{port} …", flush=True)
                has_said = True
            time.sleep(RETRY_SECONDS)
