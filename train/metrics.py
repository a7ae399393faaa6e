"""What a run records: ``metrics.jsonl`` always, Weights & Biases if wanted."""

import json
import os
from pathlib import Path
from typing import Any

from .config import TrainingConfig


class MetricsFile:
    """``metrics.jsonl``: a JSON object a line, each with ``step``, flushed as it is written.

    Args:
        path: the file; continued if it exists.
        first_step: steps after this many updates are dropped: a resumed run writes them anew.
    """

    def __init__(self, path: Path, first_step: int):
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= first_step]
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a crash cut off."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def start_wandb(config: TrainingConfig, run_dir: Path) -> Any:
    """A Weights & Biases run, or None if disabled. It continues the run of the same folder.

    Raises:
        ValueError: wandb is not installed, or ``online`` without being logged in.
    """
    mode = config.wandb.mode
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: `pip install wandb`, or set wandb.mode=disabled") from error
    is_logged_in = bool(wandb.api.api_key)
    if mode == "online" and not is_logged_in:
        raise ValueError("wandb.mode=online, but you are not logged in: run `wandb login`, or set wandb.mode=offline")
    if mode == "auto":
        mode = "online" if is_logged_in else "offline"
    return wandb.init(
        project=config.wandb.project,
        name=run_dir.name,
        id=_wandb_id(run_dir),
        resume="allow",
        mode=mode,
        dir=run_dir,
        config=config.model_dump(),
        settings=wandb.Settings(silent=True),
    )


def _wandb_id(run_dir: Path) -> str:
    """The id of this folder's run, made once."""
    path = run_dir / "wandb-id"
    if not path.exists():
        path.write_text(os.urandom(6).hex(), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
