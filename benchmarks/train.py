"""Compare training speed and memory: sinklm, transformers, litgpt and a loop like nanoGPT's.

    python benchmarks/train.py --sizes 160m                                   # on one GPU
    python benchmarks/train.py --sizes 410m --contestants sinklm --ranks 1,2  # scaling to two GPUs
    python benchmarks/train.py --sizes 14m --contestants sinklm,trainer --ranks 2 \\
        --seq-length 512 --micro-batch-size 2

Needs sinklm's requirements, and for litgpt `pip install --no-deps litgpt lightning
lightning-utilities torchmetrics` (its requirements would downgrade huggingface-hub and
transformers). A contestant that is not installed, runs out of memory or fails otherwise is reported
and skipped.

All train the same shape on the same random tokens with the same micro-batch on every rank, one run
each. A step is --micro-batches micro-batches and an update. Recipes have many (160M: 32 on one
GPU); with the default of 1, a run is shorter and the update is a larger part of the time.

The contestants:

- ``sinklm``: `sinklm train` with default settings (DeepSpeed ZeRO-1, bf16 on a GPU, float32 on a
  CPU) and one sink token; ``sinklm-none`` without, and likewise for each ``sink.kind``;
  ``sinklm-muon`` with Muon. The time is the mean of the steps recorded in `metrics.jsonl`, with
  their standard deviation.
- ``transformers``, ``litgpt``, ``nanogpt``: plain loops, see `train_peers.py`; with the suffix
  ``-bf16`` they have bfloat16 weights.
- ``trainer``: transformers' Trainer.

MFU is `sinklm.models.cost.flops_per_token` × tokens/s over the device's dense 16-bit peak. "start"
is the time from the command to the end of the first step. "of linear" is the speed-up over the
contestant's first number of ranks, divided by the ratio of ranks. Results are printed immediately,
and written to --output as JSON and Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import part_report
import psutil
import torch
import transformers
from tokenizers import Tokenizer, models

from sinklm.models.cost import flops_per_token, peak_flops
from sinklm.train.config import TrainingConfig
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.summary import PYTHIA_TOKENIZER_SIZE

CONTESTANTS = "sinklm,sinklm-none,transformers,litgpt,nanogpt"
ROW_LENGTH = 2049  # length of pre-shuffled rows, which need no preparation


def write_random_store(folder: Path, num_rows: int = 2048) -> Path:
    """Write random tokens as pre-shuffled rows, and a tokenizer with as many ids as Pythia's."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, PYTHIA_TOKENIZER_SIZE, num_rows * ROW_LENGTH, dtype=np.uint16)
    tokens.tofile(folder / "rows.bin")
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, PYTHIA_TOKENIZER_SIZE)}
    Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")).save(str(folder / "tokenizer.json"))
    return folder


def launcher(num_ranks: int) -> list[str]:
    if num_ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


Settings = argparse.Namespace


def run_sinklm(contestant: str, ranks: int, recipe: str, store: Path, folder: Path, args: Settings) -> dict:
    """Start `sinklm train`, and end it after the required steps, before it saves."""
    run_dir = folder / "run"
    config = config_of(contestant, recipe, args)
    overrides = [
        f"data.path={store}",
        f"train.run_dir={run_dir}",
        f"train.seq_length={args.seq_length}",
        f"train.batch_size_tokens={tokens_per_step(ranks, config, args)}",
        f"train.micro_batch_size={config.train.micro_batch_size}",
        "train.num_steps=100000",
        f"train.precision={'bf16' if torch.cuda.is_available() else 'fp32'}",
        "checkpoint.every_steps=null",
        "validation.every_steps=null",
        "wandb.mode=disabled",
        *own_settings(contestant),
        *args.overrides,
    ]
    started, metrics, log = time.time(), run_dir / "metrics.jsonl", folder / "log"
    command = [*launcher(ranks), "-m", "sinklm.train", recipe, *overrides]
    try:
        with open(log, "w", encoding="utf-8") as output, running(command, output, subprocess.STDOUT) as process:
            first_step_at, _ = wait_for_steps(1, metrics, process, started + args.timeout)
            _, lines = wait_for_steps(args.num_warmup_steps + args.num_steps, metrics, process, started + args.timeout)
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {last_words(log.read_text(encoding='utf-8'))}") from error
    steady = lines[args.num_warmup_steps :][: args.num_steps]
    seconds = [line["seconds"] for line in steady]
    return {
        "seconds_per_step": statistics.fmean(seconds),
        "stdev": part_report.spread(seconds),
        "memory_gib": steady[-1]["memory_gib"],
        "start": first_step_at - started,
    }


@contextmanager
def running(command: list[str], stdout: Any, stderr: Any) -> Iterator[subprocess.Popen]:
    """Run a process, and kill it and the ranks it has started at the end of the block."""
    process = subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            started = psutil.Process(process.pid)
            for one in [*started.children(recursive=True), started]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def wait_for_steps(
    num_steps: int, metrics: Path, process: subprocess.Popen, deadline: float
) -> tuple[float, list[dict]]:
    """Wait until ``num_steps`` are recorded. Returns the time and the recorded lines."""
    while process.poll() is None and time.time() < deadline:
        recorded = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        lines = [json.loads(line) for line in recorded if line.endswith("\n")]
        if len(lines) >= num_steps:
            return time.time(), lines
        time.sleep(0.05)
    raise RuntimeError(f"`sinklm train` ended or exceeded --timeout before step {num_steps}")


