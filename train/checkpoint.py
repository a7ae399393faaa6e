"""Writes checkpoints (their contents: `checkpoints.folders`). The manifest is written last."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from ..checkpoints.folders import (
    CHECKPOINTS_FOLDER,
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
from . import deepspeed_patches
from .disk import check_free_space, checkpoint_bytes
from .engine import deepspeed_config, optimizer_layout, parameter_groups
from .launch import World
from .memory import GIB
from .model_files import save_model
from .plan import Plan
from .rank_state import rank_path, rank_state
from .recipe import config_yaml
from .resume import interpolated_settings
from .schedule import is_pythia_step

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SLOW_DISK = 20e6  # bytes per second; a slower save counts as a hang


class CheckpointWriter:
    """Writes a run's checkpoints, and deletes the oldest once a newer one is complete.

    Args:
        run_dir: the run's folder.
        fingerprint: fingerprint of the data, which must be the same when the run resumes.
        tokenizer_path: the ``tokenizer.json`` to save with the weights.
    """

    def __init__(self, run_dir: Path, plan: Plan, world: World, *, fingerprint: str, tokenizer_path: Path):
        self.folder = run_dir / CHECKPOINTS_FOLDER
        self._run_dir, self._plan, self._world = run_dir, plan, world
        self._fingerprint, self._tokenizer_path = fingerprint, tokenizer_path
        self.num_bytes = checkpoint_bytes(plan, tokenizer_path)

    def save(self, engine: "DeepSpeedEngine", step: int) -> Path:
        """Save the state after ``step`` updates. Every rank calls it.

        Raises:
            SameOnAllRanks: a rank could not write. Older checkpoints are unchanged.
        """
        checkpoint = self.folder / f"step-{step}"
        with self._world.longer(self.num_bytes / SLOW_DISK, is_saving=True):
            self._save(engine, checkpoint, step)
        return checkpoint

    def _save(self, engine: "DeepSpeedEngine", checkpoint: Path, step: int) -> None:
        failed = f"cannot save {checkpoint} (earlier checkpoints are intact): "
        all_or_none = self._world.all_or_none
        self._world.mark("saving a checkpoint", step=step)
        with all_or_none(failed):
            if self._world.is_main:
                shutil.rmtree(checkpoint, ignore_errors=True)  # interrupted; complete ones are never saved again
                for name in (DEEPSPEED_FOLDER, RANDOM_STATES_FOLDER):
                    (checkpoint / name).mkdir(parents=True)
                check_free_space(checkpoint, self.num_bytes)
        with all_or_none(failed), _disk_errors(checkpoint):
            self._save_deepspeed(engine, checkpoint)
            torch.save(rank_state(engine), rank_path(checkpoint, self._world.rank))
        with all_or_none(failed), _disk_errors(checkpoint):
            save_model(engine, checkpoint / MODEL_FOLDER, self._plan, self._tokenizer_path, self._world)
            if self._world.is_main:
                self._save_description(checkpoint, step)
        with all_or_none(failed), _disk_errors(checkpoint):
            mine = describe_files(checkpoint, owned_files(checkpoint, self._world.rank, self._world.size))
        files = {name: info for described in self._world.gather(mine) for name, info in described.items()}
        with all_or_none(failed):
            if self._world.is_main:
                write_manifest(checkpoint, Manifest(step, files))
        with all_or_none(f"{checkpoint} is saved, but cannot delete older ones: "):
            if self._world.is_main:
                delete_checkpoints(self._unneeded())

    def _save_deepspeed(self, engine: "DeepSpeedEngine", checkpoint: Path) -> None:
        client_state: dict = {"universal_checkpoint_info": {}}  # required by `ds_to_universal`
        if self._plan.config.deepspeed.zero_stage == 0:
            # In the order of the numbers in the optimizer's `state_dict`.
            client_state["optimizer_parameter_names"] = [n for group in parameter_groups(engine.module) for n in group]
        config = engine.config
        engine.config = deepspeed_config(self._plan, is_saved=True)  # it is stored with the weights
        try:
            deepspeed_patches.save_on_all_ranks(
                engine, checkpoint, tag=DEEPSPEED_FOLDER, client_state=client_state, save_latest=False
            )
        finally:
            engine.config = config

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
            interpolated=interpolated_settings(config) or None,
        )
        (checkpoint / CONFIG_FILE).write_text(config_yaml(config), encoding="utf-8")
        (checkpoint / STATE_FILE).write_text(state.to_json(), encoding="utf-8")

    def _unneeded(self) -> list[Path]:
        """Return interrupted checkpoints, and those beyond ``checkpoint.keep``."""
        section = self._plan.config.checkpoint
        interrupted = interrupted_checkpoints(self._run_dir)
        if section.keep is None:
            return interrupted
        complete = list_checkpoints(self._run_dir)
        passing = [step for step in complete if not (section.pythia_steps and is_pythia_step(step))]
        return interrupted + [complete[step] for step in passing[: -section.keep]]


def delete_checkpoints(checkpoints: list[Path]) -> None:
    """Delete checkpoints. One whose deletion is interrupted counts as incomplete."""
    for checkpoint in checkpoints:
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
        free = shutil.disk_usage(folder).free / GIB
        raise OSError(f"writing failed with {free:.2f} GiB free on its disk ({error})") from error
