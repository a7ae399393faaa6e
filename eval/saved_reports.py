"""Reads the reports of models: values, with the settings that must be equal for a difference."""

import hashlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..hub import near_path_hint
from ..parsing import parse_json
from ..perplexity import perplexity_of
from .report import default_output
from .tasks.stream_eval.records import LINES_PER_QUESTION

LARGEST = perplexity_of(math.inf)  # of a number in a report
ALL_SETS = "all sets"  # in tables; a set may have the name "all"
ROUNDING = 1e-3  # rows of a bfloat16 attention map sum to 1 within this tolerance
MEANS = ("acc", "acc_norm", "exact_match")  # metrics that are means over examples


@dataclass(frozen=True)
class Value:
    """A number of a report.

    Attributes:
        value, stderr: the number and its standard error, None if there is none.
        conditions: settings that must be equal for a difference.
        if_known: the same, such as the sha256 of the questions, but None in older reports, which
            are compared all the same.
        noted: settings that may change a number, but are no reason against a difference; the same
            in all values of a measurement.
        examples: the outcome of each example by its identity, if they were kept.
        scores_first: whether the value includes the first token of a text, for which only models
            with sinks, or with a token before a text, have a context.
        after_first: the value without that token; None if it is not known.
    """

    value: float
    stderr: float | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    if_known: dict[str, Any] = field(default_factory=dict)
    noted: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, float] | None = None
    scores_first: bool = False
    after_first: float | None = None


Key = tuple[str, str, str]  # measurement, what was measured, metric


