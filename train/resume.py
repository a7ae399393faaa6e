"""Finds the checkpoint to resume from, checks that it matches the run, and loads it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from ..checkpoints.folders import (
    COMPLETE_MARKER,
    CONFIG_FILE,
    DEEPSPEED_FOLDER,
    STATE_FILE,
    CheckpointState,
    list_checkpoints,
    read_state,
)
from . import deepspeed_patches, universal
from .config import TrainingConfig
from .engine import optimizer_layout
from .launch import World, silent_stdout
from .plan import Plan
from .rank_state import rank_path, restore_rank_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Keys that must not change on resume: they define the model and the order of the data.
FIXED_KEYS = ("model", "train.seed", "train.seq_length", "train.batch_size_tokens", "data.weights")
FREE_MODEL_KEYS = ("model.max_position_embeddings",)  # positions are rotary: no weight depends on it
INIT_KEY = "model.init_from"  # may also change, except at step 0, where weights may be initialized again
# Paths, logging and similar keys; their changes are not reported.
SILENT_KEYS = ("data.path", "train.run_dir", "checkpoint", "wandb", "validation", "deepspeed", "train.micro_batch_size")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, compared with the run.

    Attributes:
        path: the checkpoint's folder.
        state: its ``state.json``.
        changes: settings that differ from the checkpoint's, as "key: old → new".
        mismatches: differences that prevent loading DeepSpeed's files directly; empty if none.
    """

    path: Path
    state: CheckpointState
    changes: list[str]
    mismatches: list[str]

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def is_converted(self) -> bool:
        """Whether `restore` converts the checkpoint; the engine then needs ``load_universal``."""
        return bool(self.mismatches) and self.step > 0

    def restore(self, engine: "DeepSpeedEngine", plan: Plan, world: World, *, scratch: Path) -> None:
        """Load the checkpoint into a new engine. Every rank calls it.

        Args:
            scratch: folder for a temporary converted copy.

        Raises:
            SameOnAllRanks: a file is damaged or cannot be read.
        """
        if self.mismatches and not self.is_converted:
            return  # at step 0 there is nothing to convert, and the engine already has these weights
        if self.is_converted:
            self._load_converted(engine, plan, world, scratch / f"{self.path.name}-universal")
        else:
            with world.all_or_none(), self._damage():
                _load_deepspeed(engine, self.path, DEEPSPEED_FOLDER)
        deepspeed_patches.restore_settings(engine, plan.config.optimizer, zero_stage=plan.config.deepspeed.zero_stage)
        if self.state.world_size == world.size:
            with world.all_or_none(), self._damage():
                restore_rank_state(engine, torch.load(rank_path(self.path, world.rank), weights_only=True))

    def _load_converted(self, engine: "DeepSpeedEngine", plan: Plan, world: World, folder: Path) -> None:
        """Load the checkpoint through a temporary converted copy in ``folder``."""
        with world.all_or_none():
            if world.is_main:
                universal.convert_to_universal(
                    self.path / DEEPSPEED_FOLDER,
                    folder,
                    zero_stage=self.state.zero_stage,
                    keep_loss_scale=self.state.precision == plan.config.train.precision,
                )
        with world.all_or_none(), self._damage():
            if plan.config.deepspeed.zero_stage == 0:
                universal.load_without_zero(engine, folder)
            else:
                _load_deepspeed(engine, folder.parent, folder.name)
        if world.is_main:
            shutil.rmtree(folder)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Raise any error in reading the checkpoint's files as an OSError that names the folder."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise OSError(
                f"cannot load {self.path} ({type(error).__name__}: {reason}): if it is damaged, delete it to resume "
                "from an older one"
            ) from error


