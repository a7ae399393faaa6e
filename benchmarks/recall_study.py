"""Train small models to recall lines, and measure StreamEval by distance and by tokens read.

    python benchmarks/recall_study.py prepare --text books.jsonl.zst
    python benchmarks/recall_study.py train      # again until it says that it is done
    python benchmarks/recall_study.py evaluate   # again until it says that it is done
    python benchmarks/recall_study.py collect

Every part can be interrupted and run again with the same settings: finished work is kept. Cache
sizes can be added. A job that fails does not stop the others. ``evaluate`` measures, for each model
and cache size N, the caches 0+N and S+(N - S), where S are its sinks (4 for vanilla), and of models
without windows dense attention: all distances over eight trained lengths, and for the caches two
distances along ``--num-stream-tokens``. ``train`` and ``evaluate`` stop after
``--minutes``. ``collect`` writes FOLDER/recall.json; recall_report.py makes tables from it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from math import ceil, log2
from pathlib import Path
from statistics import fmean
from typing import Any

import study_jobs
from study_settings import keep_settings
from transformers import PreTrainedTokenizerFast

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.data import TokenStore
from sinklm.eval.stream_eval import tokens_per_line
from sinklm.eval.tasks.stream_eval.records import make_records
from sinklm.files import write_json
from sinklm.train.recipe import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from jobs import SINKLM, Job
from results import of_training, read_report

MODELS = {"vanilla": 4, "learnable-sink": 1, "drawn": 1}  # recipes, and the tokens that their caches keep
CACHE_SIZES = (256, 512, 1000)
DISTANCES = (0, 5, 10, 20, 30, 40, 60, 80)  # in lines
BY_DISTANCE, ALONG = "by-distance", "along-the-stream"
ALONG_DISTANCES = (5, 20)  # 20 is that of the paper's Figure 9
DENSE_LENGTHS = 8  # of dense attention and of all distances, in trained lengths
QUESTIONS_AT_ONCE = 4  # of each stream; all would take twice the memory
PARTS_PER_OCTAVE = 4  # of the tokens read, in the accuracy along a stream
SETTINGS = {  # that change what a part makes; the others can differ between its calls
    "prepare": ("text", "num_tokens", "vocab_size", "longest_distance"),
    "train": ("overrides",),
    "evaluate": ("overrides", "num_samples", "num_stream_tokens"),
    "collect": ("overrides", "num_samples", "num_stream_tokens"),
}
MARGIN = 512  # tokens, for streams that are longer than the mean


def sinklm(*arguments: object) -> int:
    """Run a command of sinklm; return its exit status."""
    command = [sys.executable, "-m", "sinklm", *map(str, arguments)]
    print("$ sinklm", *arguments, flush=True)
    return subprocess.run(command).returncode


def prepare(args: argparse.Namespace) -> bool:
    """Generate records, train a tokenizer, and prepare a store of both sets."""
    folder = args.folder
    text, records = [str(Path(path).resolve()) for path in args.text], folder / "recall.jsonl.zst"
    tokenizer, store = folder / "tokenizer.json", folder / "store"
    sample, longest = folder / "recall-sample.jsonl", f"0-{args.longest_distance}"
    if not sample.exists() and sinklm("data", "generate", "recall", "-o", sample, "--num-documents", 3000, "--seed", 1):
        return False
    size = ("--vocab-size", args.vocab_size)
    if not tokenizer.exists() and sinklm("tokenizer", "train", *text, sample, *size, "-o", tokenizer):
        return False
    count = ("--num-tokens", args.num_tokens, "--tokenizer", tokenizer, "--distances", longest)
    if not records.exists() and sinklm("data", "generate", "recall", "-o", records, *count):
        return False
    if (store / "manifest.json").exists():
        return True
    return not sinklm("prepare", *text, records, "--tokenizer", tokenizer, "--split-sets", "-o", store)


def weights(store: Path) -> str:
    """Return ``data.weights``: half recall, the other sets by their tokens."""
    sets = TokenStore(store).manifest.splits["train"].sets
    num_text = sum(counts.tokens for name, counts in sets.items() if name != "recall")
    shares = {name: 1.0 if name == "recall" else counts.tokens / num_text for name, counts in sets.items()}
    return f"data.weights={json.dumps(shares)}"


def run_folder(args: argparse.Namespace, name: str) -> Path:
    return args.folder / "runs" / name


def train(args: argparse.Namespace) -> bool:
    """Train the models, ``--per-gpu`` at a time on each GPU."""
    store = args.folder / "store"
    settings = [f"data.path={store}", weights(store), "checkpoint.keep=1", *args.overrides]
    jobs = [study_jobs.training(run_folder(args, name), f"recall/{name}", settings, None) for name in MODELS]
    return study_jobs.run(jobs, study_jobs.Deadline(args.minutes), args.per_gpu)


def evaluations(args: argparse.Namespace) -> dict[tuple[str, str], dict[str, list[object]]]:
    """Return arguments of `sinklm eval stream-eval` by model and cache, and by what is measured."""
    found: dict[tuple[str, str], dict[str, list[object]]] = {}
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(args.folder / "tokenizer.json"))
    along = options(args, lines_in(args.num_stream_tokens, tokens), ALONG_DISTANCES, 50)
    for name, num_kept in MODELS.items():
        config = load_config(f"recall/{name}", args.overrides)
        length = DENSE_LENGTHS * config.train.seq_length
        by_distance = options(args, lines_in(min(length, args.num_stream_tokens), tokens), DISTANCES, 10)
        if config.model.attention.window is None:  # a cache so large that there is memory for one question at a time
            dense = ["--caches", f"0+{length + MARGIN}", "--batch-size", args.num_samples]
            found[name, "dense"] = {BY_DISTANCE: [*by_distance, *dense]}
        for size in args.cache_sizes:
            for kept in (0, num_kept):
                cache = f"{kept}+{size - kept}"
                own = ["--caches", cache, "--batch-size", QUESTIONS_AT_ONCE * args.num_samples]
                found[name, cache] = {BY_DISTANCE: [*by_distance, *own], ALONG: [*along, *own]}
    return found


def is_prepared(args: argparse.Namespace) -> bool:
    if not (found := (args.folder / "tokenizer.json").exists()):
        print(f"{args.folder} has no tokenizer.json: run the part prepare", flush=True)
    return found


def lines_in(num_tokens: int, tokenizer: PreTrainedTokenizerFast) -> int:
    """Return how many lines a stream of so many tokens has."""
    num_lines = 1000
    for _ in range(3):  # numbers of later lines have more tokens
        num_lines = int(num_tokens / tokens_per_line(tokenizer, make_records(1, num_lines, seed=0)[0]))
    return num_lines


def options(
    args: argparse.Namespace, num_lines: int, distances: Sequence[int], lines_per_question: int
) -> list[object]:
    """Return the arguments for a number of lines, with the distances that fit."""
    num_lines = num_lines // lines_per_question * lines_per_question + 1
    fitting = ",".join(str(distance) for distance in distances if distance < num_lines)
    lines = ["--num-lines", num_lines, "--lines-per-question", lines_per_question]
    return ["--distances", fitting, *lines, "--num-samples", args.num_samples]


def report_path(args: argparse.Namespace, name: str, cache: str, what: str) -> Path:
    return args.folder / "results" / name / cache / what / "stream_eval.json"


def evaluate(args: argparse.Namespace) -> bool:
    """Run the missing evaluations of trained models, ``--per-gpu`` at a time on each GPU."""
    if not is_prepared(args):
        return False
    untrained = [name for name in MODELS if not list_checkpoints(run_folder(args, name))]
    if untrained:
        print(f"not trained yet: {', '.join(untrained)}; run the part train", flush=True)
    jobs = []
    for (name, cache), measured in evaluations(args).items():
        for what, arguments in measured.items() if name not in untrained else ():
            output = report_path(args, name, cache, what).parent
            command = (*SINKLM, "eval", "stream-eval", run_folder(args, name), *arguments, "-o", output, "--quiet")
            jobs.append(Job(f"{name} {cache} {what}", tuple(map(str, command)), output / "evaluation.log"))
    # Those of dense attention need most memory, and so begin on different GPUs. Then short ones.
    jobs.sort(key=lambda job: ("dense" not in job.name, ALONG in job.name))
    return study_jobs.run(jobs, study_jobs.Deadline(args.minutes), args.per_gpu) and not untrained


def collect(args: argparse.Namespace) -> bool:
    """Write what is measured into one file."""
    if not is_prepared(args):
        return False
    found: dict[str, dict[str, Any]] = {}
    is_done = True
    for (name, cache), measured in evaluations(args).items():
        paths = {what: report_path(args, name, cache, what) for what in measured}
        if all(path.exists() for path in paths.values()):
            run = run_folder(args, name)
            reports = {what: summary(read_report(path, run, path.parent)) for what, path in paths.items()}
            along = reports.get(ALONG, reports[BY_DISTANCE])
            found.setdefault(name, {})[cache] = reports[BY_DISTANCE] | {"parts": along["parts"]}
        else:
            is_done = False
    write_json(args.folder / "recall.json", {"models": found, "runs": trainings(args)})
    return is_done


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report of one cache, with the accuracy by place as means of parts of the stream.

    Parts have equal lengths on a logarithmic scale, and end at powers of two among others. Those
    without a place are left out, and so are the paths of the model.
    """
    (result,) = report.pop("results")
    parts = []
    for _, group in groupby(result.pop("places"), lambda place: part_of(place["mean_num_tokens"])):
        part = list(group)
        asked = [place["accuracy"] for place in part]
        accuracy = {d: round(fmean(found[d] for found in asked if d in found), 6) for d in asked[-1]}
        parts.append({"num_tokens": part[-1]["mean_num_tokens"], "num_places": len(part), "accuracy": accuracy})
    model = {key: value for key, value in report["model"].items() if key not in ("folder", "name_or_path")}
    return report | result | {"model": model, "parts": parts}


