"""Layout of the folder of a training run and of its checkpoints.

::

    <run>/
        config.yaml           resolved recipe of the last start
        environment.json      library versions and devices
        metrics.jsonl         one line per step
        checkpoints/step-<N>/
            deepspeed/        weights, optimizer and counters in DeepSpeed's format
            rng/              random states of all ranks
            model/            transformers folder (safetensors) for evaluation and export
            config.yaml       resolved recipe
            state.json        `CheckpointState`
            COMPLETE          written last; a checkpoint without it is never loaded
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
DEEPSPEED_FOLDER = "deepspeed"
MODEL_FOLDER = "model"
RANDOM_STATES_FOLDER = "rng"
STATE_FILE = "state.json"
COMPLETE_MARKER = "COMPLETE"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CheckpointState:
    """``state.json``: progress and data of a checkpoint, and the layout of its DeepSpeed files.

    ``optimizer_layout`` is None in checkpoints from before this key existed.
    """

    step: int
    positions: int
    data_fingerprint: str
    world_size: int
    zero_stage: int
    precision: str
    optimizer_layout: str | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_state(checkpoint: Path) -> CheckpointState:
    """Read ``state.json``.

    Raises:
        ValueError: the file is damaged or has another format version.
    """
    path = checkpoint / STATE_FILE
    damage = ValueError(f"{path} is damaged: delete {checkpoint} to continue from an older checkpoint")
    try:
        values = json.loads(path.read_bytes())
        version = values.get("format_version", FORMAT_VERSION)
    except (ValueError, AttributeError, RecursionError) as error:
        raise damage from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, this sinklm reads {FORMAT_VERSION}: use the version of sinklm "
            "that wrote it"
        )
    known = {field.name: field.type for field in fields(CheckpointState)}
    try:
        state = CheckpointState(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise damage from error
    if not all(isinstance(value, known[name]) for name, value in asdict(state).items()):  # type: ignore[arg-type]
        raise damage
    return state


def list_checkpoints(run: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by step, in ascending order."""
    found = {
        int(match[1]): path
        for path in (run / CHECKPOINTS_FOLDER).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / COMPLETE_MARKER).exists()
    }
    return dict(sorted(found.items()))


def interrupted_checkpoints(run: Path) -> list[Path]:
    """Return the folders of incomplete checkpoints."""
    return sorted(path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if not (path / COMPLETE_MARKER).exists())


def resolve_model_folder(name_or_path: str | Path) -> str:
    """Return the transformers folder for ``name_or_path``, or the name itself if it is not a path.

    Raises:
        FileNotFoundError: the path does not exist or has no model or no complete checkpoint.
    """
    path = Path(name_or_path)
    if not path.exists():
        if is_local(name_or_path):
            raise FileNotFoundError(f"{path}: no such folder; check the path")
        return str(name_or_path)
    if (path / "config.json").exists():
        return str(path)
    if (path / CHECKPOINTS_FOLDER).is_dir():
        complete = list_checkpoints(path)
        if not complete:
            raise FileNotFoundError(
                f"{path / CHECKPOINTS_FOLDER} has no complete checkpoint: wait until the run has saved one"
            )
        path = complete[max(complete)]
    if (path / MODEL_FOLDER / "config.json").exists():
        if not (path / COMPLETE_MARKER).exists():
            raise FileNotFoundError(
                f"{path} is an incomplete checkpoint (it has no {COMPLETE_MARKER} file): use an older one"
            )
        return str(path / MODEL_FOLDER)
    raise FileNotFoundError(
        f"{path} contains neither a transformers model (config.json) nor a training checkpoint: check the path"
    )


def is_local(name_or_path: str | Path) -> bool:
    """Whether a name is a local path and not a name on the Hub.

    It is if it looks like a path or its parent folder contains training runs.
    """
    path = Path(name_or_path)
    says_so = path.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") > 1
    return says_so or (len(path.parts) > 1 and any(path.parent.glob(f"*/{CHECKPOINTS_FOLDER}")))
