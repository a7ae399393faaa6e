"""The study of recall: parts of a stream, and the tables and the picture made from them."""

import importlib
import json
from argparse import Namespace
from math import sqrt
from pathlib import Path
from types import ModuleType

import pytest

from sinklm.data.tokenizer import train_tokenizer
from sinklm.eval.stream_eval import tokens_per_line
from sinklm.eval.tasks.stream_eval.records import make_records

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
ENDS = [600, 1024, 2048, 3000, 4000]  # tokens read at the ends of parts
PLACES = [1, 3, 4, 10, 10]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("recall_report")


def result(num_kept: int, window: int, by_distance: dict[int, list[float]]) -> dict:
    """A stream with a line of ten tokens, read by ten samples; accuracies at each distance by part.

    Shorter lists are of the last parts: a distance is asked when there are enough lines.
    """
    parts = [{"num_tokens": float(end), "num_places": n, "accuracy": {}} for end, n in zip(ENDS, PLACES, strict=True)]
    distances = []
    for distance, accuracies in by_distance.items():
        asked = parts[-len(accuracies) :]
        for part, accuracy in zip(asked, accuracies, strict=True):
            part["accuracy"][str(distance)] = accuracy
        places = sum(part["num_places"] for part in asked)
        mean = sum(part["num_places"] * a for part, a in zip(asked, accuracies, strict=True)) / places
        distances.append({"lines": distance, "accuracy": mean, "num_questions": 10 * places})
    facts = {"configuration": f"{num_kept}+{window}", "num_kept": num_kept, "window": window}
    return facts | {"tokens_per_line": 10.0, "num_samples": 10, "distances": distances, "parts": parts}


@pytest.fixture
def models() -> dict:
    """Caches of 100 and 300 tokens, which hold lines up to 7 and 27 lines back."""
    dropped = [0.5, 0.5, 0.1, 0.1, 0.1]
    return {
        "vanilla": {
            "dense": result(0, 4000, {5: [1.0, 1.0, 0.5, 0.0, 0.0], 20: [0.5, 0.5, 0.25, 0.0, 0.0]}),
            "0+100": result(0, 100, {5: dropped, 20: [0.0] * 5}),
            "4+96": result(4, 96, {5: [0.8, 1.0, 1.0, 0.9, 0.9], 20: [0.0] * 5}),
            "0+300": result(0, 300, {5: dropped, 20: dropped[1:], 30: [0.0] * 4}),
            "4+296": result(4, 296, {5: [1.0] * 5, 20: [0.9, 0.8, 0.8, 0.7], 30: [0.0] * 4}),
        },
        "drawn": {"1+99": result(1, 99, {5: [1.0] * 5})},
    }


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def stderr(*shares: tuple[float, int]) -> str:
    """Format the standard error of the mean of binomial shares, in percent."""
    return f"{100 * sqrt(sum(variance(*share) for share in shares)) / len(shares):.2f}"


def variance(share: float, number: int) -> float:
    """Return the variance of a share of right answers, with one more right and one more wrong."""
    share = (share * number + 1) / (number + 2)
    return share * (1 - share) / number


def test_distances_that_a_cache_holds_are_bold(report, models):
    found = rows_of(report.distances(models))
    assert found["lines back"] == ["5", "20", "30"]
    assert found["vanilla, dense, to 4,000 tokens"] == ["**21.4**", "**10.7**", ""]
    assert found["vanilla, 4+96"] == ["**92.1**", "0.0", ""]
    assert found["vanilla, 4+296"] == ["**100.0**", "**77.4**", "0.0"]
    assert found["drawn, 1+99"] == ["**100.0**", "", ""]
    largest = 100 * sqrt(variance(20.9 / 27, 270))  # of 20 lines back with 4+296
    assert report.distances(models).endswith(f"Standard errors are at most {largest:.1f} points.")


def test_a_line_is_held_if_it_and_the_question_fit_the_window(report):
    for window, distances in ((69, [4]), (70, [4, 5]), (220, [4, 5, 20])):
        assert report.held(result(4, window, {4: [1.0], 5: [1.0], 20: [1.0]})) == distances


