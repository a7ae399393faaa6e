"""The folder of a training run is not that of a model: which one to load instead."""

from pathlib import Path
from typing import Any


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
