"""Training speed and memory beside the field: this project, transformers, litgpt and a loop in nanoGPT's manner.

    python benchmarks/train.py --sizes 160m                                   # on one GPU
    python benchmarks/train.py --sizes 14m --contestants sinklm,trainer --ranks 2 --seq-length 512 --micro-batch-size 2
    python benchmarks/train.py --sizes 410m --contestants sinklm --ranks 1,2  # how near to linear two GPUs come

Needs what the project needs, and for litgpt `pip install --no-deps litgpt lightning lightning-utilities torchmetrics`
(its own requirements would take huggingface-hub, and with it transformers, back a long way). A contestant that is not
installed, runs out of memory or fails otherwise is reported and passed over.

All train the same shape on the same random tokens with the same micro-batch on every rank, one run each:

- ``sinklm``: this project's `sinklm train` as it comes (DeepSpeed ZeRO-1, bf16 on a GPU, float32 on a CPU) with one
  sink token, ``sinklm-none`` without, and so for each ``sink.kind``; the mean of the steps that it records in its
  `metrics.jsonl`;
- ``transformers``, ``litgpt``, ``nanogpt``: plain loops, see `train_peers.py`, each also with ``-bf16`` behind its name
  for bfloat16 weights; ``trainer``: transformers' Trainer.

MFU is `sinklm.models.cost.flops_per_token` × tokens/s over the device's dense 16-bit peak. "start" is the time from the
command to the end of the first step. "of linear" is the speed over that of the contestant's first number of ranks,
divided by how many times more ranks there are. Results are printed as they come, and written to --output as JSON and
Markdown.
"""

import argparse
import json
import os
import platform
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
import psutil
import torch
import transformers
from tokenizers import Tokenizer, models

from sinklm.models.cost import flops_per_token, peak_flops
from sinklm.train.config import TrainingConfig
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config

CONTESTANTS = "sinklm,sinklm-none,transformers,litgpt,nanogpt"
TOKENIZER_SIZE = 50277  # Pythia's
ROW_LENGTH = 2049  # of pre-shuffled rows, which need no preparation