def run_peer(contestant: str, ranks: int, recipe: str, store: Path, folder: Path, args: Settings) -> dict:
    task = {
        "contestant": contestant,
        "recipe": recipe,
        "store": str(store),
        "seq_length": args.seq_length,
        "micro_batch_size": config_of(contestant, recipe, args).train.micro_batch_size,
        "num_micro_batches": args.micro_batches,
        "num_warmup_steps": args.num_warmup_steps,
        "num_steps": args.num_steps,
    }
    started = time.time()
    command = [*launcher(ranks), str(Path(__file__).with_name("train_peers.py")), json.dumps(task)]
    with running(command, subprocess.PIPE, subprocess.PIPE) as process:
        stdout, stderr = process.communicate(timeout=args.timeout)
    if process.returncode:
        raise RuntimeError(last_words(stderr))
    result = json.loads(stdout.splitlines()[-1])
    start = result.pop("first_step_at") - started
    return {**result, "start": start}


def last_words(output: str) -> str:
    """Return the last line of a process's output with an error, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]


def own_settings(contestant: str) -> list[str]:
    name, _, kind = contestant.partition("-")
    if name != "sinklm" or not kind:
        return []
    return ["optimizer.name=muon"] if kind == "muon" else [f"model.sink.kind={kind}"]


def tokens_per_step(ranks: int, config: TrainingConfig, args: Settings) -> int:
    return ranks * args.micro_batches * config.train.micro_batch_size * args.seq_length


def config_of(contestant: str, recipe: str, args: Settings) -> TrainingConfig:
    chosen = [f"train.micro_batch_size={args.micro_batch_size}"] if args.micro_batch_size else []
    return load_config(recipe, [*chosen, *own_settings(contestant)])


def measure(contestant: str, ranks: int, size: str, store: Path, args: Settings) -> dict:
    """Return the row of one contestant, with its error if it failed."""
    recipe = f"pythia-{size}"
    run = run_sinklm if contestant.startswith("sinklm") else run_peer
    row: dict = {"size": size, "contestant": contestant, "ranks": ranks}
    with tempfile.TemporaryDirectory() as folder:
        try:
            row |= run(contestant, ranks, recipe, store, Path(folder), args)
            config = config_of(contestant, recipe, args)
        except Exception as error:  # the other contestants are still measured
            return row | {"error": f"{type(error).__name__}: {error}"[:400]}
    row |= {"micro_batch_size": config.train.micro_batch_size, "num_micro_batches": args.micro_batches}
    row["tokens_per_second"] = tokens_per_step(ranks, config, args) / row["seconds_per_step"]
    if torch.cuda.is_available() and (peak := peak_flops(torch.device("cuda", 0), "bf16")):
        operations = flops_per_token(Plan(config, 1, PYTHIA_TOKENIZER_SIZE).model_config, args.seq_length)
        row["mfu"] = row["tokens_per_second"] * operations / (ranks * peak)
    return row


def table(rows: list[dict]) -> str:
    """Return a Markdown table; speeds are relative to the first row of a size and ranks."""
    first: dict[tuple, float] = {}
    fewest: dict[tuple, dict] = {}
    cells = []
    for row in rows:
        cells.append({key: row[key] for key in ("size", "contestant", "ranks")})
        if "error" in row:
            cells[-1]["error"] = row["error"]
            continue
        speed = row["tokens_per_second"]
        first.setdefault((row["size"], row["ranks"]), speed)
        base = fewest.setdefault((row["size"], row["contestant"]), row)
        linear = base["tokens_per_second"] * row["ranks"] / base["ranks"]
        cells[-1] |= {
            "micro-batch": f"{row['num_micro_batches']} × {row['micro_batch_size']}",
            "ms/step": milliseconds(row),
            "tokens/s": f"{speed:,.0f}",
            "MFU": f"{row['mfu']:.1%}" if "mfu" in row else "",
            "memory, GiB": f"{row['memory_gib']:.1f}",
            "start, s": f"{row['start']:.0f}",
            "first is faster by": f"{first[row['size'], row['ranks']] / speed:.2f} ×",
            "of linear": f"{speed / linear:.1%}" if row["ranks"] > base["ranks"] else "",
        }
    return part_report.table(cells) + "\n"


def milliseconds(row: dict) -> str:
    """Return the mean of the steps and their standard deviation."""
    spread = "" if row["stdev"] is None else f" ± {1e3 * row['stdev']:.1f}"
    return f"{1e3 * row['seconds_per_step']:.1f}{spread}"


def environment(args: Settings) -> dict:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {len(os.sched_getaffinity(0))} cores"
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"device": device, **versions, "settings": settings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="160m")
    parser.add_argument("--contestants", default=CONTESTANTS)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, help="default: the recipe's value")
    parser.add_argument("--micro-batches", type=int, default=1, help="micro-batches of an update, on each rank")
    parser.add_argument("--num-warmup-steps", type=int, default=10)
    parser.add_argument("--num-steps", type=int, default=30)
    parser.add_argument("--ranks", default="1", help="numbers of ranks, separated by commas")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each contestant")
    parser.add_argument(
        "--output", type=Path, default=Path("results/train"), help="path of the files, to which .json and .md are added"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for `sinklm train`")
    args = parser.parse_intermixed_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {**environment(args), "rows": []}
    print(report["device"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = write_random_store(Path(folder) / "store")
        for size in args.sizes.split(","):
            for contestant, ranks in product(args.contestants.split(","), map(int, args.ranks.split(","))):
                report["rows"].append(measure(contestant, ranks, size, store, args))
                print(table(report["rows"]).splitlines()[-1], flush=True)
                Path(f"{args.output}.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
                Path(f"{args.output}.md").write_text(table(report["rows"]))
    print("\n" + table(report["rows"]))


if __name__ == "__main__":
    main()