def part_of(num_tokens: float) -> int:
    """Return the number of the part in which a place is after so many tokens."""
    return ceil(PARTS_PER_OCTAVE * log2(num_tokens))


def trainings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: of_training(run) for name in MODELS if list_checkpoints(run := run_folder(args, name))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "train", "evaluate", "collect"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of all recipes")
    parser.add_argument("--folder", type=Path, default=Path("recall-study"))
    parser.add_argument("--text", action="append", default=[], help="text to train on; repeat for more")
    parser.add_argument("--num-tokens", type=int, default=262_000_000, help="of the records")
    parser.add_argument("--vocab-size", type=int, default=4095, help="of the tokenizer, without the sink")
    parser.add_argument("--longest-distance", type=int, default=60, help="in lines")
    parser.add_argument("--num-samples", type=int, default=100)
    parser.add_argument("--num-stream-tokens", type=int, default=205_000)
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=list(CACHE_SIZES))
    study_jobs.add_options(parser)
    args = parser.parse_intermixed_args()
    keep_settings(args.folder, {name: getattr(args, name) for name in SETTINGS[args.part]})
    is_done = {"prepare": prepare, "train": train, "evaluate": evaluate, "collect": collect}[args.part](args)
    print("done" if is_done else "not done: run the same command again, or look at the errors above", flush=True)
    sys.exit(0 if is_done else 75)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again")
