"""Metrics of a run: ``metrics.jsonl``, and Weights & Biases unless disabled."""

import contextlib
import json
import netrc
import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ..files import write_text
from ..parsing import parse_json
from ..text import one_line
from .config import TrainingConfig
from .recipe import saved_values

DEFAULT_PROJECT = "sinklm"  # on Weights & Biases


class MetricsFile:
    """``metrics.jsonl``: one JSON object with key ``step`` per line, flushed after each line.

    Args:
        path: the file; appended to if it exists.
        first_step: lines of later steps are dropped, because the resumed run writes them again.
    """

    def __init__(self, path: Path, first_step: int):
        kept = []
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= first_step]
            write_text(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def write(self, values: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self._file.name}: {error}") from error

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity for an incomplete or damaged one."""
    try:
        return parse_json(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class WandbRun:
    """Logs to Weights & Biases. Its failures do not stop training: `metrics.jsonl` has everything.

    A server that cannot be reached, or refuses the login, is such a failure, also at the start.

    Args:
        say: called with a message if wandb fails.

    Raises:
        ValueError: wandb is not installed, the mode is ``online`` without a login, or wandb does
            not accept the settings.
    """

    def __init__(self, config: TrainingConfig, run_dir: Path, say: Callable[[str], None]):
        self._say = say
        self._run = _start_wandb(config, run_dir, self._disable)
        if self._run is not None and self._run.offline:
            say(f"wandb: offline, in {run_dir / 'wandb'}; for online logging, run `wandb login` before training")

    def write(self, values: dict[str, Any]) -> None:
        """Log the numbers and texts of a step, but not its lists."""
        numbers = {key: value for key, value in values.items() if key != "step" and not isinstance(value, list)}
        self._attempt(lambda: self._run.log(numbers, step=values["step"]))

    def close(self) -> None:
        self._attempt(lambda: self._run.finish())

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._say(f"wandb failed and is disabled for the rest of the run ({reason})")
        self._run = None
        with contextlib.suppress(Exception):
            import wandb

            wandb.teardown()  # otherwise it retries and prints errors when Python exits


def check_wandb(config: TrainingConfig) -> Literal["online", "offline", "disabled"] | None:
    """Return the mode of wandb; None: it reads its own environment variable.

    Raises:
        ValueError: wandb is not installed, or the mode is ``online`` without a login.
    """
    mode = config.wandb.mode
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return "disabled"
    if find_spec("wandb") is None:
        raise ValueError("wandb is not installed: `pip install wandb`, or set wandb.mode=disabled")
    setting, wanted = ("wandb.mode", mode) if mode != "auto" else ("WANDB_MODE", os.environ.get("WANDB_MODE"))
    if wanted == "online" and not is_logged_in():
        raise ValueError(f"{setting}=online, but you are not logged in: run `wandb login`, or set {setting}=offline")
    if mode != "auto":
        return mode
    return None if wanted else "online" if is_logged_in() else "offline"


def _start_wandb(config: TrainingConfig, run_dir: Path, on_failure: Callable[[Exception], None]) -> Any:
    """Start or resume the wandb run of a folder. Returns None if it is disabled, or failed."""
    mode = check_wandb(config)
    if mode == "disabled":
        return None
    import wandb

    try:
        return wandb.init(
            # Of what is None, wandb reads a variable of its own, such as WANDB_ENTITY.
            project=config.wandb.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=config.wandb.entity,
            name=config.wandb.name or os.environ.get("WANDB_NAME") or run_dir.name,
            group=config.wandb.group,
            tags=config.wandb.tags or None,
            id=_wandb_id(run_dir),
            resume="allow",
            mode=mode,
            dir=run_dir,
            config=saved_values(config),
            settings=wandb.Settings(silent=True),
        )
    except (ValueError, wandb.errors.UsageError) as error:
        raise ValueError(f"wandb does not accept the settings ({one_line(error)}): correct the keys wandb.…") from error
    except wandb.errors.Error as error:
        on_failure(error)
        return None


def is_logged_in() -> bool:
    """Whether there is a key for wandb's host, in the environment or from ``wandb login``."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc.netrc(path).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_id(run_dir: Path) -> str:
    """Return the id of this folder's run, creating it on first use."""
    path = run_dir / "wandb" / "run-id"
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[0-9a-f]{12}", known):  # not yet written, or damaged
        known = os.urandom(6).hex()
        write_text(path, known)
    return known
