"""Compare the losses of one run on 1, 2 and 4 ranks, with all micro-batches and ZeRO stages.

    python -m benchmarks.rank_matrix --output results/ranks

Every run trains the same tiny model in float32 on the same 8 samples a step, for 40 steps. The
table has the largest difference of a loss from that of one rank without ZeRO. Runs on a CPU.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from benchmarks.fault_injection import START_TIMEOUT, Runs, read_metrics, wait

SAMPLES = 8  # in a step
STAGES, RANKS, MICRO_BATCHES = (0, 1, 2, 3), (1, 2, 4), (1, 2, 4, 8)


def losses(runs: Runs, run_dir: Path, stage: int, ranks: int, micro_batch: int) -> list[float]:
    """Train once, and return the loss of every step."""
    settings = [f"train.micro_batch_size={micro_batch}", "checkpoint.every_steps=null"]
    wait(runs.start(run_dir, stage, "fp32", ranks, settings), START_TIMEOUT)
    return [line["loss"] for line in read_metrics(run_dir) if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/ranks"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    rows, reference = [], []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for stage, ranks, micro_batch in itertools.product(STAGES, RANKS, MICRO_BATCHES):
            if ranks * micro_batch > SAMPLES:
                continue
            found = losses(runs, Path(folder) / f"run-{stage}-{ranks}-{micro_batch}", stage, ranks, micro_batch)
            reference = reference or found
            difference = max(abs(a - b) for a, b in zip(found, reference, strict=True))
            rows.append({"stage": stage, "ranks": ranks, "micro_batch": micro_batch, "difference": difference})
            print(json.dumps(rows[-1]), flush=True)
    (args.output / "ranks.json").write_text(json.dumps(rows, indent=1) + "\n")
    largest = max(row["difference"] for row in rows)
    print(f"{len(rows)} runs; the largest difference is {largest:.1e}, at losses from {reference[0]:.2f}")


if __name__ == "__main__":
    main()
