"""Pictures of the results in docs/results: plain tick labels, and curves that stay visible."""

import itertools
import json
import math
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sinklm.eval.plots import MARKERS, STYLE, curve_style, stream_eval_figure, stream_qa_figure, streaming_figure
from sinklm.eval.report import display_name
from sinklm.eval.sinks.plots import heads_figure, layers_figure, maps_figure

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FIGURES = {
    streaming_figure: "streaming-quality.json",
    stream_eval_figure: "stream-eval.json",
    heads_figure: "sinks-smollm2.json",
    maps_figure: "sinks-smollm2.json",
    layers_figure: "sinks-learnable-sink.json",
}


@pytest.mark.parametrize("make", FIGURES)
def test_all_labels_are_plain_text(make):
    figure = make(json.loads((RESULTS / FIGURES[make]).read_text()), title="a $model$")
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure).draw()
        ticks = [text.get_text() for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        ticks += [text.get_text() for axes in figure.axes for text in axes.get_yticklabels(minor=True)]
    assert any(ticks)
    assert not [text for text in ticks if "$" in text or "math" in text]
    shown = [axes for axes in figure.axes if axes.lines or axes.images]
    assert all(axes.get_ylabel() for axes in shown if axes.get_subplotspec().is_first_col())
    assert all(axes.get_xlabel() for axes in shown if axes.get_subplotspec().is_last_row())


@pytest.mark.parametrize("window", [100, 1000, 1100, 30_000])
def test_marked_positions_do_not_overlap_and_other_numbers_of_tokens_are_told(window):
    report = json.loads((RESULTS / FIGURES[streaming_figure]).read_text())
    report["model"]["max_position_embeddings"] = 1050
    report["results"] = [result | {"num_kept": 0, "window": window} for result in report["results"]]
    report["results"][2]["perplexity"] = math.exp(700)
    with matplotlib.rc_context(STYLE):
        figure = streaming_figure(report, "title")
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
    (axes,) = figure.axes
    boxes = [text.get_window_extent(renderer) for text in (*axes.texts, axes.title, axes._left_title)]
    boxes = [box for box in boxes if box.width]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:3] == ["dense: 1,626\n(65,536 tokens)", "0+1024: 33.38", "1+1023: 1.014e+304"]


def test_equal_curves_differ_by_dashes_and_width():
    styles = [curve_style(i, len(MARKERS)) for i in range(len(MARKERS))]
    assert len({str(style["linestyle"]) for style in styles}) == len(styles)
    widths = [style["linewidth"] for style in styles]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == len(widths)


def test_a_title_is_the_name_of_a_model_and_not_its_path(tmp_path, monkeypatch):
    (tmp_path / "runs" / "vanilla" / "checkpoints" / "step-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "vanilla")
    assert display_name("EleutherAI/pythia-160m") == "EleutherAI/pythia-160m"
    assert display_name(tmp_path / "runs" / "vanilla") == display_name(".") == "vanilla"
    assert display_name(tmp_path / "runs" / "vanilla" / "checkpoints" / "step-4") == "vanilla, step-4"


def test_a_cache_has_one_colour_in_all_panels_and_is_in_the_legend():
    """Dense attention may answer no question of a task, and has no result then."""
    report = json.loads((RESULTS / "stream-qa.json").read_text())
    last = report["results"][-1]["task"]
    names = list(dict.fromkeys(row["configuration"] for row in report["results"]))
    report["results"] = [row for row in report["results"] if (row["task"], row["method"]) != (last, "dense")]
    figure = stream_qa_figure(report)
    first, second = ({line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes)
    assert second == {name: colour for name, colour in first.items() if name != "dense"}
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == names
