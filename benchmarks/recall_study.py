"""Train small models to recall lines, and measure StreamEval by distance and by tokens read.

    python benchmarks/recall_study.py prepare --text books.jsonl.zst
    python benchmarks/recall_study.py train      # again until it says that it is done
    python benchmarks/recall_study.py evaluate   # again until it says that it is done
    python benchmarks/recall_study.py table

Every part can be interrupted and run again with the same settings: finished work is kept. Cache
sizes can be added. A part that fails is reported, and the others still run. ``evaluate`` measures,
for each model and cache size N, the caches 0+N and S+(N - S) over ``--num-stream-tokens``, where S
are its sinks (4 for vanilla), and dense attention within the trained length. ``train`` stops after
``--minutes``, and ``evaluate`` starts nothing after them. Results are in FOLDER/recall.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from study_settings import keep_settings

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.data import TokenStore
from sinklm.train.recipe import load_config

MODELS = {"vanilla": 4, "learnable-sink": 1}  # recipes, and the first tokens that their caches keep
CACHE_SIZES = (256, 512, 1000)
SETTINGS = {  # that change what a part makes; the others can differ between its calls
    "prepare": ("text", "num_tokens", "vocab_size", "longest_distance"),
    "train": ("overrides",),
    "evaluate": ("overrides", "num_samples", "num_stream_tokens"),
    "table": ("overrides",),
}
TOKENS_PER_LINE = 24  # of StreamEval, at most, with a vocabulary of 4,096


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


def is_trained(args: argparse.Namespace, name: str) -> bool:
    return max(list_checkpoints(args.folder / "runs" / name), default=-1) >= num_steps(args, name)


def num_steps(args: argparse.Namespace, name: str) -> int:
    return load_config(f"recall/{name}", args.overrides).train.num_steps


def train(args: argparse.Namespace) -> bool:
    """Train the models one after another until the time is over."""
    end = time.monotonic() + 60 * args.minutes
    for name in MODELS:
        left = (end - time.monotonic()) / 60
        if is_trained(args, name):
            continue
        if left < 1:
            return False
        run = [f"data.path={args.folder / 'store'}", f"train.run_dir={args.folder / 'runs' / name}"]
        run += [weights(args.folder / "store"), f"train.max_minutes={left:.2f}", *args.overrides]
        sinklm("train", f"recall/{name}", *run)
    return all(is_trained(args, name) for name in MODELS)


def evaluations(args: argparse.Namespace) -> dict[tuple[str, str], list[object]]:
    """Return the arguments of each `sinklm eval stream-eval`, by model and what it measures."""
    found: dict[tuple[str, str], list[object]] = {}
    for name, num_kept in MODELS.items():
        length = load_config(f"recall/{name}", args.overrides).train.seq_length
        num_lines = (length // TOKENS_PER_LINE - 2) // 10 * 10 + 1  # whose tokens all fit the trained length
        near = [d for d in (0, 5, 10, 20, 30, 40, 60) if d < num_lines]
        counts = ["--num-samples", args.num_samples, "--batch-size", args.num_samples]
        dense = ["--caches", f"0+{length}", "--distances", ",".join(map(str, near)), "--num-lines", num_lines, *counts]
        found[name, "dense"] = dense
        long = args.num_stream_tokens // TOKENS_PER_LINE // 10 * 10 + 1
        for size in args.cache_sizes:
            caches = f"0+{size},{num_kept}+{size - num_kept}"
            inside = [d for d in (0, 5, 10, 20, 30, 40, 60, 80) if d < long]
            distances = ["--caches", caches, "--distances", ",".join(map(str, inside)), "--num-lines", long]
            found[name, f"stream {size}"] = [*distances, *counts]
    return found


def evaluate(args: argparse.Namespace) -> bool:
    """Run the evaluations that are missing; none starts after the time is over."""
    end = time.monotonic() + 60 * args.minutes
    is_done = True
    for (name, what), arguments in evaluations(args).items():
        output = args.folder / "results" / name / what.replace(" ", "-")
        if (output / "stream_eval.json").exists():
            continue
        if not is_trained(args, name) or time.monotonic() > end:
            is_done = False
            continue
        status = sinklm("eval", "stream-eval", args.folder / "runs" / name, *arguments, "-o", output, "--quiet")
        is_done = is_done and status == 0
    return is_done


def table(args: argparse.Namespace) -> bool:
    """Print accuracies in percent, and write all reports into one file."""
    collected: dict[str, dict[str, Any]] = {}
    print(f"{'model':<16}{'attention':<14}accuracy (%) by distance in lines")
    for name, what in evaluations(args):
        path = args.folder / "results" / name / what.replace(" ", "-") / "stream_eval.json"
        if not path.exists():
            print(f"{name:<16}{what:<14}not measured")
            continue
        report = json.loads(path.read_text())
        collected.setdefault(name, {})[what] = report
        for result in report["results"]:
            cells = " ".join(f"{d['lines']}: {100 * d['accuracy']:.1f}" for d in result["distances"])
            print(f"{name:<16}{'dense' if what == 'dense' else result['configuration']:<14}{cells}")
            thirds = [place["accuracy"] for place in result["places"]][:: max(1, len(result["places"]) // 4)]
            shown = ", ".join(f"{100 * next(iter(found.values())):.0f}" for found in thirds if found)
            print(f"{'':<16}{'':<14}shortest distance, along the stream: {shown}")
    (args.folder / "recall.json").write_text(json.dumps(collected, indent=1) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "train", "evaluate", "table"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of both recipes")
    parser.add_argument("--folder", type=Path, default=Path("recall-study"))
    parser.add_argument("--text", action="append", default=[], help="text to train on; repeat for more")
    parser.add_argument("--num-tokens", type=int, default=200_000_000, help="of the records")
    parser.add_argument("--vocab-size", type=int, default=4095, help="of the tokenizer, without the sink")
    parser.add_argument("--longest-distance", type=int, default=60, help="in lines")
    parser.add_argument("--minutes", type=float, default=9.0, help="of train and evaluate, in one call")
    parser.add_argument("--num-samples", type=int, default=100)
    parser.add_argument("--num-stream-tokens", type=int, default=200_000)
    parser.add_argument("--cache-sizes", type=int, nargs="+", default=list(CACHE_SIZES))
    args = parser.parse_args()
    keep_settings(args.folder, {name: getattr(args, name) for name in SETTINGS[args.part]})
    is_done = {"prepare": prepare, "train": train, "evaluate": evaluate, "table": table}[args.part](args)
    print("done" if is_done else "not done: run the same command again, or look at the errors above", flush=True)
    sys.exit(0 if is_done else 75)


if __name__ == "__main__":
    main()
