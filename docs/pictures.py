"""Draw the picture of README.md: perplexity along a book, with the sink token kept and lost.

    python docs/pictures.py --measure  # writes docs/results/sink-lost.json; minutes on a CPU
    python docs/pictures.py            # draws docs/results/sink-lost.png from that file

The model and the book are in examples/checkpoints. sink-lost.json records the library versions and
the hardware.
"""

import argparse
import json
import sys
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklm.eval.plots import COLOURS, STYLE, save_figure
from sinklm.eval.report import library_versions
from sinklm.streaming import stream_losses

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
CHECKPOINTS = ROOT / "examples" / "checkpoints"
CACHES = {"0+128": (0, 128), "1+127": (1, 127)}  # sink token lost, sink token kept
NUM_TOKENS = 20_000
BIN_SIZE = 100  # tokens for each stored mean
NUM_BINS_SHOWN = 20  # stored means for each point of a line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure before drawing")
    parser.add_argument("--hardware", default="CPU", help="recorded in the data file")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the data file and the picture")
    arguments = parser.parse_args()
    data = arguments.output / "sink-lost.json"
    if arguments.measure:
        data.write_text(json.dumps(measure(arguments.hardware)) + "\n", encoding="utf-8")
    report = json.loads(data.read_text(encoding="utf-8"))
    for cache, perplexity in report["perplexity"].items():
        print(f"{cache}: perplexity {perplexity:.2f} over {report['num_tokens']:,} tokens")
    save_figure(sink_lost_figure(report), arguments.output / "sink-lost.png")


def measure(hardware: str) -> dict[str, Any]:
    """Mean losses over consecutive bins of the book, and the total perplexity, for each cache."""
    folder = CHECKPOINTS / "learnable-sink"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    book = (CHECKPOINTS / "book.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(book, return_tensors="pt")["input_ids"][
        :, : NUM_TOKENS + 1
    ]
    losses = {
        cache: torch.cat(list(stream_losses(model, ids, num_kept=num_kept, window=window)), dim=1)[0].double()
        for cache, (num_kept, window) in CACHES.items()
    }
    return {
        "model": "examples/checkpoints/learnable-sink",
        "text": "examples/checkpoints/book.txt",
        "num_tokens": NUM_TOKENS,
        "hardware": hardware,
        "versions": {
            name: version for name, version in library_versions().items() if name in ("torch", "transformers")
        },
        "perplexity": {cache: round(values.mean().exp().item(), 3) for cache, values in losses.items()},
        "bin_size": BIN_SIZE,
        "binned_losses": {
            cache: [round(loss, 4) for loss in values.view(-1, BIN_SIZE).mean(dim=1).tolist()]
            for cache, values in losses.items()
        },
    }


def sink_lost_figure(report: dict[str, Any]) -> Figure:
    """Perplexity over a running mean of 2,000 tokens, one labelled line for each cache."""
    lost, kept = report["binned_losses"].values()
    size = report["bin_size"]
    positions = [size * (i + NUM_BINS_SHOWN / 2) for i in range(len(lost) - NUM_BINS_SHOWN + 1)]
    curves = [[exp(fmean(c[i : i + NUM_BINS_SHOWN])) for i in range(len(positions))] for c in (lost, kept)]
    averages = {cache: report["perplexity"][cache] for cache in CACHES}
    more = 100 * (averages["0+128"] / averages["1+127"] - 1)
    with matplotlib.rc_context(STYLE | {"font.size": 11, "figure.dpi": 200}):
        figure = Figure(figsize=(6.0, 3.4), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.plot(positions, curves[0], color=COLOURS[1], linewidth=2.5)
        axes.plot(positions, curves[1], color=COLOURS[2], linewidth=2.5)
        axes.fill_between(positions, *curves, color=COLOURS[1], alpha=0.12, linewidth=0)
        label = {"weight": "bold", "ha": "right", "va": "center"}
        axes.text(19_800, 45.5, f"sink token evicted: {averages['0+128']:.1f} on average", color=COLOURS[1], **label)
        axes.text(19_800, 17, f"sink token kept: {averages['1+127']:.1f} on average", color=COLOURS[2], **label)
        axes.set_title(
            f"If the cache evicts the sink token, perplexity is {more:.0f} % higher", loc="left", fontsize=12
        )
        axes.set_xlabel("Tokens read from a book")
        axes.set_ylabel("Perplexity (lower is better)")
        axes.set_xlim(0, report["num_tokens"])
        axes.set_ylim(0, 50)
        axes.set_xticks(range(0, report["num_tokens"] + 1, 5_000))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    return figure


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