@dataclass
class Run:
    """The reports of one model."""

    name: str
    files: list[Path]
    values: dict[Key, Value] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def short_names(names: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that are different, such as ``vanilla``."""
    paths = [Path(os.path.abspath(name)) for name in names]
    parts = [(path.parent if path.name in READERS else path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        ends = [str(Path(*part[-length:])) for part in parts]
        if len(set(ends)) == len(set(parts)):
            break
    counts: dict[str, int] = {}
    unique = []
    for end in ends:
        counts[end] = counts.get(end, 0) + 1
        unique.append(end if counts[end] == 1 else f"{end} ({counts[end]})")
    return unique


def read_run(name: str, label: str) -> Run:
    """Read the reports of one run; see `compare`."""
    path = Path(name)
    folders = list({os.path.realpath(one): one for one in (path, path / "results", default_output(name))}.values())
    found = {folder: [folder / file for file in READERS if (folder / file).is_file()] for folder in folders}
    used, *unused = [folder for folder in folders if found[folder]] or [path]
    files = [path] if path.is_file() else found[used]
    if not files and not path.exists() and (path.parent.is_dir() or path.suffix == ".json"):
        raise FileNotFoundError(f"{name}: no such file or folder; {near_path_hint(name) or 'check the path'}")
    if not files:
        raise FileNotFoundError(
            f"{name}{'' if path.exists() else ' is no file or folder here, and'} has no results: evaluate it first "
            f"(sinklm eval zero-shot {name}), or pass the folder given as "
            f"--output; looked for {', '.join(READERS)} in {', '.join(map(str, folders))}"
        )
    run = Run(label, files)
    if unused:
        run.notes.append(f"results of {used}; not used: {', '.join(map(str, unused))}")
    reports = {file: _read_json(file) for file in files}
    kinds = {file: _kind_of(file, report) for file, report in reports.items()}
    _check_same_model(reports)
    for file, report in reports.items():
        measurement, _, read = READERS[kinds[file]]
        try:
            for (what, metric), value in read(report, file, run.notes):
                _check_numbers(what, metric, value)
                noted = {"dtype": _model(report).get("dtype")} | value.noted
                run.values[measurement, what, metric] = replace(value, noted=noted)
        except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            # RecursionError: a group that contains itself
            raise ValueError(
                f"{file} is not a complete report of sinklm ({error!r}): run the evaluation again"
            ) from error
    return run


def _check_same_model(reports: dict[Path, dict[str, Any]]) -> None:
    """Raise a ValueError if the reports of a folder name several models.

    A path may be absolute in one report and relative in another one.
    """
    named = {file: model for file, report in reports.items() if (model := _name_of_model(report))}
    for (first, ours), (file, theirs) in itertools.combinations(named.items(), 2):
        short, long = sorted((_parts(ours), _parts(theirs)), key=len)
        if short != long[len(long) - len(short) :]:
            raise ValueError(
                f"{first} is of the model {ours}, but {file} of {theirs}: evaluate each model, or checkpoint, into a "
                "folder of its own (--output)"
            )


def _name_of_model(report: dict[str, Any]) -> str:
    """Return the folder or the Hub's name of a report's model, empty if it has none.

    A model of the Hub has its folder in the cache if the Hub could not be reached.
    """
    model = _model(report)
    folder = str(model.get("folder") or model.get("name_or_path") or "")
    in_cache = re.search(r"models--(.+?)/snapshots/", folder)
    return in_cache[1].replace("--", "/") if in_cache else folder


def _model(report: dict[str, Any]) -> dict[str, Any]:
    model = report.get("model")
    return model if isinstance(model, dict) else {}


def _length(report: dict[str, Any]) -> int | None:
    """Return the length of requests or windows, sinks included; older reports have it elsewhere."""
    return report.get("length") or report.get("max_length") or _model(report).get("max_position_embeddings")


def _parts(path: str) -> list[str]:
    return [part for part in Path(os.path.normpath(path)).parts if part not in ("..", os.sep)]


def _check_numbers(what: str, metric: str, value: Value) -> None:
    for number in (value.value, *(one for one in (value.stderr, value.after_first) if one is not None)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= LARGEST:
            raise TypeError(f"{what} {metric} is {str(number)[:40]!r} and not a number")
    if not isinstance(what, str):
        raise TypeError(f"a name is {str(what)[:40]!r} and not a text")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _read_json(file: Path) -> Any:
    try:
        return parse_json(file.read_bytes(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def _kind_of(file: Path, report: Any) -> str:
    """Return the name under which a report is written, from its keys: files may be renamed."""
    for kind, (_, key, _) in READERS.items():
        if isinstance(report, dict) and key in report:
            return kind
    raise ValueError(f"{file} is not a report that can be compared: use one of {', '.join(READERS)}")


Reading = Iterator[tuple[tuple[str, str], Value]]


def _zero_shot(report: dict[str, Any], file: Path, notes: list[str]) -> Reading:
    for task, metrics in (report["tasks"] | report["groups"]).items():
        leaves = _tasks_of(task, report)
        settings = ("limit", "apply_chat_template", "max_length", "model_args")
        conditions = {name: report.get(name) or None for name in settings}
        of_tasks = {"num_fewshot": "num_fewshot", "task_versions": "task_versions", "number of examples": "num_samples"}
        conditions |= {name: [report[key].get(leaf) for leaf in leaves] for name, key in of_tasks.items()}
        questions = _digests(report, "questions_sha256", leaves)
        # a chat template is that of the model, so its prompts differ
        prompts = None if report.get("apply_chat_template") else _digests(report, "prompts_sha256", leaves)
        if_known = {"questions": questions, "prompts": prompts}
        samples = _read_samples(task, report, file, notes)
        for metric, value, stderr in with_stderr(metrics):
            if value is None or not math.isfinite(value):
                continue
            name, _, metric_filter = metric.partition(",")
            examples = _outcomes(samples, name, metric_filter or "none", value)
            if samples and examples is None and name in MEANS:
                notes.append(f"{task} {metric}: its samples are not averaged to its value, so it is not paired")
            noted = {"length": _length(report)}
            yield (task, metric), Value(value, stderr, conditions, if_known, noted, examples)


def _digests(report: dict[str, Any], key: str, leaves: list[str]) -> list[str] | None:
    """Return the hashes of several tasks, None if an older version did not write one."""
    digests = [report.get(key, {}).get(leaf) for leaf in leaves]
    return None if None in digests else digests


def with_stderr(metrics: dict[str, float | None]) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield each metric of a task with its value and its standard error, None if there is none.

    That of ``acc`` is ``acc_stderr``, and that of ``acc,a filter`` is ``acc_stderr,a filter``.
    """
    for metric, value in metrics.items():
        if "_stderr" in metric:
            continue
        name, comma, metric_filter = metric.partition(",")
        stderr = metrics.get(f"{name}_stderr{comma}{metric_filter}")
        yield metric, value, stderr if stderr is not None and math.isfinite(stderr) else None


def _tasks_of(name: str, report: dict[str, Any]) -> list[str]:
    """Return a task itself, or the tasks of a group and of the groups in it."""
    if children := report.get("group_tasks", {}).get(name):
        return sorted(leaf for child in children for leaf in _tasks_of(child, report))
    return sorted(report["tasks"]) if name in report["groups"] else [name]


def _read_samples(task: str, report: dict[str, Any], file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the samples of a report's task: none if its file is that of another report by now."""
    if (entry := report.get("samples", {}).get(task)) is None:
        return []
    path = file.parent / Path(entry["file"]).name
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        notes.append(f"{task}: {path.name} is missing or of another evaluation, so it is not paired")
        return []
    try:
        return [parse_json(line) for line in content.split(b"\n") if line]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; run sinklm eval zero-shot --log-samples again") from error


def _outcomes(samples: list[dict[str, Any]], metric: str, metric_filter: str, mean: float) -> dict[str, float] | None:
    """Return the metric of each example, if the samples are those that the value is the mean of."""
    found = {
        f"{sample['doc_id']} {sample['doc_hash']}": float(sample[metric])
        for sample in samples
        if sample.get("filter") == metric_filter and isinstance(sample.get(metric), int | float)
    }
    is_mean = found and math.isclose(math.fsum(found.values()) / len(found), mean, rel_tol=1e-9, abs_tol=1e-12)
    return found if is_mean else None


def _set_perplexity(report: dict[str, Any], file: Path, notes: list[str]) -> Reading:
    results = report["results"]
    for result in results:
        is_last = result is results[-1] and result["set"] == "all"  # the total of older reports
        name = ALL_SETS if result.get("is_total", is_last) else result["set"]
        conditions = {"store": report["store_fingerprint"], "number of tokens": result["num_tokens"]}
        if_known = {"length of a window": _length(report)}
        yield (name, "perplexity"), Value(result["perplexity"], None, conditions, if_known)
        if result["bits_per_byte"] is not None:
            yield (name, "bits per byte"), Value(result["bits_per_byte"], None, conditions, if_known)


def _streaming(report: dict[str, Any], file: Path, notes: list[str]) -> Reading:
    text = report["text"]
    scores_first = bool(report["model"]["num_sinks"] or text["num_prefix_tokens"])  # others have no context for it
    for result in report["results"]:
        rest = result.get("after_first")
        scored = rest or result
        same = {"text": text["sha256"]}
        if rest is None:  # of an older version
            same["the first token: evaluate both again"] = scores_first
        if result["method"] == "recompute":
            same["recompute_every"] = report.get("recompute_every")
        num_scored = scored["num_scored"] - (rest is None and scores_first)
        tokens = {"tokens": text.get("ids_sha256"), "number of tokens scored": num_scored}
        after_first = rest and rest["perplexity"]
        value = Value(result["perplexity"], None, same | tokens, scores_first=scores_first, after_first=after_first)
        yield (result["configuration"], "perplexity"), value
        if result.get("bits_per_byte") is not None:  # of other tokenizers too, so the number of tokens may differ
            is_whole = num_scored == text["num_tokens"] - 1
            num_bytes = text["num_bytes"] if is_whole else scored["num_bytes_scored"]
            same["number of bytes scored"] = num_bytes
            after_first = rest and rest["bits_per_byte"]
            value = Value(result["bits_per_byte"], None, same, scores_first=scores_first, after_first=after_first)
            yield (result["configuration"], "bits per byte"), value


def _stream_eval(report: dict[str, Any], file: Path, notes: list[str]) -> Reading:
    conditions = {name: report[name] for name in ("num_samples", "num_lines", "seed")}
    conditions["lines_per_question"] = report.get("lines_per_question", LINES_PER_QUESTION)  # not in older reports
    for result in report["results"]:
        for column in result["distances"]:
            name = f"{result['configuration']}, {column['lines']} lines back"
            yield (name, "accuracy"), Value(column["accuracy"], None, conditions)


def _stream_qa(report: dict[str, Any], file: Path, notes: list[str]) -> Reading:
    for result in report["results"]:
        questions = report["questions_sha256"][result["task"]]
        conditions = {"questions": questions, "number of questions": result["num_questions"]}
        examples = {str(i): float(character == "1") for i, character in enumerate(result["right"])}
        name = f"{result['task']}, {result['configuration']}"
        yield (name, "exact match"), Value(result["exact_match"], result["stderr"], conditions, examples=examples)


def _sinks(report: dict[str, Any], file: Path, notes: list[str]) -> Reading:
    text = report["text"]
    source = text.get("sha256") or text.get("fingerprint") if isinstance(text, dict) else text
    conditions = {"text": source, **{name: report[name] for name in ("num_sequences", "seq_length", "epsilon")}}
    for name, rate in report["sink_rate"].items():
        if report["positions"].get(name) == -1 and abs(report["mass"][name]) <= ROUNDING:
            continue  # of models whose attention maps sum to 1
        if report["positions"].get(name) != -1:
            yield (name, "sink rate"), Value(rate, None, conditions)
        yield (name, "attention"), Value(report["mass"][name], None, conditions)
    yield ("all positions", "massive activations"), Value(len(report["massive_activations"]), None, conditions)


# By the name of a file: the measurement, the key that its reports are known by, and their reader. A
# report may have several of the keys: the first one counts.
READERS: dict[str, tuple[str, str, Callable[[dict[str, Any], Path, list[str]], Reading]]] = {
    "zero_shot.json": ("zero-shot", "tasks", _zero_shot),
    "perplexity.json": ("perplexity", "store_fingerprint", _set_perplexity),
    "streaming.json": ("streaming", "bin_edges", _streaming),
    "stream_qa.json": ("stream-qa", "questions_sha256", _stream_qa),
    "stream_eval.json": ("stream-eval", "tokens_per_line", _stream_eval),
    "sinks.json": ("sinks", "sink_rate", _sinks),
}
