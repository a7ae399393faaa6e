"""Finds the checkpoint to resume from, checks that it matches the run, and loads it."""

import glob
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
    DamagedCheckpointError,
    list_checkpoints,
    read_state,
)
from ..checkpoints.manifest import owned_files
from . import deepspeed_patches, universal
from .config import TrainingConfig, weights_precision
from .engine import group_names, optimizer_layout
from .launch import World, silent_stdout
from .plan import Plan
from .rank_state import rank_path, restore_rank_state, restore_window
from .recipe import parse_recipe, saved_values, value_digest
from .unpickling import refused_names, restricted_unpickling
from .verification import TRUST_OPTION, newest_intact, verified_state
from .windows import layer_kinds

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Keys that must not change on resume: they define the model, the order of the data and the
# optimizer's state.
FIXED_KEYS = (
    *("model", "train.seed", "train.seq_length", "train.batch_size_tokens", "train.only_sinks"),
    *("data.weights", "optimizer.name"),
)
FREE_MODEL_KEYS = ("model.max_position_embeddings",)  # positions are rotary: no weight depends on it
INIT_KEY = "model.init_from"  # may also change, except at step 0, where weights may be initialized again
# Paths, logging and similar keys; their changes are not reported.
SILENT_KEYS = ("data.path", "train.run_dir", "checkpoint", "wandb", "validation", "deepspeed", "train.micro_batch_size")
# Settings that change no step, or are compared in another way: a finished run may have others.
UNUSED_WHEN_DONE = ("train.num_steps:", "train.max_minutes:", "train.hang_timeout_minutes:")
CONVERTED = "-universal"  # suffix of a temporary converted copy


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, compared with the run.

    Attributes:
        path: the checkpoint's folder.
        state: its ``state.json``.
        changes: settings that differ from the checkpoint's, as "key: old → new".
        mismatches: differences that prevent loading DeepSpeed's files directly; empty if none.
        is_trusted: whether to read pickles that could run code.
    """

    path: Path
    state: CheckpointState
    changes: list[str]
    mismatches: list[str]
    is_trusted: bool = False

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def is_converted(self) -> bool:
        """Whether `restore` converts the checkpoint; the engine then needs ``load_universal``."""
        return bool(self.mismatches) and self.step > 0

    @property
    def needs_initial_weights(self) -> bool:
        """Whether the run begins with its initial weights: a step 0 that has nothing to convert."""
        return bool(self.mismatches) and not self.is_converted

    def restore(self, engine: "DeepSpeedEngine", plan: Plan, world: World, *, scratch: Path) -> None:
        """Load the checkpoint into a new engine. Every rank calls it.

        Args:
            scratch: folder for a temporary converted copy.

        Raises:
            SameOnAllRanks: a file cannot be read, or contains code and is not trusted.
        """
        if self.needs_initial_weights:
            return
        if world.is_main:
            for leftover in scratch.glob(f"step-*{CONVERTED}"):  # of a conversion that was killed
                shutil.rmtree(leftover)
        with world.all_or_none():
            if not self.is_trusted:
                self._refuse_code(world)
        with restricted_unpickling(is_trusted=self.is_trusted):
            if self.is_converted:
                self._load_converted(engine, plan, world, scratch / f"{self.path.name}{CONVERTED}")
            else:
                with world.all_or_none(), self._damage():
                    _load_deepspeed(engine, self.path, DEEPSPEED_FOLDER)
        deepspeed_patches.restore_settings(engine, plan.config.optimizer, zero_stage=plan.config.deepspeed.zero_stage)
        is_same = self.state.world_size == world.size
        with world.all_or_none(), self._damage():
            path = rank_path(self.path, world.rank if is_same else 0)
            state = torch.load(path, weights_only=not self.is_trusted)
            (restore_rank_state if is_same else restore_window)(engine, state)

    def _load_converted(self, engine: "DeepSpeedEngine", plan: Plan, world: World, folder: Path) -> None:
        """Load the checkpoint through a temporary converted copy in ``folder``."""
        with world.all_or_none():
            if world.is_main:
                universal.convert_to_universal(
                    self.path / DEEPSPEED_FOLDER,
                    folder,
                    zero_stage=self.state.zero_stage,
                    keep_loss_scale=weights_precision(self.state.precision)
                    == weights_precision(plan.config.train.precision),
                    muon=group_names(plan)[0] if plan.config.optimizer.name == "muon" else [],
                )
        with world.all_or_none(), self._damage():
            if plan.config.deepspeed.zero_stage == 0:
                universal.load_without_zero(engine, folder)
            else:
                _load_deepspeed(engine, folder.parent, folder.name)
        if world.is_main:
            shutil.rmtree(folder)

    def _refuse_code(self, world: World) -> None:
        """Raise a ValueError if a file would not be read, on all ranks before one of them loads."""
        for name in owned_files(self.path, world.rank, world.size):
            if refused := refused_names(self.path / name) if name.endswith(".pt") else ():
                raise ValueError(
                    f"{self.path / name} contains {refused[0]}, which could run code and is in no file that sinklm "
                    f"writes: if you trust the checkpoint, repeat the command with {TRUST_OPTION}"
                )

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
                f"cannot load {self.path} ({type(error).__name__}: {reason}): move it to another folder to resume "
                "from an older one"
            ) from error


def find_resume(plan: Plan, fingerprint: str, world: World, *, is_trusted: bool = False) -> Resume | None:
    """Return the checkpoint that ``checkpoint.resume`` selects, or None to start from step 0.

    Its files were compared with their checksums. Every rank calls this function.

    Args:
        is_trusted: whether to accept a checkpoint without checksums, and pickles that could run
            code.

    Raises:
        SameOnAllRanks: the given folder is not an intact checkpoint, no checkpoint of the run is
            intact, the checkpoint belongs to another run (the message names the key that differs),
            or the run's folder contains other checkpoints.
    """
    config = plan.config
    run_dir = Path(config.train.run_dir or "")
    choice = config.checkpoint.resume
    with world.all_or_none():
        named = _named_checkpoint(choice, run_dir)
    if choice == "never":
        return None
    if named is None:
        found = newest_intact(run_dir, world, is_trusted=is_trusted)
    else:
        with world.all_or_none():
            found = named, verified_state(named, world, is_trusted=is_trusted)
    if found is None:
        return None
    path, state = found
    with world.all_or_none():
        _refuse_earlier(state.step, run_dir)
        changes = _compare(path, state, config, fingerprint)
        return Resume(path, state, changes, _mismatches(state, plan), is_trusted)


def check_run_dir(run_dir: Path) -> None:
    """Check the name and the content of a run's folder.

    Raises:
        ValueError: DeepSpeed could not read checkpoints there, because it takes paths for patterns;
            or it is the folder of a model, which would be read in place of the run's.
    """
    _check_path("train.run_dir", run_dir)
    if (run_dir / "config.json").exists():
        raise ValueError(
            f"train.run_dir={run_dir} is the folder of a model (it has a config.json): set another train.run_dir"
        )


def _check_path(key: str, path: Path) -> None:
    if glob.has_magic(str(path.absolute())):
        raise ValueError(
            f"{key}={path} has one of the characters * ? [ in its absolute path, where DeepSpeed cannot read a "
            "checkpoint: rename the folder, or choose another"
        )


def preview_resume(config: TrainingConfig, fingerprint: str | None) -> tuple[Path, list[str]] | None:
    """Return the checkpoint from which a run would resume and the changed settings, or None.

    Its files are not verified.

    Args:
        fingerprint: of the data; None: unknown.

    Raises:
        ValueError, FileNotFoundError: as `find_resume`.
    """
    run_dir = Path(config.train.run_dir or "")
    check_run_dir(run_dir)
    named = _named_checkpoint(config.checkpoint.resume, run_dir)
    candidates = [named] if named else list(list_checkpoints(run_dir).values())[::-1]
    for path in candidates:
        try:
            state = read_state(path)
        except DamagedCheckpointError:
            if named:
                raise
            continue
        _refuse_earlier(state.step, run_dir)
        return path, _compare(path, state, config, fingerprint)
    return None


def _refuse_earlier(step: int, run_dir: Path) -> None:
    """Raise a ValueError if a run's folder has a checkpoint later than the one to resume from."""
    newest = max(list_checkpoints(run_dir), default=step)
    if newest > step:
        raise ValueError(
            f"{run_dir} contains a checkpoint at step {newest}, which is later than the one to resume from "
            f"(step {step}): delete it, or set another train.run_dir"
        )


