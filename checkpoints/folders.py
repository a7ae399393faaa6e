"""Layout of the folder of a training run and of its checkpoints.

::

    <run>/
        config.yaml           resolved recipe of the last start
        environment.json      library versions and devices
        metrics.jsonl         one line per step
        lock                  locked while a training uses the folder
        checkpoints/step-<N>/
            deepspeed/        weights, optimizer and counters in DeepSpeed's format
            rng/              random states of all ranks
            model/            transformers folder (safetensors) for evaluation and export
            config.yaml       resolved recipe
            state.json        `CheckpointState`
            COMPLETE          `manifest.Manifest`; written last, and without it nothing is loaded
        checkpoints/step-<N>.damaged    set aside because its files differ from the manifest
"""

import errno
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..hub import find_on_hub
from ..parsing import parse_json
from ..text import MOST_NAMES, near_hint

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "lock"
CHECKPOINTS_FOLDER = "checkpoints"
DEEPSPEED_FOLDER = "deepspeed"
MODEL_FOLDER = "model"
RANDOM_STATES_FOLDER = "rng"
STATE_FILE = "state.json"
COMPLETE_MARKER = "COMPLETE"
DAMAGED = ".damaged"  # suffix of a checkpoint that was set aside
FORMAT_VERSION = 2  # 1: COMPLETE is an empty file


class DamagedCheckpointError(ValueError):
    """The files of a checkpoint are not those that were written."""

    def __init__(self, checkpoint: Path, reason: str):
        super().__init__(f"{checkpoint} is damaged: {reason}")
        self.reason = reason


def damage_reason(error: OSError) -> str | None:
    """Return what is wrong with a file that raised this error, or None if it may be intact."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return "is missing"
    return f"cannot be read ({error.strerror})" if error.errno == errno.EIO else None


@dataclass(frozen=True)
class CheckpointState:
    """``state.json``: progress and data of a checkpoint, and the layout of its DeepSpeed files.

    ``optimizer_layout`` is None in checkpoints from before this key existed. ``interpolated`` has a
    digest of each fixed setting that ``config.yaml`` contains only as an interpolation.
    """

    step: int
    positions: int
    data_fingerprint: str
    world_size: int
    zero_stage: int
    precision: str
    optimizer_layout: str | None = None
    interpolated: dict | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_state(checkpoint: Path) -> CheckpointState:
    """Read ``state.json``.

    Raises:
        DamagedCheckpointError: the file is missing or damaged.
        ValueError: it has a later format version.
    """
    path = checkpoint / STATE_FILE
    damage = DamagedCheckpointError(checkpoint, f"{STATE_FILE} is missing or damaged")
    try:
        values = parse_json(path.read_bytes())
        version = values.get("format_version", 1)
    except (ValueError, AttributeError) as error:
        raise damage from error
    except OSError as error:
        if (reason := damage_reason(error)) is None:
            raise
        raise DamagedCheckpointError(checkpoint, f"{STATE_FILE} {reason}") from error
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path} has format_version {version!r}, this sinklm reads up to {FORMAT_VERSION}: use the version of "
            "sinklm that wrote it"
        )
    known = {field.name: field.type for field in fields(CheckpointState)}
    try:
        state = CheckpointState(**{name: value for name, value in values.items() if name in known})
    except TypeError as error:
        raise damage from error
    if not all(isinstance(value, known[name]) for name, value in asdict(state).items()):  # type: ignore[arg-type]
        raise damage
    return state


def has_manifest(checkpoint: Path) -> bool:
    """Whether ``state.json`` says that ``COMPLETE`` is a manifest, since format version 2."""
    try:
        return parse_json((checkpoint / STATE_FILE).read_bytes())["format_version"] > 1
    except (OSError, ValueError, KeyError, TypeError):
        return False


def list_checkpoints(run: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by step, in ascending order."""
    found = {step: path for step, path in _step_folders(run).items() if (path / COMPLETE_MARKER).exists()}
    return dict(sorted(found.items()))


def interrupted_checkpoints(run: Path) -> list[Path]:
    """Return the folders of incomplete checkpoints: being written, interrupted, or half deleted."""
    return sorted(path for path in _step_folders(run).values() if not (path / COMPLETE_MARKER).exists())


def damaged_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints that were set aside because they are damaged."""
    return sorted((run / CHECKPOINTS_FOLDER).glob(f"step-*{DAMAGED}*"))


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a folder's name, or None if it is not the name of a checkpoint."""
    match = re.fullmatch(r"step-(0|[1-9]\d*)", checkpoint.name, re.ASCII)
    return int(match[1]) if match else None


def _step_folders(run: Path) -> dict[int, Path]:
    folders = (path for path in (run / CHECKPOINTS_FOLDER).glob("step-*") if path.is_dir())
    return {step: path for path in folders if (step := step_of(path)) is not None}


def resolve_model_folder(name_or_path: str | Path) -> str:
    """Return the transformers folder for ``name_or_path``, or the name of a model on the Hub.

    Raises:
        FileNotFoundError: there is no such path and no such model on the Hub (`find_on_hub`), or
            the folder has no model or no complete checkpoint.
    """
    path = Path(name_or_path)
    if not path.exists():
        return find_on_hub(str(name_or_path))
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
    if path.is_file():
        is_for_llama_cpp = path.suffix == ".gguf"
        raise FileNotFoundError(
            f"{path} is a file{' for llama.cpp' * is_for_llama_cpp}: pass the folder of a run, a checkpoint or a model"
        )
    raise FileNotFoundError(
        f"{path} contains neither a transformers model (config.json) nor a training checkpoint: "
        f"{near_hint('', (), others=_models_in(path), prefix=f'{path}/') or 'check the path'}"
    )


def _models_in(folder: Path) -> list[str]:
    """Return the names of some runs, checkpoints and models in a folder, the newest first."""
    parts = ("config.json", CHECKPOINTS_FOLDER, f"{MODEL_FOLDER}/config.json")
    found = [each for each in folder.iterdir() if any((each / part).exists() for part in parts)]
    return [each.name for each in sorted(found, key=lambda each: -each.stat().st_mtime)[:MOST_NAMES]]
