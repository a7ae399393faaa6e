"""The environment variables of ranks, as launchers set them, and their values."""

from collections.abc import Mapping

REMEDY = "start the run with deepspeed, torchrun or srun, or unset the variables for a single process"


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


def own_rank(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return rank and local rank of this process before it has joined the others.

    Both are 0 without a launcher.
    """
    found = []
    for names in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
        name = next((name for name in names if name in environment), None)
        found.append(0 if name is None else read_count(environment, name))
    return found[0], found[1]


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
        raise ValueError(f"LOCAL_RANK is {local_rank}, but RANK is {rank}: it cannot be larger; {REMEDY}")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if environment.get(name):
            read_count(environment, name, at_least=1)
    if size > 1 and "MASTER_PORT" in environment and read_count(environment, "MASTER_PORT", at_least=1) > 65_535:
        raise ValueError(f"MASTER_PORT is {environment['MASTER_PORT']}: set a port from 1 to 65535")
