"""Reports as the evaluation commands write them, with chosen numbers."""

import json
import statistics
from pathlib import Path

from sinklm.eval.report import ReportFile
from sinklm.eval.zero_shot import write_results

STREAMED = {"configuration": "4+60", "method": "streaming", "num_scored": 9, "perplexity": 9.5, "bits_per_byte": None}
STREAMED_TEXT = {"sha256": "x", "num_tokens": 100, "num_prefix_tokens": 0, "num_bytes": 300}
ANSWERED = {"task": "arc_easy", "configuration": "4+60", "num_questions": 1, "right": "1", "stderr": None}
ANSWERED |= {"exact_match": 1.0}


def write_zero_shot(folder: Path, outcomes: list[float] | None, *, acc: float | None = None, **changes) -> Path:
    """A report of one task as `zero_shot` writes it, and the samples if there are outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    num = len(outcomes or [0] * 50)
    mean = statistics.fmean(outcomes) if acc is None else acc
    report = {
        "model": {},
        "tasks": {"piqa": {"acc": mean, "acc_stderr": 0.05, "perplexity": 12.5, "perplexity_stderr": None}},
        "groups": {},
        "group_tasks": {},
        "num_samples": {"piqa": {"original": 100, "effective": num}},
        "num_fewshot": {"piqa": 0},
        "task_versions": {"piqa": 1.0},
        "questions_sha256": {"piqa": "q"},
        "prompts_sha256": {"piqa": "p"},
        "limit": None,
        "apply_chat_template": False,
    }
    samples = [
        {"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "acc": value, "text": "a\u2028b"}
        for i, value in enumerate(outcomes or ())
    ]
    file = ReportFile(folder / "zero_shot.json")
    write_results(file, report | changes, {"piqa": [*reversed(samples)]} if samples else {})
    return folder


def write_perplexity(path: Path, sets: dict[str, float], **changes) -> str:
    """A report of `sinklm eval perplexity`; the last set is the total."""
    rows = [{"set": name, "perplexity": value, "bits_per_byte": None, "num_tokens": 9} for name, value in sets.items()]
    report = {"model": {"dtype": "float32"}, "store_fingerprint": "f", "length": 256, "results": rows}
    path.write_text(json.dumps(report | changes))
    return str(path)


def write_stream_eval(path: Path, accuracy: float, **more) -> str:
    columns = [{"lines": 20, "accuracy": accuracy, "num_questions": 152}]
    report = {"num_samples": 8, "num_lines": 200, "seed": 0, "tokens_per_line": 20.0, **more}
    path.write_text(json.dumps(report | {"results": [{"configuration": "4+252", "distances": columns}]}))
    return str(path)


def streamed(**changes) -> str:
    report = {"model": {"num_sinks": 0}, "bin_edges": [], "text": STREAMED_TEXT, "results": [STREAMED | changes]}
    return json.dumps(report)


def answered(**changes) -> str:
    return json.dumps({"questions_sha256": {"arc_easy": "x"}, "results": [ANSWERED | changes]})


def write_streamed(path: Path, num_sinks: int, *, is_old: bool = False, **changes) -> str:
    """Write a report on 100 tokens. A model with a sink scores the first one too."""
    text = {"sha256": "x", "ids_sha256": "i", "num_tokens": 100, "num_prefix_tokens": 0, "num_bytes": 300}
    scores = {"perplexity": 10.0, "bits_per_byte": 1.0, "num_scored": 99, "num_bytes_scored": 297}
    for values in (scores, text):
        values |= {key: value for key, value in changes.items() if key in values}
    result = {"configuration": "dense", "method": "dense", **scores}
    result["num_scored"] += num_sinks
    result["num_bytes_scored"] += 3 * num_sinks
    result["perplexity"] += num_sinks  # of the first token
    result |= {} if is_old else {"after_first": scores}
    report = {"model": {"num_sinks": num_sinks}, "bin_edges": [], "text": text, "results": [result]}
    path.write_text(json.dumps(report))
    return str(path)