def _refuse_finished(path: Path, step: int, changes: list[str], config: TrainingConfig) -> None:
    """Raise a ValueError if settings have changed, but no step is left that would use them."""
    if step < config.train.num_steps:
        return
    used = [change for change in changes if not change.startswith(UNUSED_WHEN_DONE)]
    if step > config.train.num_steps or used:
        others = f", trained with other settings ({'; '.join(used)})" if used else ""
        raise ValueError(
            f"{path} has {step:,} steps, and train.num_steps is {config.train.num_steps:,}{others}: raise "
            f"train.num_steps to train further, or {_new_run(path, config)}"
        )


def _load_deepspeed(engine: "DeepSpeedEngine", folder: Path, tag: str) -> None:
    with silent_stdout():
        path, _ = engine.load_checkpoint(folder, tag=tag, load_lr_scheduler_states=False)
    if path is None:
        raise OSError(f"DeepSpeed found no checkpoint in {folder / tag}: set checkpoint.resume to another one")


def _named_checkpoint(choice: str, run_dir: Path) -> Path | None:
    """Return the checkpoint that ``checkpoint.resume`` names. ``auto`` and ``never`` name none."""
    if choice == "auto":
        return None
    if choice == "never":
        if existing := list_checkpoints(run_dir):
            raise ValueError(
                f"{run_dir} already contains checkpoints up to step {max(existing)}: set checkpoint.resume=auto to "
                "resume from there, or set another train.run_dir"
            )
        return None
    path = Path(choice)
    _check_path("checkpoint.resume", path)
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


