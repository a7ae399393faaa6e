"""Zero-shot benchmarks with lm-eval."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from jinja2 import UndefinedError
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import write_text
from ..models.checked import checked_passes
from ..models.config import sink_config
from ..parsing import parse_json
from ..text import near_hint
from ..versions import warn_if_untested
from .lm import as_lm, num_processes
from .local_data import definition_of, use_local_data
from .report import ReportFile
from .saved_reports import with_stderr

warn_if_untested("lm-eval")

PAPER_TASKS = "sinklm_paper"
TASK_FOLDER = Path(__file__).parent / "tasks"
PAPER_FOLDERS = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "winogrande")  # of lm-eval's tasks
SEED = 1234
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval; see `find_tasks`.

    Attributes:
        names: of tasks, groups or tags, or paths of task files.
        manager: that has them.
        num_fewshot: examples in the prompt; None: each task's default.
        files: local files of the tasks' data sets.
    """

    names: list[str]
    manager: TaskManager
    num_fewshot: int | None
    files: dict[str, list[Path]]


def find_tasks(
    names: Sequence[str] = (PAPER_TASKS,),
    *,
    include_path: Path | None = None,
    data_dir: Path | None = None,
    num_fewshot: int | None = None,
) -> Tasks:
    """Find tasks and their local data.

    Args:
        names: of tasks, groups or tags, or paths of task files. ``sinklm_paper`` is the paper's
            seven tasks.
        include_path: folder of task files, which override lm-eval's tasks of the same name.
        data_dir: folder with the tasks' data sets, see `sinklm.eval.local_data.find_files`; None:
            the Hub.
        num_fewshot: examples in the prompt; None: each task's default.

    Raises:
        ValueError: a task does not exist, its local data cannot be used, or ``data_dir`` or
            ``num_fewshot`` has no effect; tasks of groups are not checked for the latter.
        FileNotFoundError: ``include_path``, ``data_dir`` or a data set in it does not exist.
    """
    manager = task_manager(names, include_path)
    files = use_local_data(manager, names, data_dir, num_fewshot) if data_dir else {}
    if data_dir and not files:
        raise ValueError(
            f"--data-dir has no effect, because no data of {', '.join(names)} is from the Hub: leave it out"
        )
    if num_fewshot and (fixed := [name for name in names if _is_without_examples(manager, name)]):
        raise ValueError(
            f"--num-fewshot has no effect on {', '.join(fixed)}, whose file sets it to 0: leave out the option or "
            "these tasks"
        )
    return Tasks(list(names), manager, num_fewshot, files)


def _is_without_examples(manager: TaskManager, name: str) -> bool:
    """Whether the file of a task sets ``num_fewshot`` to 0, which lm-eval never changes.

    False for groups, whose other tasks may have examples.
    """
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name in ("GROUP", "TAG"):
        return False
    return definition_of(manager, name, resolve_func=False).get("num_fewshot") == 0


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
    max_length: int | None = None,
    apply_chat_template: bool = False,
    log_samples: bool = False,
    model_args: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Run lm-eval's tasks and return its results, ready for JSON.

    Args:
        tasks: from `find_tasks`.
        limit: score only this many examples of each task.
        batch_size: see :func:`sinklm.eval.lm.as_lm`.
        max_length: the same.
        apply_chat_template: format prompts with the tokenizer's chat template.
        log_samples: also return each example with its requests, outputs and metrics.
        model_args: further options of :func:`sinklm.eval.lm.as_lm`.

    Returns:
        ``{"tasks": {name: {metric: value, metric_stderr: …}}, "groups": …, "num_samples": …,
        "task_versions": …, "questions_sha256": …, "prompts_sha256": …}``; with ``log_samples``
        also ``"samples"``: lists of lm-eval's records by task. None in all processes but the first
        of several.

    Raises:
        ValueError: the data of a task has the wrong fields, the tokenizer has no chat template, or
            the model's outputs are not finite.
        ConnectionError: a task's data set is neither available locally nor can be downloaded.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("--apply-chat-template: the tokenizer has no chat template; use a chat model")
    of_template = {"chat_template_args", "enable_thinking"} & set(model_args or ())
    if of_template and not apply_chat_template:
        raise ValueError(
            f"--model-args: {', '.join(sorted(of_template))} without --apply-chat-template has no effect: add this "
            "option, or leave out the argument"
        )
    lm = as_lm(model, tokenizer, batch_size=batch_size, max_length=max_length, **(model_args or {}))
    with checked_passes(model), _named_data(tasks):
        output = simple_evaluate(
            model=lm,
            tasks=tasks.names,
            task_manager=tasks.manager,
            limit=limit,
            num_fewshot=tasks.num_fewshot,
            apply_chat_template=apply_chat_template,
            log_samples=True,
            **dict.fromkeys(SEEDS, SEED),
        )
    if output is None:
        return None
    results = _scores(output) | {
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "max_length": max_length,
        "length": lm.max_length + sink_config(model.config).num_sinks,
        "model_args": model_args or {},
        "data_files": {task: list(map(str, paths)) for task, paths in tasks.files.items()},
        "questions_sha256": {task: _fingerprint(rows, "doc_hash") for task, rows in output["samples"].items()},
        "prompts_sha256": {task: _fingerprint(rows, "prompt_hash") for task, rows in output["samples"].items()},
        "num_processes": num_processes(),
        "seed": SEED,
    }
    return results | ({"samples": output["samples"]} if log_samples else {})


