"""The one description of a run's folder and of a checkpoint in it.

::

    <run>/
        config.yaml           the resolved recipe of the last start
        environment.json      library versions and devices
        metrics.jsonl         a line for each step
        checkpoints/step-<N>/
            deepspeed/        weights, optimizer and counters, in DeepSpeed's own format
            rng/              the random states of every rank
            model/            the weights as a transformers folder (safetensors), for evaluation and export
            config.yaml       the resolved recipe
            state.json        `CheckpointState`
            COMPLETE          written last; without it the checkpoint is never loaded
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
    """``state.json``: how far a checkpoint is, on which data, and what DeepSpeed's files in it fit.

    ``optimizer_layout`` is None in checkpoints that are older than the key.
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
    """What ``state.json`` says.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    path = checkpoint / STATE_FILE
    damage = ValueError(f"{path} is damaged: delete {checkpoint} to go on from an older one")
    try:
        values = json.loads(path.read_bytes())
        version = values.get("format_version", FORMAT_VERSION)
    except (ValueError, AttributeError) as error:
        raise damage from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has a format_version that this sinklm cannot read: use the version that wrote it")
    known = {field.name: field.type for field in fields(CheckpointState)}
    try:
        state = CheckpointState(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise damage from error
    if not all(isinstance(value, known[name]) for name, value in asdict(state).items()):  # type: ignore[arg-type]
        raise damage
    return state


def list_checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their step, ascending."""
    found = {
        int(match[1]): path
        for path in (run / CHECKPOINTS_FOLDER).glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / COMPLETE_MARKER).exists()
    }
    return dict(sorted(found.items()))


def interrupted_checkpoints(run: Path) -> list[Path]:
    """Folders of checkpoints that were never completed."""
    return sorted(path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if not (path / COMPLETE_MARKER).exists())


def resolve_model_folder(name_or_path: str | Path) -> str:
    """The transformers folder that ``name_or_path`` stands for, or the name itself if it is not a local path.

    Raises:
        FileNotFoundError: it is a path without a model, or its checkpoints are not complete.
    """
    path = Path(name_or_path)
    if not path.exists():
        if is_local(name_or_path):
            raise FileNotFoundError(f"{path}: no such folder")
        return str(name_or_path)
    if (path / "config.json").exists():
        return str(path)
    if (path / CHECKPOINTS_FOLDER).is_dir():
        complete = list_checkpoints(path)
        if not complete:
            raise FileNotFoundError(f"{path / CHECKPOINTS_FOLDER} holds no complete checkpoint")
        path = complete[max(complete)]
    if (path / MODEL_FOLDER / "config.json").exists():
        if not (path / COMPLETE_MARKER).exists():
            raise FileNotFoundError(
                f"{path} is an interrupted checkpoint (it has no {COMPLETE_MARKER} file): take an older one"
            )
        return str(path / MODEL_FOLDER)
    raise FileNotFoundError(f"{path} holds neither a transformers model (config.json) nor a training checkpoint")


def is_local(name_or_path: str | Path) -> bool:
    """Whether a name that may be one on the Hub is a path: it says so, or begins with a folder of training runs."""
    path = Path(name_or_path)
    says_so = path.is_absolute() or str(name_or_path).startswith(".") or str(name_or_path).count("/") > 1
    return says_so or (len(path.parts) > 1 and any(path.parent.glob(f"*/{CHECKPOINTS_FOLDER}")))
