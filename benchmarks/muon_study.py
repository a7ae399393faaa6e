"""Train and compare four models: AdamW and Muon, without a sink token and with one.

    python benchmarks/muon_study.py results/muon data.path=stores/study --text book.txt --minutes 9
    python benchmarks/muon_study.py results/muon data.path=stores/study --text book.txt \\
        --base paper --million-tokens 300                   # at 160 M parameters

The recipes are BASE/vanilla and BASE/learnable-sink, so runs of a seed have the same initial
weights and the same data in the same order. Runs that are done are not repeated, and stopped ones
resume, so repeat the command until it prints "all done". Seeds can be added; another size, text or
setting needs another folder. For each model, FOLDER/NAME.json is
written as soon as it is evaluated, and FOLDER/table.md has all models so far:

- the validation loss at equal tokens, which is that at the end;
- the validation loss at equal time: at the tokens that the model has read when AdamW's model of
  the same sink and seed ends. A line between two validations gives it. The learning rate has not
  quite ended its decay there, which is to the disadvantage of the slower optimizer;
- the share of heads with a sink, and massive activations, as `sinklm eval sinks` defines them;
- streaming perplexity with 0, 1, 2 and 4 kept tokens, the paper's Table 3.

With --per-gpu above 1, runs share the GPU and slow each other down: then measure the speeds with
`benchmarks/train.py --contestants sinklm,sinklm-muon`, and pass their ratio as --speed.
"""

import argparse
import json
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import study_jobs
from study_jobs import Deadline, run
from study_settings import keep_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from evaluate import job as evaluation
from jobs import Job
from results import collect_run, sink_rate

OPTIMIZERS = ("adamw", "muon")
SINKS = {"vanilla": "vanilla", "sink": "learnable-sink"}  # names of the models and of the recipes
EVALUATIONS = ("streaming", "sinks")
NUM_VALIDATIONS = 20


def main() -> None:
    arguments = parse()
    deadline = Deadline(arguments.minutes)
    keys = {"--base": "base", "--million-tokens": "million_tokens", "settings": "settings"}
    keys |= {"--text": "text", "--tokens": "tokens"}
    keep_settings(arguments.folder, {name: getattr(arguments, key) for name, key in keys.items()})
    names = [f"{o}-{s}-seed-{seed}" for seed, s, o in product(arguments.seeds.split(","), SINKS, OPTIMIZERS)]
    jobs = {name: training(name, arguments) for name in names}
    evaluate_trained(jobs, deadline, arguments)
    is_done = run(list(jobs.values()), deadline, per_gpu=arguments.per_gpu)
    is_done = evaluate_trained(jobs, deadline, arguments) and is_done
    models = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.folder.glob("*-seed-*.json"))]
    text = table(models, speed=arguments.speed)
    (arguments.folder / "table.md").write_text(text, encoding="utf-8")
    print("\n" + text)
    sys.exit(not is_done)


def evaluate_trained(jobs: dict[str, Job], deadline: Deadline, arguments: argparse.Namespace) -> bool:
    """Evaluate the trained models, and write their results. Returns whether all are done."""
    is_done = True
    for name, job in jobs.items():
        if job.is_done:
            folder = arguments.folder / "runs" / name
            evaluations = [evaluation(kind, folder, arguments) for kind in EVALUATIONS]
            is_done = run(evaluations, deadline, per_gpu=len(evaluations)) and is_done
            write_model(name, folder, arguments)
    return is_done


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


def write_model(name: str, run: Path, arguments: argparse.Namespace) -> None:
    """Write the results of one model that are there so far."""
    found = collect_run(run, arguments.folder / "results" / name)
    optimizer, sink, _, seed = name.split("-")
    model: dict[str, Any] = {"name": name, "optimizer": optimizer, "sink": sink, "seed": int(seed)}
    model |= {key: found[key] for key in ("config", "environment", "tokens", "tokens_per_second", "validation_loss")}
    if "streaming" in found:
        model["perplexity"] = found["streaming"]["perplexity"]
    if "sinks" in found:
        report = found["sinks"]
        places = [place for place, position in report["positions"].items() if position >= 0]
        model["sink_rate"] = {place: sink_rate(report, place) for place in places}
        model["massive_activations"] = report["massive_activations"]
        model["largest_over_median"] = largest_over_median(report["layers"])
    path = arguments.folder / f"{name}.json"
    path.write_text(json.dumps(model, indent=1) + "\n", encoding="utf-8")


def largest_over_median(layers: dict[str, Any]) -> float:
    """Return the largest activation at a named position over the median of its layer."""
    largest = zip(*layers["largest_activation"].values(), strict=True)  # by layer
    return max(max(values) / median for values, median in zip(largest, layers["median_activation"], strict=True))


def loss_at(tokens: float, validations: list[list[float]]) -> float:
    """Return the validation loss at a number of tokens, on the line between two validations."""
    points = sorted(validations)
    for (before, loss), (after, next_loss) in pairwise(points):
        if before <= tokens <= after:
            return loss + (next_loss - loss) * (tokens - before) / (after - before)
    return points[-1][1] if tokens > points[-1][0] else points[0][1]


def table(models: list[dict[str, Any]], speed: float | None = None) -> str:
    """Return a Markdown table of all models.

    Args:
        speed: tokens/s of Muon over AdamW; None: of the median steps of the runs.
    """
    caches = list(dict.fromkeys(cache for model in models for cache in model.get("perplexity", {})))
    lines = [
        "| | loss, equal tokens | loss, equal time | tokens/s | heads with a sink on the sink token "
        "| on the first text token | massive activations | largest over median activation "
        + "".join(f"| {cache} " for cache in caches)
        + "|",
        "|---" + "|---:" * (7 + len(caches)) + "|",
    ]
    by_key = {(model["optimizer"], model["sink"], model["seed"]): model for model in models}
    for model in sorted(models, key=lambda m: (m["seed"], m["sink"], m["optimizer"])):
        reference = by_key.get(("adamw", model["sink"], model["seed"]))
        cells = [model["name"], f"{model['validation_loss'][-1][1]:.4f}"]
        if reference is None:
            cells.append("")
        else:
            ratio = model["tokens_per_second"] / reference["tokens_per_second"] if speed is None else speed
            share = ratio if model is not reference else 1.0
            cells.append(f"{loss_at(reference['tokens'] * share, model['validation_loss']):.4f}")
        cells.append(f"{model['tokens_per_second']:,.0f}")
        rates = model.get("sink_rate", {})
        for place in ("sink", "first"):
            found = [rate for name, rate in rates.items() if name.startswith(place)]
            cells.append(f"{found[0]:.1%}" if found else "")
        cells.append(str(len(model["massive_activations"])) if "massive_activations" in model else "")
        cells.append(f"{model['largest_over_median']:,.0f}" if "largest_over_median" in model else "")
        cells += [f"{model['perplexity'][c]:.2f}" if c in model.get("perplexity", {}) else "" for c in caches]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
