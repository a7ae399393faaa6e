"""Evaluate all runs of a folder in parallel: perplexity by cache, sinks, zero-shot benchmarks.

    python study/evaluate.py runs/study --text book.txt --tokens 1000000
    python study/evaluate.py runs/study --text book.txt --only vanilla --kinds zero-shot \\
        --data-dir benchmarks/

Results are written to FOLDER/results; existing results are not measured again. Runs that are not
finished are skipped. `zero-shot` needs network access or --data-dir.
"""

import argparse
import sys
from pathlib import Path

from jobs import SINKLM, Job, JobQueue
from results import is_finished

KINDS = ("streaming", "cache-sizes", "sinks", "forming", "zero-shot")
CACHE_SIZES = (16, 32, 64, 128, 256, 384, 512, 1024)  # up to four times the trained length
CACHES = ",".join(f"{kept}+{size - kept}" for size in CACHE_SIZES for kept in (0, 1, 4))
LONG_ENOUGH = ("--max-length", "512")  # for PIQA's longest answers, 378 tokens of a vocabulary of 4,000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--text", action="append", required=True, help="text file that is not in the training data; repeatable"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of text for streaming perplexity")
    parser.add_argument("--data-dir", help="folder with the benchmarks as files; default: the Hub")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--only", help="names of runs, separated by commas")
    parser.add_argument("--per-gpu", type=int, default=4, help="evaluations that share a GPU")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes")
    arguments = parser.parse_args()

    runs = [path.parent for path in sorted((arguments.folder / "runs").glob("*/checkpoints"))]
    if arguments.only:
        runs = [run for run in runs if run.name in arguments.only.split(",")]
    if not runs:
        sys.exit(f"error: {arguments.folder / 'runs'} contains no such run with checkpoints: train it with train.py")
    if unknown := set(arguments.kinds.split(",")) - set(KINDS):
        sys.exit(f"error: --kinds contains {', '.join(sorted(unknown))}: use only {', '.join(KINDS)}")
    finished = [run for run in runs if is_finished(run)]
    jobs = [job(kind, run, arguments) for kind in arguments.kinds.split(",") for run in finished]
    is_done = JobQueue(jobs, per_gpu=arguments.per_gpu, minutes=arguments.minutes).run()
    if unfinished := [run.name for run in runs if run not in finished]:
        print(f"not evaluated, because their training is not finished: {', '.join(unfinished)}; run train.py again")
    sys.exit(not is_done or bool(unfinished))


def job(kind: str, run: Path, arguments: argparse.Namespace) -> Job:
    results = arguments.folder / "results" / run.name
    text = [part for path in arguments.text for part in ("--text", path)]
    data = ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    streaming = [*SINKLM, "eval", "streaming", run, *text]
    command = {
        "streaming": [*streaming, "--tokens", arguments.tokens],
        "cache-sizes": [*streaming, "--tokens", 100_000, "--methods", "window,streaming", "--caches", CACHES],
        "sinks": [*SINKLM, "eval", "sinks", run, *text, "--checkpoints"],
        "forming": [sys.executable, Path(__file__).with_name("forming.py"), run, *text],
        "zero-shot": [*SINKLM, "eval", "zero-shot", run, "--batch-size", "64", *LONG_ENOUGH, *data],
    }[kind]
    output = results / kind if kind == "cache-sizes" else results  # beside another streaming.json
    return Job(f"{run.name} {kind}", (*map(str, command), "--output", str(output)), results / f"{kind}.log")


if __name__ == "__main__":
    main()
