"""Train the models of a plan in parallel, one or more on each GPU.

    python study/train.py study/arms.yaml runs/study data.path=stores/study
    python study/train.py study/tried.yaml tried data.path=stores/study --per-gpu 4 --minutes 9

A plan is a YAML file with one line for each run: its name, and the arguments of `sinklm train`.
Settings on the command line apply to all runs. Runs are written to FOLDER/runs; the same command
resumes them.
"""

import argparse
import sys
from pathlib import Path

from jobs import SINKLM, Job, JobQueue
from plan import read_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs")
    parser.add_argument("--only", help="names of runs, separated by commas")
    parser.add_argument("--per-gpu", type=int, default=1, help="runs that share a GPU")
    parser.add_argument("--minutes", type=float, help="save and stop after this many minutes")
    arguments = parser.parse_intermixed_args()

    plan = read_plan(arguments.plan)
    chosen = arguments.only.split(",") if arguments.only else plan
    if unknown := set(chosen) - set(plan):
        sys.exit(f"error: --only contains {', '.join(sorted(unknown))}: not in {arguments.plan}")
    jobs = [job(name, plan[name].split(), arguments.settings, arguments.folder / "runs" / name) for name in chosen]
    sys.exit(not JobQueue(jobs, per_gpu=arguments.per_gpu, minutes=arguments.minutes).run())


def job(name: str, recipe: list[str], settings: list[str], run: Path) -> Job:
    return Job(name, (*SINKLM, "train", *recipe, *settings, f"train.run_dir={run}"), run / "train.log")


if __name__ == "__main__":
    main()
