"""What a result needs to be worth keeping: which model, which library versions, written whole or not at all."""

import errno
import os
import platform
import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.folders import resolve_model_folder
from ..files import named_errors, write_json

JSON_OPTIONS: dict[str, Any] = {"default": str, "allow_nan": False}
LIBRARIES = ("sinklm", "torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy")


def describe_model(model: PreTrainedModel, name_or_path: str | Path) -> dict[str, Any]:
    """The facts that tell one evaluated model from another, ready for JSON."""
    return {
        "name_or_path": str(name_or_path),
        "folder": resolve_model_folder(name_or_path),
        "class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "sink_kind": getattr(model.config, "sink_kind", None),
        "num_sinks": getattr(model.config, "num_sinks", 0),
        "max_position_embeddings": getattr(model.config, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def new_report(model: PreTrainedModel, name_or_path: str | Path, **facts: Any) -> dict[str, Any]:
    """What every report begins with."""
    return {"model": describe_model(model, name_or_path), "versions": library_versions(), **facts}


def library_versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


def default_output(name_or_path: str | Path) -> Path:
    """A folder of its own for each model, so that a second evaluation does not overwrite the first."""
    return Path("results") / (re.sub(r"[^\w.]+", "-", str(name_or_path)).strip("-.") or "model")


class ReportFile:
    """A report that is measured bit by bit. What an earlier one left at ``path`` stays until this one is whole.

    Raises:
        OSError: ``path`` cannot be written, which shows before the work, not after it; nothing is made or changed.
    """

    def __init__(self, path: Path):
        self.path, self._unfinished = path, path.with_suffix(f".unfinished{path.suffix}")
        with named_errors(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            tempfile.TemporaryFile(dir=folder).close()

    def keep(self, report: dict[str, Any]) -> None:
        """Write what is measured so far beside it, should the rest fail."""
        write_json(self._unfinished, report, **JSON_OPTIONS)

    def finish(self, report: dict[str, Any]) -> None:
        write_json(self.path, report, **JSON_OPTIONS)
        self._unfinished.unlink(missing_ok=True)
