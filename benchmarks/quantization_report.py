"""Write the tables and the picture of docs/results/quantization.md, of quantization_study.py.

    python benchmarks/quantization_report.py results/quantization   # take its quantization.json
    python benchmarks/quantization_report.py                        # the one in docs/results again

There is a table for each number of layers, `layers_8`. An increase is the loss of the quantized
model minus that of the model itself, in nats per token. It is a mean over seeds, with its standard
error; the error over samples is in the JSON file.
"""

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from sinklm.eval.compare import stderr_of_mean
from sinklm.eval.plots import save_figure
from sinklm.eval.quantization_formats import FORMATS
from sinklm.eval.quantization_output import quantization_figure

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from pages import make_page
from seed_tables import mean_and_error, table

Model = dict[str, Any]


def main() -> None:
    found, folder = make_page("quantization", __doc__, tables)
    save_figure(picture(found), folder / "quantization.png")


def tables(found: dict[str, Any]) -> dict[str, str]:
    depths = sorted({model["layers"] for model in found["models"]})
    return {f"layers_{depth}": by_arm([m for m in found["models"] if m["layers"] == depth]) for depth in depths}


def by_arm(models: list[Model]) -> str:
    """One row for each arm: activations, loss, and its increase by each format."""
    formats, rows = formats_of(models), []
    for (_, arm), group in groups(models).items():
        cells = [arm, str(len(group)), mean_and_error([model["largest_activation"] for model in group], 1)]
        cells.append(mean_and_error([model["largest_ratio"] for model in group], 0))
        cells.append(mean_and_error([len(model["massive_activations"]) for model in group], 1))
        cells.append(mean_and_error([model["loss"] for model in group], 4))
        rows.append([*cells, *(mean_and_error(increases(group, name), 4, "+") for name in formats)])
    return table(["arm", "seeds", "largest activation", "× median", "massive", "loss", *formats], rows)


def picture(found: dict[str, Any]) -> Figure:
    """Plot the means over seeds: what each format adds to the loss, and the largest activation."""
    formats, runs = formats_of(found["models"]), []
    for (depth, arm), group in groups(found["models"]).items():
        measured = {name: values for name in formats if (values := increases(group, name))}
        means = [
            {"format": name, "increase": fmean(values), "stderr": stderr_of_mean(values)}
            for name, values in measured.items()
        ]
        ratio = fmean(model["largest_ratio"] for model in group)
        runs.append({"name": f"{arm}, {depth} layers", "largest_ratio": ratio, "formats": means})
    return quantization_figure({"formats": formats, "runs": runs})


def groups(models: list[Model]) -> dict[tuple[int, str], list[Model]]:
    """Return the seeds of each depth and arm."""
    found: dict[tuple[int, str], list[Model]] = {}
    for model in models:
        found.setdefault((model["layers"], model["arm"]), []).append(model)
    return found


def formats_of(models: list[Model]) -> list[str]:
    """Return the formats with which at least one model was measured."""
    measured = {each["format"] for model in models for each in model["formats"]}
    return [name for name in FORMATS if name in measured]


def increases(group: list[Model], name: str) -> list[float]:
    """Return the increase of the loss by a format, of the models that were measured with it."""
    return [found["increase"] for model in group for found in model["formats"] if found["format"] == name]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
