"""What quantization costs models with each kind of sink, by depth, beside their activations.

    pip install "sinklm[quantization]"
    python benchmarks/quantization_study.py results/quantization data.path=stores/study \\
        --per-gpu 4 --minutes 8

Trains the recipes `study/…` of seven arms with each number of layers and seed, and measures each
with `sinklm eval quantization` on the held-out split of the store. Repeat the command until it
prints "all done": what is done is not repeated, stopped runs resume, and a run that fails does not
stop the others. Arms, depths and seeds can be added; other settings need another folder. Written
after each call, with all that is measured: FOLDER/quantization.json and, with the tables of
quantization_report.py, FOLDER/quantization.md.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import study_jobs

from sinklm.extras import require_extra
from sinklm.train.recipe import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from jobs import SINKLM, Job
from quantization_report import tables

ARMS = {  # recipes by `model.sink.kind`
    "none": "study/vanilla",
    "token": "study/learnable-sink",
    "zero": "study/zero-sink",
    "logit": "study/logit",
    "kv_bias": "study/kv-bias",
    "gate": "study/gate",
    "head_gate": "study/head-gate",
}
NUM_SINKS = 1  # at most, of these arms: all read as many tokens of text as fit beside it
SETTINGS = ("settings", "million_tokens", "num_sequences")


@dataclass(frozen=True)
class Model:
    """A model of the study."""

    arm: str
    layers: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.layers}-layers-seed-{self.seed}"


def main() -> None:
    arguments = parse()
    settings, deadline = study_jobs.begin(arguments, SETTINGS)
    require_extra("quantization")
    choices = product(arguments.layers, arguments.seeds, arguments.arms)
    models = [Model(arm, layers, seed) for layers, seed, arm in choices]
    pairs = [(training(model, arguments), measuring(model, arguments)) for model in models]
    is_done = study_jobs.run_in_parts(pairs, deadline, arguments.per_gpu)
    found = {"settings": settings, "models": collect(arguments.folder)}
    study_jobs.conclude(arguments.folder / "quantization", found, tables(found), is_done=is_done)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--layers", default="8,24")
    parser.add_argument("--seeds", default="1234,2")
    parser.add_argument("--million-tokens", type=float, help="positions of each run; default: as in the recipe")
    parser.add_argument("--num-sequences", type=int, default=100, help="samples of each evaluation")
    study_jobs.add_options(parser)
    arguments = parser.parse_intermixed_args()
    arguments.arms = arguments.arms.split(",")
    arguments.layers, arguments.seeds = (
        list(map(int, text.split(","))) for text in (arguments.layers, arguments.seeds)
    )
    if unknown := [arm for arm in arguments.arms if arm not in ARMS]:
        parser.error(f"--arms has {unknown[0]}: choose from {', '.join(ARMS)}")
    return arguments


def training(model: Model, arguments: argparse.Namespace) -> Job:
    settings = [f"model.num_hidden_layers={model.layers}", f"train.seed={model.seed}", "checkpoint.keep=1"]
    folder = arguments.folder / "runs" / model.name
    return study_jobs.training(folder, ARMS[model.arm], [*settings, *arguments.settings], arguments.million_tokens)


def measuring(model: Model, arguments: argparse.Namespace) -> Job:
    store = study_jobs.store_of(ARMS[model.arm], arguments.settings)
    num_tokens = load_config(ARMS[model.arm], arguments.settings).train.seq_length - NUM_SINKS
    output = arguments.folder / "results" / model.name
    command = [*SINKLM, "eval", "quantization", arguments.folder / "runs" / model.name, "--data", store]
    command += ["--seq-length", num_tokens, "--num-sequences", arguments.num_sequences, "--output", output, "--quiet"]
    return Job(f"{model.name} measure", tuple(map(str, command)), output / "evaluation.log")


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all models that are measured, by depth, arm and seed.

    Raises:
        ValueError: models were measured on different samples.
    """
    models = []
    for path in sorted((folder / "results").glob("*/quantization.json")):
        arm, layers, _, _, seed = path.parent.name.split("-")
        report = json.loads(path.read_text(encoding="utf-8"))
        (measured,) = report["runs"]
        run = folder / "runs" / path.parent.name
        facts = asdict(Model(arm, int(layers), int(seed)))
        facts["environment"] = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        measured["samples"].pop("store", None)
        facts |= {"versions": report["versions"], "notes": report["notes"], "num_tokens": report["num_tokens"]}
        models.append(facts | {key: value for key, value in measured.items() if key not in ("name", "model")})
    if len({model["samples"]["ids_sha256"] for model in models}) > 1:
        raise ValueError(f"models in {folder / 'results'} were measured on different samples: use another folder")
    return sorted(models, key=lambda model: (model["layers"], list(ARMS).index(model["arm"]), model["seed"]))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
