"""How many tokens of training a new sink token needs to stream as well as four kept tokens.

    python benchmarks/retrofit_study.py results/retrofit data.path=stores/study \\
        --vanilla runs/study/runs/vanilla --text book.txt --per-gpu 4 --minutes 8

Trains, from one vanilla model, `retrofit/study` and `retrofit/study-frozen` for each initial row of
the sink, learning rate and seed (of the order of the data, and of a random row), and continues the
vanilla model itself on the same samples. Without --vanilla, `study/vanilla` is trained first. For a
folder of Pythia's form, pass --recipe retrofit/pythia-160m and a --window.

Every checkpoint is measured by retrofit_measure.py. Repeat the command until it prints "all done":
what is done is not repeated, stopped runs resume, and a run that fails does not stop the others.
Seeds, rows and learning rates can be added; other settings need another folder. Written after each
call, with all that is measured: FOLDER/retrofit.json and, with the tables of retrofit_report.py,
FOLDER/retrofit.md.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import study_jobs
import torch

from sinklm.checkpoints.checks import checked_config
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.folders import resolve_model_folder
from sinklm.checkpoints.importing import import_model
from sinklm.checkpoints.sink_rows import SinkRow
from sinklm.checkpoints.warm_start import architecture
from sinklm.eval.report import library_versions

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from jobs import Job
from retrofit_report import tables

PLAIN = "plain"  # in place of a sink's row: the vanilla model, continued
VANILLA = "study/vanilla"
NAME = re.compile(r"(\w+)(-frozen)?-lr-(.+)-seed-(\d+)")
SETTINGS = ("settings", "vanilla", "recipe", "million_tokens", "vanilla_million_tokens")
SETTINGS += ("text", "length", "held_out", "window")


@dataclass(frozen=True)
class Run:
    """A run: the first row of the sink, or `PLAIN`; what is trained; learning rate; seed."""

    row: str
    is_frozen: bool
    lr: str
    seed: str

    @property
    def name(self) -> str:
        return f"{self.row}{'-frozen' * self.is_frozen}-lr-{self.lr}-seed-{self.seed}"


def main() -> None:
    arguments = parse()
    study_jobs.store_of(arguments.recipe, arguments.settings)
    settings, deadline = study_jobs.begin(arguments, SETTINGS)
    vanilla = vanilla_model(arguments, deadline)
    is_done = vanilla is not None
    if vanilla is not None:
        pairs = [(training(each, vanilla, arguments), measuring(each, arguments)) for each in planned(arguments)]
        is_done = study_jobs.run_in_parts(pairs, deadline, arguments.per_gpu)
    settings |= {"text": [Path(path).name for path in arguments.text], "vanilla": vanilla and Path(vanilla).name}
    found = {"settings": settings, "versions": library_versions(), "runs": collect(arguments.folder)}
    study_jobs.conclude(arguments.folder / "retrofit", found, tables(found), is_done=is_done)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs")
    parser.add_argument("--vanilla", help="a run, checkpoint or export without a sink, or a folder of Pythia's form")
    parser.add_argument("--recipe", default="retrofit/study", help="a recipe that also exists with -frozen")
    parser.add_argument("--million-tokens", type=float, help="positions of each run; default: as in the recipe")
    parser.add_argument("--vanilla-million-tokens", type=float, help=f"of {VANILLA}, without --vanilla")
    parser.add_argument("--rows", default="mean,endoftext,random", help="initial rows of the sink token")
    parser.add_argument("--lrs", default="5e-4,1.6e-3,5e-3", help="learning rates of all weights; empty: none")
    parser.add_argument("--frozen-lrs", default="5e-3,1.6e-2,5e-2", help="of the sink's row alone; empty: none")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--text", action="append", required=True, help="held-out text; repeatable")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of each text")
    parser.add_argument("--held-out", type=int, default=131_072, help="tokens of the store for the validation loss")
    parser.add_argument("--window", type=int, default=124, help="N, the recent tokens in the caches")
    study_jobs.add_options(parser)
    arguments = parser.parse_intermixed_args()
    for name in ("rows", "lrs", "frozen_lrs", "seeds"):
        setattr(arguments, name, [value for value in getattr(arguments, name).split(",") if value])
    if unknown := [row for row in arguments.rows if row not in tuple(SinkRow)]:
        parser.error(f"--rows has {unknown[0]}: choose from {', '.join(SinkRow)}")
    if missing := [path for path in arguments.text if not Path(path).is_file()]:
        parser.error(f"--text {missing[0]}: no such file")
    return arguments


def vanilla_model(arguments: argparse.Namespace, deadline: study_jobs.Deadline) -> str | None:
    """Return the vanilla model, which is trained if none was given; None if it is not finished."""
    if arguments.vanilla:
        return arguments.vanilla
    settings = ["checkpoint.keep=1", *arguments.settings]
    folder = arguments.folder / "runs" / "vanilla"
    job = study_jobs.training(folder, VANILLA, settings, arguments.vanilla_million_tokens)
    return str(folder) if study_jobs.run([job], deadline, arguments.per_gpu) else None


def planned(arguments: argparse.Namespace) -> list[Run]:
    """Return all runs, one seed after another, so that early results have all configurations."""
    found = []
    for seed in arguments.seeds:
        lrs, frozen_lrs = arguments.lrs or arguments.frozen_lrs[:1], arguments.frozen_lrs
        found += [Run(PLAIN, False, lr, seed) for lr in lrs]  # the untouched model is its step 0
        found += [Run(row, False, lr, seed) for row, lr in product(arguments.rows, arguments.lrs)]
        found += [Run(row, True, lr, seed) for row, lr in product(arguments.rows, frozen_lrs)]
    return found


def training(each: Run, vanilla: str, arguments: argparse.Namespace) -> Job:
    recipe = f"{arguments.recipe}{'-frozen' * each.is_frozen}"
    source = vanilla if each.row == PLAIN else str(start(each, vanilla, arguments.folder / "start"))
    sizes = architecture(checked_config(resolve_model_folder(source)))
    settings = [*(f"model.{key}={value}" for key, value in sizes.items()), *arguments.settings]
    settings.append(f"model.init_from={source}")
    settings += [f"optimizer.lr={each.lr}", f"train.seed={each.seed}", "checkpoint.pythia_steps=true"]
    if each.row == PLAIN:
        settings.append("model.sink.kind=none")
    return study_jobs.training(arguments.folder / "runs" / each.name, recipe, settings, arguments.million_tokens)


def start(each: Run, vanilla: str, folder: Path) -> Path:
    """Return the vanilla model with a new sink token, before its training."""
    name = f"{each.row}-{each.seed}" if each.row == SinkRow.RANDOM else each.row
    if (found := folder / name).exists():
        return found
    source = Path(vanilla)
    if checked_config(resolve_model_folder(vanilla)).model_type == "sink_gpt_neox":  # imports are of plain models
        source = folder / PLAIN
        if not source.exists():
            export_model(vanilla, source)
    return import_model(source, found, sink_row=each.row, seed=int(each.seed), dtype=torch.float32).folder


def measuring(each: Run, arguments: argparse.Namespace) -> Job:
    output = arguments.folder / "results" / f"{each.name}.json"
    store = study_jobs.store_of(arguments.recipe, arguments.settings)
    options = {"--store": store, "--window": arguments.window, "--length": arguments.length}
    options |= {"--held-out": arguments.held_out, "--output": output}
    command = [sys.executable, Path(__file__).with_name("retrofit_measure.py"), arguments.folder / "runs" / each.name]
    command += [part for option in options.items() for part in option]
    command += [part for path in arguments.text for part in ("--text", path)]
    return Job(f"{each.name} measure", tuple(map(str, command)), output.with_suffix(".log"))


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all runs whose checkpoints are all measured."""
    runs = []
    for path in sorted((folder / "results").glob("*.json")):
        row, frozen, lr, seed = NAME.fullmatch(path.stem).groups()  # type: ignore[union-attr]  # made by `Run.name`
        if path.with_suffix(".log").exists():
            each = Run(row, bool(frozen), lr, seed)
            runs.append({**vars(each), **json.loads(path.read_text(encoding="utf-8"))})
    return runs


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
