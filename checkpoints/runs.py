"""Finds training runs in folders, and what became of each."""

import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import is_locked
from ..hub import near_path_hint
from ..parsing import parse_json, parse_yaml
from .folders import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    METRICS_FILE,
    DamagedCheckpointError,
    damaged_checkpoints,
    list_checkpoints,
    read_state,
)
from .manifest import read_manifest

MAX_DEPTH = 3  # folders between the given one and a run
FIRST_BLOCK = 2**18  # bytes read from the end of metrics.jsonl; more if they do not have all values


@dataclass(frozen=True)
class RunSummary:
    """A run, from the files in its folder.

    Attributes:
        state: ``running``: a training has locked it; ``finished``; ``stopped``: it can be resumed;
            ``damaged``: it cannot, see ``note``.
        step: number of the latest recorded step.
        saved_step: step of the newest intact checkpoint; None if there is none.
        loss, validation_loss: the latest ones.
        attention: pattern and window of its layers, such as ``3:1 255``; None if all are full, or
            if the recipe cannot be read.
        age: seconds since the latest record, or since the run was started; None if not known.
        command: the command that resumes it; None if it is not stopped.
        note: what is damaged, and the error that stopped the run.
    """

    path: Path
    state: str
    step: int = 0
    num_steps: int | None = None
    saved_step: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    attention: str | None = None
    age: float | None = None
    command: str | None = None
    note: str = ""


def find_runs(folder: Path) -> list[Path]:
    """Return the runs in a folder, or the folder itself if it is one, in the order of their names.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not folder.is_dir():
        remedy = near_path_hint(str(folder)) or "pass the folder of a run, or one with runs in it"
        raise FileNotFoundError(f"{folder}: no such folder; {remedy}")
    return list(_find(folder, MAX_DEPTH))


def _find(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif depth and os.access(folder, os.R_OK | os.X_OK):
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith("."):
                yield from _find(inner, depth - 1)


def _is_run(folder: Path) -> bool:
    if (folder / CHECKPOINTS_FOLDER).is_dir() or (folder / METRICS_FILE).is_file():
        return True
    return (folder / LOCK_FILE).is_file() and (folder / CONFIG_FILE).is_file()


def summarize(run: Path) -> RunSummary:
    """Describe a run. Never raises an error for damaged files: see `RunSummary.note`."""
    values: dict[str, Any] = {}
    try:
        values = _progress(run)
        values["age"] = _age(run)
        if is_locked(run / LOCK_FILE):
            return RunSummary(run, "running", **values | _settings(_config(run)))
        config = _config(run)
        values |= _settings(config)
        num_steps = config["train"]["num_steps"]
        saved, num_ranks, damage = _intact_checkpoint(run)
        values |= {"saved_step": saved, "note": "; ".join(filter(None, (values.get("note"), damage)))}
        if saved is not None and saved >= num_steps:
            return RunSummary(run, "finished", **values)
        return RunSummary(run, "stopped", **values, command=_command(run, config, saved, num_ranks))
    except (OSError, ValueError) as error:
        return RunSummary(run, "damaged", **values | {"note": " ".join(str(error).split())})


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that its summary shows."""
    model = config.get("model")
    attention = model.get("attention") if isinstance(model, dict) else None  # runs of older versions have none
    attention = attention if isinstance(attention, dict) else {}
    pattern, window = attention.get("pattern"), attention.get("window")
    if isinstance(pattern, list):
        pattern = f"{pattern.count('window')} of {len(pattern)}"
    size = "–".join(map(str, window)) if isinstance(window, list) else window
    return {"num_steps": config["train"]["num_steps"], "attention": None if window is None else f"{pattern} {size}"}


def _config(run: Path) -> dict[str, Any]:
    path = run / CONFIG_FILE
    try:
        config = parse_yaml(path.read_bytes())
        if isinstance(config["train"]["num_steps"], int):
            return config
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is damaged: it is not a recipe")


def _intact_checkpoint(run: Path) -> tuple[int | None, int, str]:
    """Return the step of the checkpoint from which a run resumes, its number of ranks, and a note.

    Sizes of files are compared with those that were written, but not their hashes.

    Raises:
        ValueError: there are only damaged ones.
    """
    damaged = [f"{path.name} was set aside" for path in damaged_checkpoints(run)]
    for step, path in reversed(list_checkpoints(run).items()):
        try:
            _check_files(path)
            return step, read_state(path).world_size, "; ".join(damaged)
        except DamagedCheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError("; ".join(damaged))
    return None, 1, ""


def _check_files(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    for name, info in manifest.files.items() if manifest else ():
        path = checkpoint / name
        if not path.is_file() or info.bytes not in (path.stat().st_size, None):
            raise DamagedCheckpointError(checkpoint, f"{name} is missing or has another size than when it was written")


def _progress(run: Path) -> dict[str, Any]:
    """Return the latest values in ``metrics.jsonl``, without the saved step."""
    found: dict[str, Any] = {}
    for record in _latest_records(run / METRICS_FILE):
        if "error" in record and not found:
            found["note"] = record["error"]
        found.setdefault("step", record["step"])
        for key in ("loss", "validation_loss"):
            if key in record:
                found.setdefault(key, record[key])
        if "loss" in found and "validation_loss" in found:
            break
    return found


def _latest_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file from its end. Skips lines that are incomplete."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        end, size, rest = file.seek(0, 2), FIRST_BLOCK, b""
        while end:
            begin = max(0, end - size)
            file.seek(begin)
            lines = (file.read(end - begin) + rest).split(b"\n")
            rest = lines.pop(0) if begin else b""
            for line in reversed(lines):
                try:
                    record = parse_json(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record
            end, size = begin, 2 * size


def _age(run: Path) -> float | None:
    for name in (METRICS_FILE, CONFIG_FILE):
        if (run / name).is_file():
            return max(0.0, time.time() - (run / name).stat().st_mtime)
    return None


def _command(run: Path, config: dict[str, Any], saved: int | None, num_ranks: int) -> str:
    """Return the command that resumes a run, on as many ranks as before."""
    settings = []
    if Path(str(config["train"].get("run_dir") or "")).resolve() != run.resolve():
        settings.append(f"train.run_dir={run}")  # it was moved, or the working folder is another one
    section = config.get("checkpoint")
    if isinstance(section, dict) and section.get("resume") != "auto" and saved is not None:
        settings.append("checkpoint.resume=auto")
    if num_ranks == 1:
        program = ["sinklm", "train"]
    elif num_ranks <= _num_local_devices(run):
        program = ["torchrun", "--nproc-per-node", str(num_ranks), "--module", "sinklm.train"]
    else:
        program = ["srun", "--ntasks", str(num_ranks), "python", "-m", "sinklm.train"]
    return shlex.join([*program, str(run / CONFIG_FILE), *settings])


def _num_local_devices(run: Path) -> float:
    """Number of GPUs of the machine of rank 0; infinity if it trained on CPUs."""
    try:
        devices = parse_json((run / ENVIRONMENT_FILE).read_bytes())["devices"]
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf")
    return len(devices) if isinstance(devices, list) else float("inf")
