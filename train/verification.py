"""Verifies checkpoints before anything in them is read, and sets damaged ones aside.

All ranks call these functions and reach the same decision. Checkpoints are on a file system that
all ranks share.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..checkpoints.folders import (
    DAMAGED,
    CheckpointState,
    DamagedCheckpointError,
    damaged_checkpoints,
    list_checkpoints,
    read_state,
    step_of,
)
from ..checkpoints.manifest import Manifest, find_damage, owner, read_manifest, unexpected_files
from ..files import sync_folder
from .launch import World

TRUST_OPTION = "--trust-checkpoint"
Value = TypeVar("Value")


def newest_intact(run_dir: Path, world: World, *, is_trusted: bool) -> tuple[Path, CheckpointState] | None:
    """Return the newest checkpoint of a run whose files are as they were written, and its state.

    Newer ones are damaged. They are renamed to ``step-<N>.damaged``, and rank 0 prints what is
    wrong with them.

    Returns:
        None if the run has no complete checkpoint yet.

    Raises:
        SameOnAllRanks: all checkpoints are damaged, the newest that is not has no checksums, or a
            file cannot be read.
    """
    existing, aside = _on_main(world, lambda: (list_checkpoints(run_dir), damaged_checkpoints(run_dir)))
    for path in reversed(existing.values()):
        try:
            state = verified_state(path, world, is_trusted=is_trusted)
        except DamagedCheckpointError as error:
            aside.append(_on_main(world, partial(set_aside, path)))
            if world.is_main:
                print(f"warning: {error}; it is now {aside[-1].name}", flush=True)
        else:
            return path, state
    if aside:
        with world.all_or_none():
            raise ValueError(
                f"{run_dir} has no intact checkpoint to resume from, only {', '.join(map(str, aside))}: restore one "
                "from a copy, or set checkpoint.resume=never to start from step 0"
            )
    return None


def verified_state(path: Path, world: World, *, is_trusted: bool) -> CheckpointState:
    """Return ``state.json`` of a checkpoint after its files were compared with its manifest.

    Each rank reads the files that it would load.

    Args:
        is_trusted: whether to accept a checkpoint without a manifest.

    Raises:
        DamagedCheckpointError: on all ranks.
        SameOnAllRanks: the checkpoint has no manifest and is not trusted, or cannot be read.
    """
    manifest, damage = _on_main(world, lambda: _read_manifest(path))
    if manifest is not None:
        if world.is_main:
            print(f"verifying the checksums of {path} …", flush=True)
        found: list[str] = []
        with world.all_or_none():
            mine = {name: info for name, info in manifest.files.items() if owner(name, world.size) == world.rank}
            found = find_damage(path, mine)
        damage += sorted(line for lines in world.gather(found) for line in lines)
    state = None
    if not damage:
        state, damage = _on_main(world, lambda: _read_state(path, manifest))
    if state is None:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise DamagedCheckpointError(path, damage[0] + more)
    if manifest is None and not is_trusted:
        with world.all_or_none():
            raise ValueError(
                f"{path} has no checksums (older versions wrote none), so damage to it would go unnoticed: repeat the "
                f"command with {TRUST_OPTION} to resume from it nevertheless"
            )
    return state


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not used, and return its new path."""
    number, renamed = 1, path.with_name(path.name + DAMAGED)
    while renamed.exists():
        number += 1
        renamed = path.with_name(f"{path.name}{DAMAGED}-{number}")
    os.rename(path, renamed)
    sync_folder(path.parent)
    return renamed


def _read_manifest(path: Path) -> tuple[Manifest | None, list[str]]:
    """Return the manifest, or None and what is wrong with it. Old checkpoints have none."""
    try:
        manifest = read_manifest(path)
    except DamagedCheckpointError as error:
        return None, [error.reason]
    return manifest, unexpected_files(path, manifest) if manifest else []


def _read_state(path: Path, manifest: Manifest | None) -> tuple[CheckpointState | None, list[str]]:
    """Return the state, or None and what is wrong with it."""
    try:
        state = read_state(path)
    except DamagedCheckpointError as error:
        return None, [error.reason]
    steps = {"state.json": state.step}
    if manifest is not None:
        steps["COMPLETE"] = manifest.step
    if (named := step_of(path)) is not None:
        steps["its name"] = named
    if len(set(steps.values())) > 1:
        return None, ["it has different steps in " + ", ".join(f"{where} ({step})" for where, step in steps.items())]
    return state, []


def _on_main(world: World, function: Callable[[], Value]) -> Value:
    """Return the result of a function that only rank 0 calls. If it fails, all ranks fail."""
    result = None
    with world.all_or_none():
        if world.is_main:
            result = function()
    return world.gather(result)[0]