def test_a_stream_is_shown_by_octave_at_the_papers_distance(report, models):
    models["vanilla"]["4+496"] = result(4, 496, {20: [1.0] * 4})
    found = rows_of(report.stream(models))
    assert found["20 lines back, tokens read"] == ["to 1,024", "to 2,048", "to 4,000"]
    assert list(found)[2:] == ["vanilla, dense", "vanilla, 0+300", "vanilla, 4+296"]  # the smallest cache that holds it
    cells = [f"90.0 ± {stderr((0.9, 30))}", f"80.0 ± {stderr((0.8, 40))}", f"75.0 ± {stderr((0.75, 200))}"]
    assert found["vanilla, 4+296"] == cells
    assert found["vanilla, dense"][0] == f"50.0 ± {stderr((0.5, 40))}"
    small = {"drawn": {"1+99": models["drawn"]["1+99"]}}
    assert next(iter(rows_of(report.stream(small)))) == "5 lines back, tokens read"
    assert report.stream({}) == report.answer({}) == report.distances({}) == ""


def test_the_answer_is_over_the_distances_that_a_cache_holds(report, models):
    found = rows_of(report.answer(models))
    small, large = found["vanilla, 4+96"], found["vanilla, 4+296"]
    assert small[:3] == ["5 to 5", f"92.1 ± {stderr((25.8 / 28, 280))}", "5"]
    assert small[3] == f"−5.0 ± {100 * sqrt(variance(0.95, 40) + variance(0.9, 200)):.2f}"
    assert large[:3] == ["5 to 20", f"88.7 ± {stderr((1.0, 280), (20.9 / 27, 270))}", "20"]
    assert large[3] == f"−15.0 ± {100 * sqrt(variance(0.9, 30) + variance(0.75, 200)):.2f}"
    assert small[4:] == [f"92.1 ± {stderr((25.8 / 28, 280))}", f"15.7 ± {stderr((4.4 / 28, 280))}"]
    # Without the part that ends at 2N.
    assert large[4:] == [f"77.4 ± {stderr((20.9 / 27, 270))}", f"14.4 ± {stderr((3.9 / 27, 270))}"]
    right = f"100.0 ± {stderr((1.0, 280))}"
    changed = f"+0.0 ± {100 * sqrt(variance(1.0, 40) + variance(1.0, 200)):.2f}"
    assert found["drawn, 1+99"] == ["5 to 5", right, "5", changed, right, ""]  # 0+100 was not measured


def test_along_the_stream_only_some_distances_are_known(report, models):
    for part in models["vanilla"]["4+296"]["parts"]:
        part["accuracy"].pop("20", None)
    large = rows_of(report.answer(models))["vanilla, 4+296"]
    changed = f"+0.0 ± {100 * sqrt(variance(1.0, 40) + variance(1.0, 200)):.2f}"
    assert large[:4] == ["5 to 20", f"88.7 ± {stderr((1.0, 280), (20.9 / 27, 270))}", "5", changed]


def test_a_stream_of_one_octave_has_no_change(report, models):
    short = models["drawn"]["1+99"]
    short["parts"] = short["parts"][:2]
    assert rows_of(report.answer({"drawn": {"1+99": short}}))["drawn, 1+99"][3] == ""


def test_a_training_has_its_windows_and_steps(report):
    attention = {"pattern": "window", "window": [32, 1023], "num_kept": None}
    config = {"train": {"num_steps": 8000}, "model": {"num_hidden_layers": 4, "attention": attention}}
    run = {"config": config, "tokens": 524_288_000, "is_finished": True, "tokens_per_second": 1000.0}
    run |= {"memory_gib": 1.5, "loss": [[1, 9.0], *([n, 1.5] for n in range(2, 12))], "validation_loss": [[1, 2.0]]}
    found = rows_of(report.training({"drawn": run, "vanilla": run | {"is_finished": False}}))
    assert found["drawn"] == ["drawn from 32 to 1,023", "8,000", "524", "1.5000", "2.0000", "1,000", "1.5"]
    assert "vanilla (unfinished)" in found