def _compare(path: Path, state: CheckpointState, config: TrainingConfig, fingerprint: str | None) -> list[str]:
    """Return the changed settings.

    Raises:
        ValueError: settings have changed that must not, or for which no step is left.
    """
    if fingerprint not in (None, state.data_fingerprint):
        raise ValueError(
            f"data.path {config.data.path} contains different data than {path} was trained on (fingerprint "
            f"{fingerprint[:12]} instead of {state.data_fingerprint[:12]}): set data.path to the original store, or "
            f"{_new_run(path, config)}"
        )
    then, now, now_saved = _saved_settings(path), flatten(config.model_dump()), flatten(saved_values(config))
    digests = state.interpolated or {}
    unchanged = {key for key in then.keys() & now.keys() if then[key] == now[key]}  # but other keys can resolve them
    for settings in (then, now, now_saved):
        _resolve(settings)
    changes, fixed = [], {}
    for key in sorted(then.keys() | now.keys(), key=_by_cause):
        before, after = then.get(key), now.get(key)
        # Of an interpolation, the text was saved, and of a fixed key a digest of its value.
        if digests[key] == value_digest(after) if key in digests else before in (after, now_saved.get(key)):
            continue
        is_free = key in FREE_MODEL_KEYS or (key == INIT_KEY and state.step > 0)
        if _is_in(key, FIXED_KEYS) and not is_free:
            fixed[key] = now_saved.get(key), before
        elif not _is_in(key, SILENT_KEYS):
            unread = " (not read: set another train.run_dir to start from it)" if key == INIT_KEY else ""
            changes.append(f"{key}: {before} → {now_saved.get(key)}{unread}")
    if fixed:
        raise _other_run(path, config, {key: values for key, values in fixed.items() if key not in unchanged} or fixed)
    _refuse_finished(path, state.step, changes, config)
    return changes