def write_random_store(folder: Path, num_rows: int = 2048) -> Path:
    """Random tokens as pre-shuffled rows, and a tokenizer that has as many ids as Pythia's."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(0, TOKENIZER_SIZE, num_rows * ROW_LENGTH, dtype=np.uint16)
    tokens.tofile(folder / "rows.bin")
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, TOKENIZER_SIZE)}
    Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>")).save(str(folder / "tokenizer.json"))
    return folder


def launcher(num_ranks: int) -> list[str]:
    if num_ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


Settings = argparse.Namespace


def run_sinklm(contestant: str, ranks: int, recipe: str, store: Path, folder: Path, args: Settings) -> dict:
    """Start the project's own command, and end it when it has recorded the steps wanted, before it would save."""
    run_dir = folder / "run"
    config = config_of(contestant, recipe, args)
    overrides = [
        f"data.path={store}",
        f"train.run_dir={run_dir}",
        f"train.seq_length={args.seq_length}",
        f"train.batch_size_tokens={ranks * config.train.micro_batch_size * args.seq_length}",
        f"train.micro_batch_size={config.train.micro_batch_size}",
        "train.num_steps=100000",
        f"train.precision={'bf16' if torch.cuda.is_available() else 'fp32'}",
        "checkpoint.every_steps=null",
        "validation.every_steps=null",
        "wandb.mode=disabled",
        *sink_kind(contestant),
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
    return {
        "seconds_per_step": sum(line["seconds"] for line in steady) / len(steady),
        "memory_gib": steady[-1]["memory_gib"],
        "start": first_step_at - started,
    }


@contextmanager
def running(command: list[str], stdout: Any, stderr: Any) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block, nor do the ranks it has started in sessions of their own."""
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
    """When so many steps were on record, and they."""
    while process.poll() is None and time.time() < deadline:
        recorded = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        lines = [json.loads(line) for line in recorded if line.endswith("\n")]
        if len(lines) >= num_steps:
            return time.time(), lines
        time.sleep(0.05)
    raise RuntimeError(f"`sinklm train` ended or took too long before step {num_steps}")


def run_peer(contestant: str, ranks: int, recipe: str, store: Path, folder: Path, args: Settings) -> dict:
    task = {
        "contestant": contestant,
        "recipe": recipe,
        "store": str(store),
        "seq_length": args.seq_length,
        "micro_batch_size": config_of(contestant, recipe, args).train.micro_batch_size,
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
    return {**result, "start": result.pop("first_step_at") - started}


def last_words(output: str) -> str:
    """The line of an error among the last ones of a process."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("error:")]
    return (errors or lines or [""])[-1][:300]


def sink_kind(contestant: str) -> list[str]:
    name, _, kind = contestant.partition("-")
    return [f"model.sink.kind={kind}"] if name == "sinklm" and kind else []


def config_of(contestant: str, recipe: str, args: Settings) -> TrainingConfig:
    chosen = [f"train.micro_batch_size={args.micro_batch_size}"] if args.micro_batch_size else []
    return load_config(recipe, [*chosen, *sink_kind(contestant)])


def measure(contestant: str, ranks: int, size: str, store: Path, args: Settings) -> dict:
    """One contestant's row, or what it died of."""
    recipe = f"pythia-{size}"
    run = run_sinklm if contestant.startswith("sinklm") else run_peer
    row: dict = {"size": size, "contestant": contestant, "ranks": ranks}
    with tempfile.TemporaryDirectory() as folder:
        try:
            row |= run(contestant, ranks, recipe, store, Path(folder), args)
            config = config_of(contestant, recipe, args)
        except Exception as error:  # whatever it is, the others still want their turn
            return row | {"error": f"{type(error).__name__}: {error}"[:400]}
    row |= {"micro_batch_size": config.train.micro_batch_size}
    row["tokens_per_second"] = ranks * row["micro_batch_size"] * args.seq_length / row["seconds_per_step"]
    if torch.cuda.is_available() and (peak := peak_flops(torch.device("cuda", 0), "bf16")):
        operations = flops_per_token(Plan(config, 1, TOKENIZER_SIZE).model_config, args.seq_length)
        row["mfu"] = row["tokens_per_second"] * operations / (ranks * peak)
    return row


def table(rows: list[dict]) -> str:
    """Markdown. Faster than a contestant is the first one of the same size and ranks."""
    lines = [
        "| size | contestant | ranks | micro-batch | ms/step | tokens/s | MFU | memory, GiB | start, s "
        "| first is faster by | of linear |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple, float] = {}
    fewest: dict[tuple, dict] = {}
    for row in rows:
        begin = f"| {row['size']} | {row['contestant']} | {row['ranks']} "
        if "error" in row:
            lines.append(f"{begin}| | {row['error']} | | | | | | |")
            continue
        speed = row["tokens_per_second"]
        first.setdefault((row["size"], row["ranks"]), speed)
        base = fewest.setdefault((row["size"], row["contestant"]), row)
        linear = base["tokens_per_second"] * row["ranks"] / base["ranks"]
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        lines.append(
            f"{begin}| {row['micro_batch_size']} | {1e3 * row['seconds_per_step']:.1f} | {speed:,.0f} | {mfu} "
            f"| {row['memory_gib']:.1f} | {row['start']:.0f} | {first[row['size'], row['ranks']] / speed:.2f} × "
            f"| {f'{speed / linear:.1%}' if row['ranks'] > base['ranks'] else ''} |"
        )
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--micro-batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--num-warmup-steps", type=int, default=10)
    parser.add_argument("--num-steps", type=int, default=30)
    parser.add_argument("--ranks", default="1", help="one number or several")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one contestant")
    parser.add_argument("--output", type=Path, default=Path("results/train"), help="path without suffix")
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
                args.output.with_suffix(".json").write_text(json.dumps(report, indent=1, default=str) + "\n")
                args.output.with_suffix(".md").write_text(table(report["rows"]))
    print("\n" + table(report["rows"]))


if __name__ == "__main__":
    main()
