"""Checkpoints: what is in one, when one counts as complete, and how it is written.

::

    checkpoints/step-<N>/
        deepspeed/      weights, optimizer and counters, in DeepSpeed's own format
        rng/            the random states of every rank
        model/          the weights as a transformers folder (safetensors), for evaluation and export
        config.yaml     the resolved recipe
        state.json      step, data fingerprint; ranks, ZeRO stage, precision and order of the parameters
        COMPLETE        written last; without it the folder is never loaded
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from ..checkpoints.loading import COMPLETE_MARKER, MODEL_FOLDER
from . import deepspeed_patches
from .cost import GIB
from .engine import optimizer_layout, parameter_groups
from .launch import World
from .model_files import save_model
from .plan import Plan
from .rank_state import rank_path, rank_state
from .recipe import config_yaml
from .schedule import is_pythia_step

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

DEEPSPEED_FOLDER = "deepspeed"


class CheckpointState(BaseModel):
    """``state.json``. Of a checkpoint older than the key, ``optimizer_layout`` is None: it is not known."""

    format_version: Literal[1] = 1
    step: int
    positions: int
    data_fingerprint: str
    world_size: int
    zero_stage: int
    precision: str
    optimizer_layout: str | None = None


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """The run's complete checkpoints by their step, ascending."""
    found = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / COMPLETE_MARKER).exists()
    }
    return dict(sorted(found.items()))


def interrupted_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of checkpoints that were never completed."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if not (path / COMPLETE_MARKER).exists())


def read_state(checkpoint: Path) -> CheckpointState:
    """What ``state.json`` says.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    path = checkpoint / "state.json"
    try:
        return CheckpointState.model_validate_json(path.read_bytes())
    except ValidationError as error:
        if any(detail["loc"] == ("format_version",) for detail in error.errors()):
            reason = "has a format_version that this sinklm cannot read: use the version that wrote it"
            raise ValueError(f"{path} {reason}") from error
        raise ValueError(f"{path} is damaged: delete {checkpoint} to go on from an older one") from error


class CheckpointWriter:
    """Writes a run's checkpoints, and deletes the oldest once a newer one is complete.

    Args:
        run_dir: the run's folder.
        fingerprint: of the data, which a resumed run must match.
        tokenizer_path: a ``tokenizer.json`` that goes beside the weights.
    """

    def __init__(self, run_dir: Path, plan: Plan, world: World, *, fingerprint: str, tokenizer_path: Path):
        self.folder = run_dir / "checkpoints"
        self._run_dir, self._plan, self._world = run_dir, plan, world
        self._fingerprint, self._tokenizer_path = fingerprint, tokenizer_path

    def save(self, engine: "DeepSpeedEngine", step: int) -> Path:
        """Save the state after ``step`` updates. Every rank calls it.

        Raises:
            SameOnAllRanks: a rank could not write. Older checkpoints are as they were.
        """
        checkpoint = self.folder / f"step-{step}"
        failed = f"cannot save {checkpoint} (earlier checkpoints are intact): "
        together = self._world.together
        with together(failed):
            if self._world.is_main:
                shutil.rmtree(checkpoint, ignore_errors=True)  # an interrupted one; a complete one is not saved again
                for name in (DEEPSPEED_FOLDER, "rng"):
                    (checkpoint / name).mkdir(parents=True)
        with together(failed), _disk_errors(checkpoint):
            self._save_deepspeed(engine, checkpoint)
            torch.save(rank_state(engine), rank_path(checkpoint, self._world.rank))
        with together(failed), _disk_errors(checkpoint):
            save_model(engine, checkpoint / MODEL_FOLDER, self._plan, self._tokenizer_path, self._world)
            if self._world.is_main:
                self._save_description(checkpoint, step)
        with together(failed):
            if self._world.is_main:
                _flush(checkpoint)
                (checkpoint / COMPLETE_MARKER).touch()
                self._delete_old()
        return checkpoint

    def _save_deepspeed(self, engine: "DeepSpeedEngine", checkpoint: Path) -> None:
        client_state: dict = {"universal_checkpoint_info": {}}  # `ds_to_universal` wants it
        if self._plan.config.deepspeed.zero_stage == 0:
            # In the order in which the optimizer's `state_dict` numbers them.
            client_state["optimizer_parameter_names"] = [n for group in parameter_groups(engine.module) for n in group]
        deepspeed_patches.save_on_all_ranks(
            engine, checkpoint, tag=DEEPSPEED_FOLDER, client_state=client_state, save_latest=False
        )

    def _save_description(self, checkpoint: Path, step: int) -> None:
        config = self._plan.config
        state = CheckpointState(
            step=step,
            positions=step * config.train.batch_size_tokens,
            data_fingerprint=self._fingerprint,
            world_size=self._world.size,
            zero_stage=config.deepspeed.zero_stage,
            precision=config.train.precision,
            optimizer_layout=optimizer_layout(self._plan),
        )
        (checkpoint / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
        (checkpoint / "state.json").write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def _delete_old(self) -> None:
        section = self._plan.config.checkpoint
        if section.keep is None:
            return
        complete = list_checkpoints(self._run_dir)
        passing = [step for step in complete if not (section.pythia_steps and is_pythia_step(step))]
        for step in passing[: -section.keep]:
            (complete[step] / COMPLETE_MARKER).unlink()  # first, so that half of it is never taken for the whole
            shutil.rmtree(complete[step])


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Say in words what torch and safetensors say in codes when a file cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not re.search(r"inline_container|PytorchStreamWriter", str(error)):
            raise
        free = shutil.disk_usage(folder).free / GIB
        raise OSError(f"writing failed with {free:.2f} GiB free on its disk ({error})") from error


def _flush(folder: Path) -> None:
    """Have the system put every file of a folder on disk, so that the marker is never there before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