def _other_run(path: Path, config: TrainingConfig, fixed: dict[str, tuple[Any, Any]]) -> ValueError:
    """Return an error that names the settings that must not change, as (now, before) by key."""
    (key, (now, before)), *others = fixed.items()
    more = "".join(f"; {other} is {value!r}, but was {old!r}" for other, (value, old) in others)
    which = "these values" if others else "that value"
    return ValueError(
        f"{key} is {now!r}, but {path} was trained with {before!r}{more}: restore {which}, or "
        f"{_new_run(path, config, with_weights='optimizer.name' in fixed)}"
    )


def _new_run(path: Path, config: TrainingConfig, *, with_weights: bool = False) -> str:
    """Return how to start a new run in place of resuming from a checkpoint."""
    weights = f"{INIT_KEY}={path} to begin with its weights"
    if config.checkpoint.resume != "auto":  # of another run
        return f"set checkpoint.resume=auto and {weights}"
    return "start a new run with another train.run_dir" + f" and {weights}" * with_weights


def interpolated_settings(config: TrainingConfig) -> dict[str, str]:
    """Return digests of the fixed settings that are saved only as interpolations."""
    now, saved = flatten(config.model_dump()), flatten(saved_values(config))
    return {key: value_digest(now[key]) for key in now if _is_in(key, FIXED_KEYS) and saved[key] != now[key]}


def _saved_settings(checkpoint: Path) -> dict[str, Any]:
    """Return the settings in the checkpoint's ``config.yaml``, with interpolations as text."""
    path = checkpoint / CONFIG_FILE
    try:
        return flatten(OmegaConf.to_container(parse_recipe(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise ValueError(f"{path} is not a valid recipe ({error}): restore it") from error


def _mismatches(state: CheckpointState, plan: Plan) -> list[str]:
    """Return the differences to this run that DeepSpeed's files depend on."""
    compared = {
        "ranks": (state.world_size, plan.world_size),
        "ZeRO stage": (state.zero_stage, plan.config.deepspeed.zero_stage),
        "precision": tuple(map(weights_precision, (state.precision, plan.config.train.precision))),
    }
    found = [f"{what} {before} → {now}" for what, (before, now) in compared.items() if before != now]
    return found if state.optimizer_layout == optimizer_layout(plan) else [*found, "parameter order"]


def _resolve(settings: dict[str, Any]) -> None:
    """Replace implicit values by explicit ones, so that equivalent settings compare equal."""
    settings.setdefault("optimizer.name", "adamw")  # older versions had no other one
    settings.setdefault("train.only_sinks", False)
    settings["model.max_position_embeddings"] = (
        settings.get("model.max_position_embeddings") or settings["train.seq_length"]
    )
    if settings["model.sink.kind"] != "token":
        settings["model.sink.num_tokens"] = 1
    _resolve_windows(settings)


def _by_cause(key: str) -> tuple[bool, str]:
    """Sort keys whose resolved values depend on other keys behind these."""
    return key.startswith("model.attention."), key


def _resolve_windows(settings: dict[str, Any]) -> None:
    """Replace a pattern by the kind of each layer, and fill in what older checkpoints lack."""
    pattern, num_kept = (settings.get(f"model.attention.{key}") for key in ("pattern", "num_kept"))
    try:
        kinds = layer_kinds(pattern or "full", settings["model.num_hidden_layers"])
    except ValueError:  # the text of an interpolation, or edited
        return
    num_sinks = settings["model.sink.num_tokens"] if settings["model.sink.kind"] == "token" else 0
    settings["model.attention.pattern"] = kinds
    settings["model.attention.window"] = settings.get("model.attention.window")
    settings["model.attention.num_kept"] = num_sinks if num_kept is None else num_kept


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
