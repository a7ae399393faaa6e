"""Kill training at random moments, run it again, and compare it with the undisturbed run.

    python benchmarks/fault_injection.py --kills 300 --output results/faults

For each ZeRO stage and number of ranks, a tiny model is trained to its end once. Then the same run
is killed (SIGKILL) again and again, after a random time since its start or since a step: all ranks
at once, or a single one, after which the others must end by themselves. Each time the same command
is run again, until the run reaches its end. Its weights and its `metrics.jsonl` (without times and
memory) must equal those of the undisturbed run bit for bit. Then the next run begins, until there
were enough kills. Checkpoints are saved asynchronously every two steps, so most kills hit a save.
Runs on a CPU.
"""

import argparse
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from sinklm.checkpoints.folders import interrupted_checkpoints, list_checkpoints
from sinklm.data import find_inputs, prepare_store
from sinklm.data.tokenizer import train_tokenizer
from sinklm.train.launch import quieten_libraries
from sinklm.train.run import train

RECIPE = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 32}
train: {num_steps: 40, seq_length: 32, batch_size_tokens: 256, micro_batch_size: 2, seed: 7}
optimizer: {lr: 1.0e-2, warmup_ratio: 0.25}
validation: {every_steps: 10, num_samples: 5}
checkpoint: {every_steps: 2, asynchronous: true}
wandb: {mode: disabled}
"""
TIMELESS = ("step", "loss", "lr", "grad_norm", "positions", "validation_loss", "num_validation_samples")
START_TIMEOUT, END_TIMEOUT = 300.0, 300.0  # seconds
SURVIVOR_TIMEOUT = 120.0  # for the ranks that are left after one was killed


@dataclass
class Outcome:
    """What happened to one run that was killed again and again."""

    stage: int
    precision: str
    ranks: int
    kills: int = 0
    kills_in_a_save: int = 0
    kills_of_one_rank: int = 0
    slowest_end: float = 0.0  # seconds until the other ranks ended
    runs: int = 0  # that reached their end
    equal_runs: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether all runs equal the undisturbed one."""
        return self.runs == self.equal_runs > 0


def rank_main(rank: int, size: int, port: int, recipe: str, overrides: list[str], log: str) -> None:
    """Train as one rank. Its output goes to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    gc.freeze()  # DeepSpeed's collections need not search the imported modules
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        train(recipe, overrides)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


class Runs:
    """Starts runs of one recipe, whose processes are forked from one that has imported torch."""

    def __init__(self, folder: Path):
        self.folder = folder
        quieten_libraries()
        self.context = multiprocessing.get_context("forkserver")
        # The last one imports torch's compiler. DeepSpeed imports it when it makes an engine.
        engine = ["deepspeed", "deepspeed.runtime.zero.muon.original_muon"]
        self.context.set_forkserver_preload(["benchmarks.fault_injection", *engine])
        store = make_store(folder)
        self.recipe = str(folder / "recipe.yaml")
        Path(self.recipe).write_text(f"{RECIPE}\ndata: {{path: {store}}}\n")

    def start(
        self, run_dir: Path, stage: int, precision: str, ranks: int, settings: Sequence[str] = ()
    ) -> list[BaseProcess]:
        """Start all ranks of a run. Each process has the name of its log."""
        overrides = [f"train.run_dir={run_dir}", f"deepspeed.zero_stage={stage}", f"train.precision={precision}"]
        overrides += settings
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            log = f"{run_dir}-rank-{rank}.log"
            arguments = rank, ranks, port, self.recipe, overrides, log
            processes.append(self.context.Process(target=rank_main, args=arguments, name=log))
        for process in processes:
            process.start()
        return processes


def make_store(folder: Path) -> Path:
    """A store of random words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(chance.choices(words, k=chance.randint(20, 80))) for _ in range(150)]
    train_tokenizer(texts, vocab_size=300).save(str(folder / "tokenizer.json"))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = find_inputs([str(folder / "corpus.jsonl")]).shards
    tokenizer = str(folder / "tokenizer.json")
    prepare_store(shards, folder / "store", tokenizer=tokenizer, validation_fraction=0.1, num_processes=1)
    return folder / "store"


def disturb(runs: Runs, run_dir: Path, whole: Path, outcome: Outcome, min_kills: int, chance: random.Random) -> None:
    """Run, kill and run again, and compare each run that reaches its end with the undisturbed one.

    Ends after at least ``min_kills`` kills.
    """
    while True:
        processes = runs.start(run_dir, outcome.stage, outcome.precision, outcome.ranks)
        is_last = outcome.kills >= min_kills
        try:
            if is_last:
                wait(processes, END_TIMEOUT)
            else:
                kill_at_random(processes, run_dir, outcome, chance)
        finally:
            end(processes)
        if all(process.exitcode == 0 for process in processes):
            outcome.runs += 1
            outcome.equal_runs += are_equal(whole, run_dir)
            shutil.rmtree(run_dir)
        if is_last:
            return


