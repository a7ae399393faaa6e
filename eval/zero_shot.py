"""Zero-shot benchmarks with lm-eval.

sinklm's model prepends its sink tokens to every request and returns one row of logits for each
given token, so lm-eval's standard ``HFLM`` scores it correctly, provided that no other special
token is added.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import SinkGPTNeoXConfig
from ..models.checked import checked_passes
from ..versions import warn_if_untested

warn_if_untested("lm-eval")

PAPER_TASKS = "sinklm_paper"
TASK_FOLDER = Path(__file__).parent / "tasks"
PAPER_FOLDERS = ("arc", "hellaswag", "lambada", "openbookqa", "piqa", "winogrande")  # of lm-eval's tasks
SEED = 1234


def as_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int | str = 8,
    max_length: int | None = None,
) -> HFLM:
    """Wrap a model for lm-eval. Requests are truncated to ``max_length``, sink tokens included.

    Args:
        max_length: positions of a request; None: the trained length. lm-eval truncates contexts
            only: an answer longer than this raises an error.
    """
    ours = isinstance(model.config, SinkGPTNeoXConfig)
    num_positions = max_length or getattr(model.config, "max_position_embeddings", None)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=num_positions - model.config.num_sinks if ours else num_positions,
        add_bos_token=False if ours else None,  # None: use the tokenizer's default
        prefix_token_id=model.config.eos_token_id if ours else None,
        trust_remote_code=False,
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = (PAPER_TASKS,),
    *,
    limit: int | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Run lm-eval's tasks and return its results, ready for JSON.

    Args:
        tasks: names of tasks, groups or tags, or paths of task files. ``sinklm_paper`` is the
            paper's seven tasks.
        limit: score only this many examples of each task.
        include_path: folder of task files, which override lm-eval's tasks of the same name.
        num_fewshot: examples in the prompt; None uses each task's default.
        batch_size: requests per batch, or ``"auto"``.
        max_length: see :func:`as_lm`.

    Returns:
        ``{"tasks": {name: {metric: value, metric_stderr: …}}, "groups": …, "num_samples": …,
            "versions": …}``.

    Raises:
        ValueError: a task does not exist, or the model's outputs are not finite.
        FileNotFoundError: ``include_path`` does not exist.
        ConnectionError: a task's data set is neither available locally nor can be downloaded.
    """
    manager = task_manager(tasks, include_path)
    try:
        with checked_passes(model):
            output = simple_evaluate(
                model=as_lm(model, tokenizer, batch_size=batch_size, max_length=max_length),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                log_samples=False,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
    except ConnectionError as error:
        raise ConnectionError(
            f"a data set of {', '.join(tasks)} is not available locally and cannot be downloaded: {error}. Without "
            f"network, use local task files with --include-path (docs/evaluation.md shows one)"
        ) from error
    groups = output.get("groups", {})
    return {
        "tasks": {name: _metrics(row) for name, row in output["results"].items() if name not in groups},
        "groups": {name: _metrics(row) for name, row in groups.items()},
        "num_samples": output["n-samples"],
        "num_fewshot": output["n-shot"],
        "task_versions": output["versions"],
        "limit": limit,
        "seed": SEED,
    }


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
            raise ValueError(
                f"there is no task {name!r}: use one of lm-eval's (listed by `lm-eval ls tasks`), {PAPER_TASKS}, or "
                f"a task file in the folder given with --include-path"
            )
    return manager


def _covers(manager: TaskManager, name: str) -> bool:
    """Whether the manager has a task or, for a group, all its tasks."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return False
    children = (entry.cfg or {}).get("task", []) if entry.kind.name == "GROUP" else []
    return all(isinstance(child, str) and _covers(manager, child) for child in children)


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Turn ``{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": …}`` into ``{"acc": 0.5, …}``."""
    named = {key.removesuffix(",none"): value for key, value in row.items() if isinstance(value, int | float)}
    named.pop("sample_len", None)  # is in num_samples
    return named


def results_table(results: dict[str, Any], title: str) -> Table:
    """Return a table with one row for each task and metric, with its standard error."""
    table = Table(title=title)
    for header, justify in (("Task", "left"), ("Examples", "right"), ("Metric", "left"), ("Value", "right")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    table.add_column("± standard error", justify="right")
    for name, metrics in (results["tasks"] | results["groups"]).items():
        for metric, value in metrics.items():
            if "_stderr" in metric:
                continue
            num_samples = results["num_samples"].get(name, {}).get("effective", "")
            stderr = metrics.get(_stderr_key(metric), float("nan"))
            shown = "" if stderr != stderr else _number(stderr)
            table.add_row(name, str(num_samples), metric, _number(value), shown)
    return table


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"


def _stderr_key(metric: str) -> str:
    name, _, metric_filter = metric.partition(",")
    return f"{name}_stderr,{metric_filter}" if metric_filter else f"{name}_stderr"
