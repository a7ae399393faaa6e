"""What the ranks of a run share: the host, settings, data and run folder of each are compared."""

import hashlib
import importlib.metadata
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from .config import TrainingConfig
from .launch import SameOnAllRanks, World
from .resume import flatten

MAY_DIFFER = ("data.path", "train.run_dir")  # paths; what is there is compared
COMPARED_PACKAGES = ("sinklm", "torch", "transformers", "deepspeed")
APPEARS_WITHIN = 20.0  # seconds until a new file is seen on other hosts (NFS caches folders)


def describe_ranks(hosts: list[str]) -> str:
    """Return where the ranks run: "ranks: 0–7 on gpu001, 8–15 on gpu002".

    Args:
        hosts: host of each rank.
    """
    parts = [
        f"{_ranges([rank for rank, h in enumerate(hosts) if h == host])} on {host}" for host in dict.fromkeys(hosts)
    ]
    return f"ranks: {', '.join(parts)}"


def say_ranks(world: World) -> None:
    """Print the hosts if there are several ranks. Every rank calls it."""
    hosts = world.gather(socket.gethostname())
    if world.is_main and world.size > 1:
        print(describe_ranks(hosts), flush=True)


def check_same(world: World, values: dict[str, Any], remedy: str) -> None:
    """Check that the values are the same on all ranks. Every rank calls it.

    Args:
        values: by the name under which the error gives them.
        remedy: the end of the error.

    Raises:
        SameOnAllRanks: names the first rank and value that differ from those of rank 0.
    """
    main = world.gather(values if world.is_main else None)[0]
    error = ""
    for name in sorted(main.keys() | values.keys()):
        if (own := values.get(name)) != (expected := main.get(name)):
            error = f"{name} is {own!r} on {socket.gethostname()}, but {expected!r} on rank 0: {remedy}"
            break
    _raise_first(error, world)


def check_settings(config: TrainingConfig, world: World) -> None:
    """Check that all ranks have the same recipe, overrides and versions of the libraries."""
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in COMPARED_PACKAGES}
    settings = {key: value for key, value in flatten(config.model_dump()).items() if key not in MAY_DIFFER}
    check_same(world, settings | versions, "start all ranks with the same command, recipe and environment")


def check_shared(run_dir: Path, world: World) -> None:
    """Check that all ranks see the run's folder of rank 0, which exists. Every rank calls it.

    Raises:
        SameOnAllRanks: a rank does not.
    """
    name = world.gather(f".shared-{secrets.token_hex(8)}")[0]
    path = run_dir / name
    with world.all_or_none(f"cannot write to {run_dir}: "):
        if world.is_main:
            path.touch()
    error = ""
    if not _appears(path):
        error = (
            f"{run_dir.absolute()} on {socket.gethostname()} is not the folder that rank 0 uses: set train.run_dir to "
            "a folder on a file system that all hosts share"
        )
    try:
        _raise_first(error, world)
    finally:
        if world.is_main:
            path.unlink()


def _raise_first(error: str, world: World) -> None:
    """Raise the error of the first rank that has one, on all ranks."""
    errors = world.gather(error)
    ranks = [rank for rank, text in enumerate(errors) if text]
    if ranks:
        others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        raise SameOnAllRanks(f"rank {ranks[0]}{others}: {errors[ranks[0]]}")


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + APPEARS_WITHIN
    while not os.path.exists(path):  # False without permission, too
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def has_other_copy(folder: Path, world: World) -> bool:
    """Whether this is the first rank of a host whose files are not those that rank 0 sees.

    Every rank calls it. Files of a shared file system have the same inode number and change time on
    all hosts. Hidden files are ignored.
    """
    found = sorted((entry.name, entry.stat()) for entry in os.scandir(folder) if entry.is_file())
    files = repr([(name, stat.st_ino, stat.st_ctime_ns) for name, stat in found if name[0] != "."])
    own = socket.gethostname(), hashlib.sha256(files.encode()).hexdigest()
    copies = world.gather(own)
    return own[1] != copies[0][1] and copies.index(own) == world.rank


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers as "0–3, 8"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(
        str(first) if first == last else f"{first}–{last}" for first, last in zip(starts, ends, strict=True)
    )