def kill_at_random(processes: list[BaseProcess], run_dir: Path, outcome: Outcome, chance: random.Random) -> None:
    """Wait for a random time, then kill all ranks or a single one."""
    if chance.random() < 0.8:
        before, deadline = last_step(run_dir), time.monotonic() + START_TIMEOUT
        while last_step(run_dir) <= before and any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5))
    else:
        time.sleep(chance.uniform(0, 3))
    if not all(process.is_alive() for process in processes):
        wait(processes, END_TIMEOUT)  # it has just ended by itself
        return
    is_one = len(processes) > 1 and chance.random() < 0.5
    outcome.kills += 1
    outcome.kills_of_one_rank += is_one
    outcome.kills_in_a_save += bool(interrupted_checkpoints(run_dir))
    began = time.monotonic()
    victims = [chance.choice(processes)] if is_one else processes
    for process in victims:
        process.kill()
    wait(processes, SURVIVOR_TIMEOUT, may_fail=True)
    if is_one:
        outcome.slowest_end = max(outcome.slowest_end, time.monotonic() - began)


def wait(processes: list[BaseProcess], seconds: float, *, may_fail: bool = False) -> None:
    """Wait until all processes have ended, and kill those that have not after the time.

    Args:
        may_fail: whether another exit status than 0 is no error, as after a kill.

    Raises:
        TimeoutError: a process was still alive.
        RuntimeError: a process has failed.
    """
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        hung = [process for process in processes if process.is_alive()]
        failed = [process for process in processes if process.exitcode]
    finally:
        end(processes)
    if failed and not may_fail:  # others may have waited for it
        raise RuntimeError(described(failed[0], f"ended with status {failed[0].exitcode}"))
    if hung:
        raise TimeoutError(described(hung[0], f"has not ended after {seconds:g} s"))


def end(processes: list[BaseProcess]) -> None:
    """Kill processes that are left. Python would wait for them when it exits."""
    for process in processes:
        process.kill()
        process.join()


def described(process: BaseProcess, problem: str) -> str:
    """Return a message with the end of the log, which is deleted with its temporary folder."""
    log = Path(process.name)
    end = f"; its last lines:\n{log.read_text(errors='replace')[-2000:]}" if log.exists() else ""
    return f"{log}: the process {problem}{end}"


def read_metrics(run_dir: Path) -> list[dict]:
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append({key: value for key, value in json.loads(line).items() if key in TIMELESS})
    return lines


def last_step(run_dir: Path) -> int:
    lines = read_metrics(run_dir)
    return lines[-1]["step"] if lines else 0


def are_equal(left: Path, right: Path) -> bool:
    """Whether two runs have equal metrics, and equal weights in their last checkpoint."""
    if read_metrics(left) != read_metrics(right):
        return False
    ours, theirs = (
        load_file(max(list_checkpoints(run).items())[1] / "model" / "model.safetensors") for run in (left, right)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def inject(folder: Path, stages: list[tuple[int, str]], ranks: list[int], kills: int, seed: int) -> list[Outcome]:
    """Disturb one run for each stage and number of ranks, ``kills`` times in all at least."""
    chance, runs, outcomes = random.Random(seed), Runs(folder), []
    cases = list(itertools.product(stages, ranks))
    for (stage, precision), size in cases:
        outcome = Outcome(stage, precision, size)
        whole, disturbed = folder / f"whole-{stage}-{size}", folder / f"disturbed-{stage}-{size}"
        processes = runs.start(whole, stage, precision, size)
        wait(processes, START_TIMEOUT)
        disturb(runs, disturbed, whole, outcome, -(-kills // len(cases)), chance)
        outcomes.append(outcome)
        print(json.dumps(asdict(outcome)), flush=True)
    return outcomes


def markdown(outcomes: list[Outcome]) -> str:
    lines = ["| ZeRO | precision | ranks | kills | in a save | of one rank | others ended within | runs | equal |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for o in outcomes:
        end = f"{o.slowest_end:.1f} s" if o.kills_of_one_rank else ""
        lines.append(
            f"| {o.stage} | {o.precision} | {o.ranks} | {o.kills} | {o.kills_in_a_save} | {o.kills_of_one_rank or ''} "
            f"| {end} | {o.runs} | {o.equal_runs} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="number of kills in all, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/faults"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    stages = [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = inject(Path(folder), stages, [1, 2], args.kills, args.seed)
    (args.output / "faults.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    (args.output / "faults.md").write_text(markdown(outcomes))
    print(markdown(outcomes))
    sys.exit(0 if all(outcome.is_equal for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
