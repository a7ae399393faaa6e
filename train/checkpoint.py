"""Writes a checkpoint's files (`checkpoints.folders`). The manifest is written last."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoints.folders import (
    COMPLETE_MARKER,
    CONFIG_FILE,
    DEEPSPEED_FOLDER,
    MODEL_FOLDER,
    RANDOM_STATES_FOLDER,
    STATE_FILE,
    CheckpointState,
    interrupted_checkpoints,
    list_checkpoints,
)
from ..checkpoints.manifest import Manifest, describe_files, owned_files, write_manifest
from ..files import sync_folder
from .config import CheckpointSection
from .disk import check_free_space
from .launch import World
from .memory import size_text
from .model_files import write_model
from .plan import Plan
from .recipe import config_yaml
from .schedule import is_pythia_step


@dataclass(frozen=True)
class Snapshot:
    """The state of a rank after a step, in host memory.

    Attributes:
        path: the checkpoint's folder.
        state: its ``state.json``.
        files: the path of each file that this rank writes with ``torch.save``, and its content.
        weights: all weights of the model; empty except on rank 0.
    """

    path: Path
    state: CheckpointState
    files: list[tuple[Path, Any]]
    weights: dict[str, torch.Tensor]

    @property
    def failed(self) -> str:
        """Start of the message of an error in writing it."""
        return f"cannot save {self.path} (earlier checkpoints are intact): "


def make_folders(path: Path, num_bytes: int) -> None:
    """Make the folders of a checkpoint, in place of an interrupted one.

    Raises:
        OSError: the disk has less than ``num_bytes`` left, or cannot be written.
    """
    shutil.rmtree(path, ignore_errors=True)  # complete ones are never saved again
    for name in (DEEPSPEED_FOLDER, RANDOM_STATES_FOLDER):
        (path / name).mkdir(parents=True)
    check_free_space(path, num_bytes)


def write_snapshot(snapshot: Snapshot, plan: Plan, tokenizer_path: Path, world: World) -> None:
    """Write a checkpoint, then delete those that it replaces. Every rank calls it, in any thread.

    Args:
        tokenizer_path: the ``tokenizer.json`` to save with the weights.

    Raises:
        SameOnAllRanks: a rank could not write. Older checkpoints are unchanged.
    """
    path, failed = snapshot.path, snapshot.failed
    with world.all_or_none(failed), _disk_errors(path):
        for file, content in snapshot.files:
            torch.save(content, file)
        if world.is_main:
            write_model(path / MODEL_FOLDER, snapshot.weights, plan, tokenizer_path)
            (path / CONFIG_FILE).write_text(config_yaml(plan.config), encoding="utf-8")
            (path / STATE_FILE).write_text(snapshot.state.to_json(), encoding="utf-8")
    with world.all_or_none(failed), _disk_errors(path):
        mine = describe_files(path, owned_files(path, world.rank, world.size))
    files = {name: info for described in world.gather(mine) for name, info in described.items()}
    with world.all_or_none(failed):
        if world.is_main:
            write_manifest(path, Manifest(snapshot.state.step, files))
    with world.all_or_none(f"{path} is saved, but cannot delete older ones: "):
        if world.is_main:
            delete_checkpoints(unneeded_checkpoints(path.parent.parent, plan.config.checkpoint))


def unneeded_checkpoints(run_dir: Path, section: CheckpointSection) -> list[Path]:
    """Return the interrupted checkpoints of a run, and those beyond ``checkpoint.keep``."""
    interrupted = interrupted_checkpoints(run_dir)
    if section.keep is None:
        return interrupted
    complete = list_checkpoints(run_dir)
    passing = [step for step in complete if not (section.pythia_steps and is_pythia_step(step))]
    return interrupted + [complete[step] for step in passing[: -section.keep]]


def delete_checkpoints(checkpoints: list[Path]) -> None:
    """Delete checkpoints. One whose deletion is interrupted counts as incomplete.

    Of a link, only the link is deleted.
    """
    for checkpoint in checkpoints:
        if checkpoint.is_symlink():
            checkpoint.unlink()
            continue
        (checkpoint / COMPLETE_MARKER).unlink(missing_ok=True)
        sync_folder(checkpoint)
        shutil.rmtree(checkpoint)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Convert the write errors of torch and safetensors to readable OSErrors."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not re.search(r"inline_container|PytorchStreamWriter", str(error)):
            raise
        free = size_text(shutil.disk_usage(folder).free)
        raise OSError(f"writing failed with {free} free on its disk ({error})") from error