def find_resume(plan: Plan, fingerprint: str) -> Resume | None:
    """Return the checkpoint that ``checkpoint.resume`` selects, or None to start from step 0.

    Raises:
        FileNotFoundError: the given folder is not a complete checkpoint.
        ValueError: the checkpoint belongs to another run (the message names the key that differs),
            or the run's folder contains other checkpoints.
    """
    config = plan.config
    run_dir = Path(config.train.run_dir or "")
    existing = list_checkpoints(run_dir)
    choice = config.checkpoint.resume
    if choice == "never":
        if existing:
            raise ValueError(
                f"{run_dir} already contains checkpoints up to step {max(existing)}: set checkpoint.resume=auto to "
                "resume from there, or set another train.run_dir"
            )
        return None
    if choice == "auto":
        if not existing:
            return None
        path = existing[max(existing)]
    else:
        path = _named_checkpoint(Path(choice))
    state = read_state(path)
    if choice != "auto" and existing and max(existing) > state.step:
        raise ValueError(
            f"{run_dir} contains a checkpoint at step {max(existing)}, which is later than the one to resume from "
            f"(step {state.step}): delete it, or set another train.run_dir"
        )
    return Resume(path, state, _compare(path, state, config, fingerprint), _mismatches(state, plan))


def _load_deepspeed(engine: "DeepSpeedEngine", folder: Path, tag: str) -> None:
    with silent_stdout():
        path, _ = engine.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise OSError(f"DeepSpeed found no checkpoint in {folder / tag}")


def _named_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint.resume={path}: no such folder (use a folder, auto or never)")
    if existing := list_checkpoints(path):  # a run's folder
        return existing[max(existing)]
    if not (path / STATE_FILE).exists() and not path.name.startswith("step-"):
        raise FileNotFoundError(f"checkpoint.resume={path}: not a checkpoint, it has no {STATE_FILE}")
    if not (path / COMPLETE_MARKER).exists():
        raise FileNotFoundError(
            f"checkpoint.resume={path}: interrupted checkpoint (it has no {COMPLETE_MARKER} file); use an older one"
        )
    return path


def _compare(path: Path, state: CheckpointState, config: TrainingConfig, fingerprint: str) -> list[str]:
    """Return the changed settings. Raises a ValueError for a setting that must not change."""
    if state.data_fingerprint != fingerprint:
        raise ValueError(
            f"data.path {config.data.path} contains different data than {path} was trained on (fingerprint "
            f"{fingerprint[:12]} instead of {state.data_fingerprint[:12]}): set data.path to the original store, or "
            "start a new run with another train.run_dir"
        )
    then = flatten(OmegaConf.to_container(OmegaConf.load(path / CONFIG_FILE)))
    now = flatten(config.model_dump())
    for settings in (then, now):
        _resolve(settings)
    changes = []
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if before == after:
            continue
        is_free = key in FREE_MODEL_KEYS or (key == INIT_KEY and state.step > 0)
        if _is_in(key, FIXED_KEYS) and not is_free:
            raise ValueError(
                f"{key} is {after!r}, but {path} was trained with {before!r}: restore that value, or start a new run "
                "with another train.run_dir"
            )
        if not _is_in(key, SILENT_KEYS):
            changes.append(f"{key}: {before} → {after}")
    return changes


def _mismatches(state: CheckpointState, plan: Plan) -> list[str]:
    """Return the differences to this run that DeepSpeed's files depend on."""
    compared = {
        "ranks": (state.world_size, plan.world_size),
        "ZeRO stage": (state.zero_stage, plan.config.deepspeed.zero_stage),
        "precision": (state.precision, plan.config.train.precision),
    }
    found = [f"{what} {before} → {now}" for what, (before, now) in compared.items() if before != now]
    return found if state.optimizer_layout == optimizer_layout(plan) else [*found, "parameter order"]


def _resolve(settings: dict[str, Any]) -> None:
    """Replace implicit values by explicit ones, so that equivalent settings compare equal."""
    settings["model.max_position_embeddings"] = (
        settings.get("model.max_position_embeddings") or settings["train.seq_length"]
    )
    if settings["model.sink.kind"] != "token":
        settings["model.sink.num_tokens"] = 1


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted keys."""
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def _is_in(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
