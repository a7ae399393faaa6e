"""Reports of evaluations: model, library versions and results, written atomically."""

import errno
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.folders import CHECKPOINTS_FOLDER
from ..checkpoints.weight_types import name_of
from ..files import check_writable, named_errors, write_json
from ..models import SinkGPTNeoXConfig
from ..models.config import sink_config
from ..streaming.layers import describe_former_rules, describe_rules
from ..streaming.wrappers import decoder_of

JSON_OPTIONS: dict[str, Any] = {"default": str, "allow_nan": False}
LIBRARIES = ("sinklm", "torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy")


def describe_model(model: PreTrainedModel, name_or_path: str | Path) -> dict[str, Any]:
    """Return a description of an evaluated model, ready for JSON.

    ``folder`` is that of its weights: of the checkpoint that was loaded, if it is a run's.
    ``sink_token_ids`` are the first tokens of every text. ``sinks_added_by`` is ``model``, or
    ``tokenizer`` for an export; None without sink tokens. ``sink_kind`` is None for models that are
    not of sinklm. ``windows`` says which layers have windows of their own, such as "20 of 24 layers
    0+511" (kept and recent tokens), which a larger cache does not change; None if none has.
    ``trained_windows`` are those before an export with full attention.
    """
    sink = sink_config(model.config)
    added_by = "model" if isinstance(model.config, SinkGPTNeoXConfig) else "tokenizer"
    return {
        "name_or_path": str(name_or_path),
        "folder": model.name_or_path,
        "class": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "sink_kind": sink.sink_kind if hasattr(model.config, "sink") else None,
        "num_sinks": sink.num_sinks,
        "sink_token_ids": sink.sink_token_ids,
        "sinks_added_by": added_by if sink.num_sinks else None,
        "windows": describe_rules(decoder_of(model).config),
        "trained_windows": describe_former_rules(decoder_of(model).config),
        "max_position_embeddings": getattr(model.config, "max_position_embeddings", None),
        "dtype": name_of(model.dtype),
        "device": str(model.device),
    }


def new_report(model: PreTrainedModel, name_or_path: str | Path, **facts: Any) -> dict[str, Any]:
    """Return a report with the model, the library versions and ``facts``."""
    return {"model": describe_model(model, name_or_path), "versions": library_versions(), **facts}


def library_versions(*more: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in (*LIBRARIES, *more)}


def display_name(name_or_path: str | Path) -> str:
    """Return a short name of a model for titles: that of its folder, or its name on the Hub."""
    path = Path(name_or_path)
    if not path.exists():
        return str(name_or_path)
    parts = path.absolute().parts
    if len(parts) > 2 and parts[-2] == CHECKPOINTS_FOLDER and re.fullmatch(r"step-\d+", parts[-1]):
        return f"{parts[-3]}, {parts[-1]}"
    return parts[-1]


def default_output(name_or_path: str | Path) -> Path:
    """Return a separate folder for each model, so that evaluations do not overwrite each other."""
    return Path("results") / (re.sub(r"[^\w.]+", "-", str(name_or_path)).strip("-.") or "model")


class ReportFile:
    """A report measured step by step. It replaces an earlier one only when finished.

    Raises:
        OSError: at construction, if ``path`` cannot be written; nothing is created or changed.
    """

    def __init__(self, path: Path):
        self.path, self._unfinished = path, path.with_suffix(f".unfinished{path.suffix}")
        with named_errors(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        check_writable(path)

    def keep(self, report: dict[str, Any]) -> None:
        """Write the results so far to a separate file, in case the evaluation fails later."""
        write_json(self._unfinished, report, **JSON_OPTIONS)

    def finish(self, report: dict[str, Any]) -> None:
        write_json(self.path, report, **JSON_OPTIONS)
        self._unfinished.unlink(missing_ok=True)
