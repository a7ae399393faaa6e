"""Which checkpoint a run goes on from, and whether it may."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..checkpoints.loading import COMPLETE_MARKER
from .checkpoint import CheckpointState, list_checkpoints, read_state
from .config import TrainingConfig

# A change of these makes it another run: the order of the data, or the model itself.
FIXED_KEYS = ("model", "train.seed", "train.seq_length", "train.batch_size_tokens")
FREE_MODEL_KEYS = ("model.max_position_embeddings",)  # positions are rotary: no weight depends on it
INIT_KEY = "model.init_from"  # free as well, but at step 0, whose weights are made anew where they are not loaded
# Where things lie and how they are watched says nothing about the run.
SILENT_KEYS = ("data.path", "train.run_dir", "checkpoint", "wandb", "validation", "deepspeed", "train.micro_batch_size")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from.

    Attributes:
        path: its folder.
        state: its ``state.json``.
        changes: settings that differ from the checkpoint's, as "key: old → new".
    """

    path: Path
    state: CheckpointState
    changes: list[str]


def find_resume(config: TrainingConfig, fingerprint: str) -> Resume | None:
    """The checkpoint that ``checkpoint.resume`` means; None to start from the beginning.

    Raises:
        FileNotFoundError: the named folder is no complete checkpoint.
        ValueError: the checkpoint belongs to another run (the key that differs is named), or the run's folder holds
            checkpoints that this run would mix with.
    """
    run_dir = Path(config.train.run_dir or "")
    existing = list_checkpoints(run_dir)
    choice = config.checkpoint.resume
    if choice == "never":
        if existing:
            raise ValueError(
                f"{run_dir} already holds checkpoints up to step {max(existing)}: set checkpoint.resume=auto to go on "
                "from there, or another train.run_dir"
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
            f"{run_dir} holds a checkpoint at step {max(existing)}, later than the one to resume from (step "
            f"{state.step}): delete it, or set another train.run_dir"
        )
    return Resume(path, state, _compare(path, state, config, fingerprint))


def interrupted_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of checkpoints that were never completed."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if not (path / COMPLETE_MARKER).exists())


def _named_checkpoint(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint.resume={path}: no such folder (or write auto or never)")
    if existing := list_checkpoints(path):  # a run's folder
        return existing[max(existing)]
    if not (path / "state.json").exists() and not path.name.startswith("step-"):
        raise FileNotFoundError(f"checkpoint.resume={path}: not a checkpoint (there is no state.json)")
    if not (path / COMPLETE_MARKER).exists():
        raise FileNotFoundError(
            f"checkpoint.resume={path}: an interrupted checkpoint (it has no {COMPLETE_MARKER} file); take an older one"
        )
    return path


def _compare(path: Path, state: CheckpointState, config: TrainingConfig, fingerprint: str) -> list[str]:
    """Changed settings that a run may change; raises for the others."""
    if state.data_fingerprint != fingerprint:
        raise ValueError(
            f"data.path {config.data.path} holds other tokens than those {path} was trained on (fingerprint "
            f"{fingerprint[:12]} instead of {state.data_fingerprint[:12]}): set data.path to the store of the first "
            "start, or start a new run with another train.run_dir"
        )
    then = flatten(OmegaConf.to_container(OmegaConf.load(path / "config.yaml")))
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
                f"{key} is {after!r}, but {path} was trained with {before!r}: set it back, or start a new run with "
                "another train.run_dir"
            )
        if not _is_in(key, SILENT_KEYS):
            changes.append(f"{key}: {before} → {after}")
    return changes


def _resolve(settings: dict[str, Any]) -> None:
    """Write out what a setting stands for, so that two ways to say the same are no change."""
    settings["model.max_position_embeddings"] = (
        settings.get("model.max_position_embeddings") or settings["train.seq_length"]
    )
    if settings["model.sink.kind"] != "token":
        settings["model.sink.num_tokens"] = 1


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    if not isinstance(values, dict) or (prefix and not values):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def _is_in(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
