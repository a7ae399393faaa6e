"""Train and compare four models: AdamW and Muon, without a sink token and with one.

    python benchmarks/muon_study.py results/muon data.path=stores/study --text book.txt --minutes 9
    python benchmarks/muon_study.py results/muon data.path=stores/study --text book.txt \\
        --base paper --million-tokens 300                   # at 160 M parameters

The recipes are BASE/vanilla and BASE/learnable-sink, so runs of a seed have the same initial
weights and the same data in the same order. Runs that are done are not repeated, and stopped ones
resume, so repeat the command until it prints "all done". Seeds can be added; another size, text or
setting needs another folder. Written after each call, with all models that are evaluated:
FOLDER/muon.json and, with the tables of muon_report.py, FOLDER/muon.md:

- the validation loss at equal tokens, and at equal time. The learning rate has not quite ended its
  decay there, which is to the disadvantage of the slower optimizer;
- the share of heads with a sink, and massive activations, as `sinklm eval sinks` defines them;
- streaming perplexity with 0, 1, 2 and 4 kept tokens, the paper's Table 3.

With --per-gpu above 1, runs share the GPU and slow each other down: then measure the speeds with
`benchmarks/train.py --contestants sinklm,sinklm-muon`, and pass their ratio as --speed.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import study_jobs
from study_jobs import Deadline, run

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from evaluate import job as evaluation
from jobs import Job
from muon_report import tables
from results import collect_run, sink_rate

OPTIMIZERS = ("adamw", "muon")
SINKS = {"vanilla": "vanilla", "sink": "learnable-sink"}  # names of the models and of the recipes
EVALUATIONS = ("streaming", "sinks")
NUM_VALIDATIONS = 20
SETTINGS = ("settings", "base", "million_tokens", "text", "tokens")


def main() -> None:
    arguments = parse()
    settings, deadline = study_jobs.begin(arguments, SETTINGS)
    names = [f"{o}-{s}-seed-{seed}" for seed, s, o in product(arguments.seeds.split(","), SINKS, OPTIMIZERS)]
    jobs = {name: training(name, arguments) for name in names}
    evaluate_trained(jobs, deadline, arguments)
    is_done = run(list(jobs.values()), deadline, per_gpu=arguments.per_gpu)
    is_done = evaluate_trained(jobs, deadline, arguments) and is_done
    settings |= {"text": [Path(path).name for path in arguments.text]}
    found = {"settings": settings, "speed": arguments.speed, "models": collect(arguments.folder)}
    study_jobs.conclude(arguments.folder / "muon", found, tables(found), is_done=is_done)


def evaluate_trained(jobs: dict[str, Job], deadline: Deadline, arguments: argparse.Namespace) -> bool:
    """Evaluate the trained models. Returns whether all are done."""
    runs = [arguments.folder / "runs" / name for name, job in jobs.items() if job.is_done]
    evaluations = [evaluation(kind, folder, arguments) for folder in runs for kind in EVALUATIONS]
    return not evaluations or run(evaluations, deadline, per_gpu=max(arguments.per_gpu, len(EVALUATIONS)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs")
    parser.add_argument("--text", action="append", required=True, help="text not in the training data; repeatable")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of text for streaming perplexity")
    parser.add_argument(
        "--base", default="study", help="folder of the recipes: study (5 M parameters) or paper (160 M)"
    )
    parser.add_argument("--million-tokens", type=float, help="positions of each run; default: as in the recipe")
    parser.add_argument("--seeds", default="1234,2")
    study_jobs.add_options(parser)
    parser.add_argument("--speed", type=float, help="tokens/s of Muon over AdamW; default: as recorded by the runs")
    arguments = parser.parse_intermixed_args()
    arguments.data_dir = None  # of zero-shot benchmarks, which `evaluation` also knows
    return arguments


def training(name: str, arguments: argparse.Namespace) -> Job:
    optimizer, sink, _, seed = name.split("-")
    recipe = f"{arguments.base}/{SINKS[sink]}"
    settings = [f"train.seed={seed}", f"optimizer.name={optimizer}", "checkpoint.keep=1", *arguments.settings]
    every = max(1, study_jobs.num_steps(recipe, settings, arguments.million_tokens) // NUM_VALIDATIONS)
    settings += [f"validation.every_steps={every}", f"checkpoint.every_steps={every}"]
    return study_jobs.training(arguments.folder / "runs" / name, recipe, settings, arguments.million_tokens)


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all models that are evaluated."""
    models = []
    for trained in sorted((folder / "runs").glob("*-seed-*")):
        found = collect_run(trained, folder / "results" / trained.name)
        if all(kind in found for kind in EVALUATIONS):
            models.append(model_of(trained.name, found))
    return models


def model_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    optimizer, sink, _, seed = name.split("-")
    facts = ("config", "environment", "tokens", "tokens_per_second", "validation_loss")
    report = found["sinks"]
    places = [place for place, position in report["positions"].items() if position >= 0]
    return {
        "name": name,
        "optimizer": optimizer,
        "sink": sink,
        "seed": int(seed),
        **{key: found[key] for key in facts},
        "perplexity": found["streaming"]["perplexity"],
        "sink_rate": {place: sink_rate(report, place) for place in places},
        "massive_activations": report["massive_activations"],
        "largest_over_median": largest_over_median(report["layers"]),
    }


def largest_over_median(layers: dict[str, Any]) -> float:
    """Return the largest activation at a named position over the median of its layer."""
    largest = zip(*layers["largest_activation"].values(), strict=True)  # by layer
    return max(max(values) / median for values, median in zip(largest, layers["median_activation"], strict=True))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