def test_the_picture_has_a_panel_for_each_model_at_a_distance_that_all_caches_hold(report, models):
    vanilla, drawn = report.picture(models).axes
    assert (vanilla.get_title(), drawn.get_title()) == ("vanilla", "drawn")
    assert vanilla.get_ylabel() == "Exact match, 5 lines back (%)"
    curves = {line.get_label(): line for line in vanilla.lines}
    assert list(curves) == ["S+W, 100 tokens", "0+N, 100 tokens", "S+W, 300 tokens", "0+N, 300 tokens", "dense"]
    assert curves["S+W, 100 tokens"].get_xdata().tolist() == ENDS
    assert curves["S+W, 100 tokens"].get_ydata().tolist() == [80.0, 100.0, 100.0, 90.0, 90.0]
    assert [line.get_label() for line in drawn.lines] == ["S+W, 100 tokens"]
    models["drawn"]["1+49"] = result(1, 49, {5: [0.1] * 5})  # it holds neither distance
    assert report.picture(models).axes[0].get_ylabel() == "Exact match, 5 lines back (%)"


def test_a_size_has_one_colour_in_all_panels_and_the_legend_has_all_curves(report, models):
    models = {"drawn": {"1+299": result(1, 299, {5: [1.0] * 5})}, "vanilla": models["vanilla"]}
    figure = report.picture(models)
    (drawn,), vanilla = figure.axes[0].lines, {line.get_label(): line for line in figure.axes[1].lines}
    assert drawn.get_color() == vanilla["S+W, 300 tokens"].get_color() != vanilla["S+W, 100 tokens"].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(vanilla)


def test_each_model_has_its_caches_and_one_with_windows_no_dense_attention(tmp_path):
    study = importlib.import_module("recall_study")
    train_tokenizer(["a line of a record is 12345"], 300).save(str(tmp_path / "tokenizer.json"))
    settings = {"folder": tmp_path, "num_samples": 2, "num_stream_tokens": 20_000, "cache_sizes": [256]}
    found = study.evaluations(Namespace(overrides=[], **settings))
    assert {name: [cache for model, cache in found if model == name] for name, _ in found} == {
        "vanilla": ["dense", "0+256", "4+252"],
        "learnable-sink": ["dense", "0+256", "1+255"],
        "drawn": ["0+256", "1+255"],
    }
    lines = {what: options[options.index("--num-lines") + 1] for what, options in found["drawn", "1+255"].items()}
    tokenizer = study.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for what, num_tokens, lines_per_question in (("by-distance", 8 * 1024, 10), ("along-the-stream", 20_000, 50)):
        one_more = lines[what] + lines_per_question
        sizes = [n * tokens_per_line(tokenizer, make_records(1, n, seed=0)[0]) for n in (lines[what] - 1, one_more)]
        assert sizes[0] <= num_tokens < sizes[1]


def test_reports_are_of_the_last_checkpoint(tmp_path):
    read_report = importlib.import_module("recall_study").read_report
    path, run = tmp_path / "results" / "dense" / "stream_eval.json", tmp_path / "runs" / "drawn"
    checkpoints = [run / "checkpoints" / f"step-{step}" for step in (3, 12)]
    path.parent.mkdir(parents=True)
    report = {"model": {"folder": str(checkpoints[0] / "model")}, "num_samples": 2}
    path.write_text(json.dumps(report))
    for checkpoint in checkpoints:
        assert read_report(path, run, path.parent) == report
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
    with pytest.raises(ValueError, match=rf"is of step-3, and .*drawn has step-12: delete {path.parent} and evaluate"):
        read_report(path, run, path.parent)


def test_parts_of_a_stream_are_quarters_of_octaves():
    summary = importlib.import_module("recall_study").summary
    read = [200.0, 400.0, 861.0, 862.0, 1024.0, 1025.0, 2048.0]  # 1024 / 2^(1/4) = 861.08
    places = [{"line": 10 * i, "mean_num_tokens": n, "accuracy": {"0": i / 10}} for i, n in enumerate(read)]
    places[3]["accuracy"]["20"] = places[4]["accuracy"]["20"] = 1 / 3
    model = {"name_or_path": "run", "folder": "run/checkpoints/step-3/model", "dtype": "float32"}
    report = {"model": model, "num_samples": 10, "results": [{"configuration": "0+9", "places": places}]}
    found = summary(report)
    assert (found["num_samples"], found["configuration"], found["model"]) == (10, "0+9", {"dtype": "float32"})
    assert [(part["num_tokens"], part["num_places"]) for part in found["parts"]] == [
        (200.0, 1),
        (400.0, 1),
        (861.0, 1),
        (1024.0, 2),
        (1025.0, 1),
        (2048.0, 1),
    ]
    assert found["parts"][3]["accuracy"] == {"0": 0.35, "20": 0.333333}