def _fingerprint(records: list[dict[str, Any]], key: str) -> str:
    """Return a sha256 of the hashes ``key`` of examples; their order does not change it."""
    hashes = sorted({(record[key], record["doc_id"]) for record in records})  # a record for each filter
    return hashlib.sha256("".join(f"{one}\n" for one, _ in hashes).encode()).hexdigest()


def _scores(output: dict[str, Any]) -> dict[str, Any]:
    groups = output.get("groups", {})
    return {
        "tasks": {name: _metrics(row) for name, row in output["results"].items() if name not in groups},
        "groups": {name: _metrics(row) for name, row in groups.items()},
        "group_tasks": output.get("group_subtasks", {}),
        "num_samples": output["n-samples"],
        "num_fewshot": output["n-shot"],
        "task_versions": output["versions"],
    }


@contextmanager
def _named_data(tasks: Tasks) -> Iterator[None]:
    """Name the data in lm-eval's errors: a missing field of local files, and a failed download."""
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(
            f"a data set of {', '.join(tasks.names)} is not available locally and cannot be downloaded: {error}. "
            "Without network, use local files with --data-dir or --include-path (docs/evaluation.md)"
        ) from error
    except (UndefinedError, KeyError) as error:
        if not tasks.files:
            raise
        paths = "; ".join(f"{task}: {', '.join(map(str, found))}" for task, found in tasks.files.items())
        raise ValueError(
            f"a data set in --data-dir does not have the fields of the Hub's ({error!r}): {paths}; download it from "
            "the Hub"
        ) from error


def task_manager(names: Sequence[str], include_path: Path | None = None) -> TaskManager:
    """Return a manager of all tasks; those of ``include_path`` take precedence.

    Raises:
        ValueError: a task does not exist.
        FileNotFoundError: ``include_path`` does not exist.
    """
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"the task folder {include_path} does not exist: check --include-path")
    folders = [TASK_FOLDER, *([include_path] if include_path else [])]
    papers = [Path(lm_eval.tasks.__file__).parent / name for name in PAPER_FOLDERS]
    manager = TaskManager(include_path=[*papers, *folders], include_defaults=False)
    if not all(_covers(manager, name) for name in names):
        manager = TaskManager(include_path=folders)  # slow: reads lm-eval's 13,000 task files
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = near_hint(name, manager.all_tasks)
            raise ValueError(
                f"there is no task {name!r}: {near}{' Or ' * bool(near)}use one of lm-eval's (listed by "
                f"`lm-eval ls tasks`), {PAPER_TASKS}, or a task file in the folder given with --include-path"
            )
    return manager


def _covers(manager: TaskManager, name: str) -> bool:
    """Whether the manager has a task or, for a group, all its tasks."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return False
    children = (entry.cfg or {}).get("task", []) if entry.kind.name == "GROUP" else []
    return all(isinstance(child, str) and _covers(manager, child) for child in children)


def write_samples(samples: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """Write ``samples_<task>.jsonl``, one line for each example, and return the paths.

    A second task whose name gives the same file gets a number.
    """
    paths: list[Path] = []
    for task, records in samples.items():
        stem = "samples_" + re.sub(r"[^\w.-]+", "-", task)
        names = (f"{stem}{number}.jsonl" for number in ("", *(f"_{i}" for i in range(2, len(samples) + 1))))
        paths.append(next(path for path in map(folder.joinpath, names) if path not in paths))
        ordered = sorted(records, key=lambda record: record["doc_id"])
        lines = (json.dumps(record, default=handle_non_serializable, ensure_ascii=False) for record in ordered)
        write_text(paths[-1], "".join(f"{line}\n" for line in lines))
    return paths


def write_results(file: ReportFile, report: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> list[Path]:
    """Finish a report with its samples, and delete those of the report that it replaces.

    The report has the name and the sha256 of each file of samples, so that
    `sinklm.eval.compare.compare` does not use those of another report.

    Returns:
        the files of samples.
    """
    replaced = sample_files(file.path)
    paths = write_samples(samples, file.path.parent)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    named = [{"file": path.name, "sha256": digest} for path, digest in zip(paths, digests, strict=True)]
    file.finish(report | {"samples": dict(zip(samples, named, strict=True))})
    for path in set(replaced) - set(paths):
        path.unlink(missing_ok=True)
    return paths


def sample_files(report: Path) -> list[Path]:
    """Return the unchanged files of samples that a report names; none if it cannot be read."""
    try:
        listed = parse_json(report.read_bytes())["samples"].values()
        paths = {report.parent / Path(entry["file"]).name: entry["sha256"] for entry in listed}
        return [path for path, digest in paths.items() if hashlib.sha256(path.read_bytes()).hexdigest() == digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _metrics(row: dict[str, Any]) -> dict[str, float | None]:
    """Turn ``{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}`` into ``{"acc": 0.5, …}``.

    NaN and infinities, which JSON does not have, become None.
    """
    numbers = {key.removesuffix(",none"): value for key, value in row.items() if isinstance(value, int | float)}
    named = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    named.pop("sample_len", None)  # is in num_samples
    return named


def results_table(results: dict[str, Any], title: str) -> Table:
    """Return a table with one row for each task and metric, with its standard error."""
    table = Table(title=title)
    for header, justify in (("Task", "left"), ("Examples", "right"), ("Metric", "left"), ("Value", "right")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    table.add_column("± stderr", justify="right", no_wrap=True)
    for name, metrics in (results["tasks"] | results["groups"]).items():
        for metric, value, stderr in with_stderr(metrics):
            num_samples = results["num_samples"].get(name, {}).get("effective", "")
            shown = "" if stderr is None else _number(stderr)
            table.add_row(name, str(num_samples), metric, _number(value), shown)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "not a number"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
