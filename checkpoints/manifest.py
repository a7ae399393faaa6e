"""The file ``COMPLETE`` of a checkpoint: a manifest with the size and sha256 of every file.

sha256 because it is in Python's standard library, and processors have instructions for it: 1.8 GB/s
on one core, more than torch writes. It finds damage, not an attacker, who can write a new manifest;
`train.unpickling` limits what a file can do.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import partial_name, sync_file, sync_folder, write_text
from ..parsing import parse_json
from .folders import (
    COMPLETE_MARKER,
    DEEPSPEED_FOLDER,
    FORMAT_VERSION,
    RANDOM_STATES_FOLDER,
    DamagedCheckpointError,
    damage_reason,
    has_manifest,
)

ALGORITHM = "sha256"
MAX_THREADS = 8
OWNER = re.compile(r"(?:zero_pp_rank_|rank-)(\d+)")
CLOSED_FOLDERS = (DEEPSPEED_FOLDER, RANDOM_STATES_FOLDER)  # readers find files here by pattern


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes, if it is known, and hexadecimal sha256 of a file."""

    bytes: int | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint, and its files by path relative to the checkpoint."""

    step: int
    files: dict[str, FileInfo]

    def to_json(self) -> str:
        """Return JSON whose key ``manifest_sha256`` covers the other keys."""
        files = {name: asdict(info) for name, info in sorted(self.files.items())}
        values = {"format_version": FORMAT_VERSION, "algorithm": ALGORITHM, "step": self.step, "files": files}
        return json.dumps({**values, "manifest_sha256": _digest(values)}, indent=2) + "\n"


def owned_files(checkpoint: Path, rank: int, world_size: int) -> list[str]:
    """Return the files of a checkpoint that a rank wrote, as their names state.

    Rank 0 owns the files that are not of one rank. All lists together contain each file once, with
    any number of ranks.
    """
    names = _file_names(checkpoint, checkpoint)
    owned = [name for name in names if owner(name, world_size) == rank]
    return sorted(name for name in owned if name not in (COMPLETE_MARKER, partial_name(COMPLETE_MARKER)))


def owner(name: str, world_size: int) -> int:
    """Return the rank that writes a file, or reads it if the number of ranks is another now."""
    match = OWNER.search(name)
    return int(match[1]) % world_size if match else 0


def describe_files(checkpoint: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    """Sync finished files to disk and return their sizes and hashes. Any thread may call it.

    Files are hashed in threads, from the page cache, while others are written to disk.

    Raises:
        OSError: a file cannot be read or written.
    """
    names = list(names)
    with ThreadPoolExecutor(num_threads()) as hashing, ThreadPoolExecutor(num_threads()) as syncing:
        synced = syncing.map(lambda name: sync_file(checkpoint / name), names)
        infos = list(hashing.map(lambda name: describe_file(checkpoint / name), names))
        list(synced)  # raises their errors
    return dict(zip(names, infos, strict=True))


def describe_file(path: Path) -> FileInfo:
    """Return the size and sha256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, ALGORITHM)
        return FileInfo(bytes=file.tell(), sha256=digest.hexdigest())


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write ``COMPLETE``, after which the checkpoint is complete, also after a loss of power.

    Args:
        manifest: contains the files of all ranks, which are on disk.
    """
    for folder in [path for path in checkpoint.rglob("*") if path.is_dir()]:
        sync_folder(folder)
    sync_folder(checkpoint)
    write_text(checkpoint / COMPLETE_MARKER, manifest.to_json())
    sync_folder(checkpoint)
    sync_folder(checkpoint.parent)


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Read ``COMPLETE``, or return None if the checkpoint is from before there were manifests.

    Raises:
        DamagedCheckpointError: the file is damaged.
        ValueError: a later version of sinklm wrote it.
    """
    path = checkpoint / COMPLETE_MARKER
    try:
        content = path.read_bytes()
    except OSError as error:
        if (reason := damage_reason(error)) is None:
            raise
        raise DamagedCheckpointError(checkpoint, f"{COMPLETE_MARKER} {reason}") from error
    if not content and not has_manifest(checkpoint):
        return None
    try:
        values = parse_json(content)
        is_intact = values.pop("manifest_sha256") == _digest(values)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(checkpoint, f"{COMPLETE_MARKER} is damaged") from error
    if not is_intact:
        raise DamagedCheckpointError(checkpoint, f"{COMPLETE_MARKER} is damaged")
    if values["format_version"] != FORMAT_VERSION or values["algorithm"] != ALGORITHM:
        raise ValueError(
            f"{path} has format_version {values['format_version']!r} and {values['algorithm']!r}, this sinklm reads "
            f"{FORMAT_VERSION} and {ALGORITHM}: use the version of sinklm that wrote it"
        )
    return Manifest(values["step"], {name: FileInfo(**info) for name, info in values["files"].items()})


def find_damage(folder: Path, files: dict[str, FileInfo]) -> list[str]:
    """Compare files with their sizes and hashes. Returns what is wrong, sorted by file.

    Raises:
        OSError: a file cannot be read for a reason other than damage, such as permissions.
    """
    with ThreadPoolExecutor(num_threads()) as pool:
        found = pool.map(lambda item: _damage_of(folder / item[0], *item), sorted(files.items()))
        return [damage for damage in found if damage]


def unexpected_files(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with files that the manifest lacks, where readers could find them."""
    names = (name for folder in CLOSED_FOLDERS for name in sorted(_file_names(checkpoint, checkpoint / folder)))
    return [f"{name} is not in {COMPLETE_MARKER}" for name in names if name not in manifest.files]


def num_threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _file_names(checkpoint: Path, folder: Path) -> list[str]:
    """Return the files below a folder, without hidden ones, which some file systems add."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [path.relative_to(checkpoint).as_posix() for path in files]


def _damage_of(path: Path, name: str, expected: FileInfo) -> str | None:
    try:
        size = path.stat().st_size
        if expected.bytes not in (size, None):
            return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
        found = describe_file(path)
    except OSError as error:
        if (reason := damage_reason(error)) is None:
            raise
        return f"{name} {reason}"
    return None if found.sha256 == expected.sha256 else f"{name} has another {ALGORITHM} than when it was written"


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
