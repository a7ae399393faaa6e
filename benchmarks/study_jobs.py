"""Jobs of the studies that train recipes: a run with its number of tokens, and a deadline."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from study_settings import keep_settings

from sinklm.files import write_json, write_text
from sinklm.train.recipe import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from jobs import SINKLM, Job, JobQueue, visible_gpus
from pages import Data, Tables, as_text


def training(run: Path, recipe: str, settings: list[str], million_tokens: float | None) -> Job:
    """Return the job that trains a recipe in the folder ``run``.

    Args:
        million_tokens: positions of the run; None: as in the recipe.
    """
    if million_tokens is not None:
        settings = [*settings, f"train.num_steps={num_steps(recipe, settings, million_tokens)}"]
    return Job(run.name, (*SINKLM, "train", recipe, *settings, f"train.run_dir={run}"), run / "train.log")


def num_steps(recipe: str, settings: list[str], million_tokens: float | None) -> int:
    """Return the steps of a run of so many tokens; None: of the recipe."""
    train = load_config(recipe, settings).train
    return train.num_steps if million_tokens is None else round(1e6 * million_tokens / train.batch_size_tokens)


def store_of(recipe: str, settings: list[str]) -> str:
    """Return the token store of a recipe with these settings.

    Raises:
        ValueError: none is set.
    """
    store = load_config(recipe, settings).data.path
    if store is None:
        raise ValueError("no token store: add data.path=STORE, a folder made by `sinklm prepare`")
    return store


class Deadline:
    """The end of a call: after its minutes, or when it is interrupted."""

    def __init__(self, minutes: float):
        self._end = time.monotonic() + 60 * minutes

    @property
    def minutes(self) -> float:
        """The time left; 0 or less when it is over."""
        return (self._end - time.monotonic()) / 60

    def end(self) -> None:
        self._end = -float("inf")


def run(jobs: list[Job], deadline: Deadline, per_gpu: int) -> bool:
    """Run the jobs until the deadline. Returns whether all are done."""
    if (minutes := deadline.minutes) <= 0:
        return all(job.is_done for job in jobs)
    queue = JobQueue(jobs, per_gpu=per_gpu, minutes=minutes)
    is_done = queue.run()
    if queue.is_interrupted:
        deadline.end()
    return is_done


def run_in_parts(pairs: list[tuple[Job, Job]], deadline: Deadline, per_gpu: int) -> bool:
    """Run trainings, as many as run at once, and then what measures them; then the next ones.

    Args:
        pairs: a training, and the job that measures it when it is done.

    Returns:
        Whether all are done.
    """
    size, is_done = per_gpu * len(visible_gpus()), True
    for part in (pairs[i : i + size] for i in range(0, len(pairs), size)):
        is_done = run([training for training, _ in part], deadline, per_gpu) and is_done
        is_done = run([measuring for training, measuring in part if training.is_done], deadline, per_gpu) and is_done
    return is_done


def begin(arguments: argparse.Namespace, names: tuple[str, ...]) -> tuple[dict[str, Any], Deadline]:
    """Return the settings of these names, without the path of the store, and the deadline.

    Raises:
        SystemExit: the folder was begun with other settings.
    """
    settings = {name: getattr(arguments, name) for name in names}
    keep_settings(arguments.folder, settings)
    values = [value for value in settings["settings"] if not value.startswith("data.path=")]
    return settings | {"settings": values}, Deadline(arguments.minutes)


def conclude(path: Path, found: Data, tables: Tables, *, is_done: bool) -> NoReturn:
    """Write results and tables of a study as ``path.json`` and ``path.md``, and end the process."""
    text = as_text(tables)
    write_json(path.with_suffix(".json"), found)
    write_text(path.with_suffix(".md"), text)
    print(f"\n{text}{'all done' if is_done else 'not done: repeat the command'}", flush=True)
    sys.exit(not is_done)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that change how the jobs run, but not their results."""
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs that share a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="save and stop after this many minutes")
