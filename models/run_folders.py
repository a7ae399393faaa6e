"""The folder of a training run is not that of a model: which one to load instead."""

import functools
from pathlib import Path
from typing import Any

from transformers import AutoConfig


def refuse_run(name_or_path: Any) -> None:
    """Raise an OSError if a path is that of a run or a checkpoint, with the path of its model."""
    folder = Path(str(name_or_path))
    if (folder / "config.json").exists():
        return
    steps = {int(path.name[5:]): path for path in folder.glob("checkpoints/step-*") if path.name[5:].isdecimal()}
    for checkpoint in (folder, *(steps[step] for step in sorted(steps, reverse=True))):
        if (checkpoint / "COMPLETE").exists() and (checkpoint / "model" / "config.json").exists():
            raise OSError(
                f"{folder} is the folder of a training run, not of a model: pass {checkpoint / 'model'}, or call "
                "sinklm.load_model"
            )


def refuse_runs_in_auto_classes() -> None:
    """Let `AutoConfig`, which `AutoModelForCausalLM` and others use first, explain runs too.

    It fails for them in any case, with "Unrecognized model".
    """
    original: Any = vars(AutoConfig)["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        except (ValueError, OSError):
            refuse_run(Path(str(pretrained_model_name_or_path)) / (kwargs.get("subfolder") or ""))
            raise

    AutoConfig.from_pretrained = classmethod(from_pretrained)
