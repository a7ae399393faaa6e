"""Comparison of reports: differences, what is not comparable, and the outputs."""

import csv
import io
import json
import math
import random
import shutil
import statistics
from pathlib import Path

import pytest

from sinklm.cli.compare import compare as command
from sinklm.cli.evaluate import streaming, zero_shot
from sinklm.eval.compare import compare, short_names
from sinklm.eval.compare_output import comparison_figure, csv_text, markdown, results_table

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def write_zero_shot(folder: Path, outcomes: list[float] | None, *, acc: float | None = None, **changes) -> Path:
    """A report of one task as `zero_shot` writes it, and the samples if there are outcomes."""
    folder.mkdir(parents=True)
    num = len(outcomes or [0] * 50)
    mean = statistics.fmean(outcomes) if acc is None else acc
    report = {
        "model": {},
        "tasks": {"piqa": {"acc": mean, "acc_stderr": 0.05, "perplexity": 12.5, "perplexity_stderr": float("nan")}},
        "groups": {},
        "num_samples": {"piqa": {"original": 100, "effective": num}},
        "num_fewshot": {"piqa": 0},
        "task_versions": {"piqa": 1.0},
        "limit": None,
        "apply_chat_template": False,
    }
    (folder / "zero_shot.json").write_text(json.dumps(report | changes).replace("NaN", "null"))
    if outcomes is not None:
        lines = [
            json.dumps({"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "acc": value})
            for i, value in enumerate(outcomes)
        ]
        (folder / "samples_piqa.jsonl").write_text("\n".join(reversed(lines)))
    return folder


def row_of(comparison, *key):
    (row,) = [row for row in comparison.rows if row.key == key]
    return row


def test_differences_over_the_same_examples_are_paired(tmp_path):
    chance = random.Random(0)
    first = [float(chance.random() < 0.5) for _ in range(50)]
    second = [value if chance.random() < 0.8 else 1 - value for value in first]
    names = [str(write_zero_shot(tmp_path / name, values)) for name, values in (("a", first), ("b", second))]
    row = row_of(compare(names), "zero-shot", "piqa", "acc")
    changes = [b - a for a, b in zip(first, second, strict=True)]
    assert row.differences[1].value == pytest.approx(statistics.fmean(changes))
    assert row.differences[1].stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(50))
    assert row.differences[1].is_paired
    assert row.differences[0] is None
    assert [value.value for value in row.values] == [statistics.fmean(first), statistics.fmean(second)]


def test_without_samples_the_standard_errors_are_added(tmp_path):
    names = [str(write_zero_shot(tmp_path / name, None, acc=acc)) for name, acc in (("a", 0.5), ("b", 0.6))]
    found = row_of(compare(names), "zero-shot", "piqa", "acc").differences[1]
    assert (found.value, found.is_paired) == (pytest.approx(0.1), False)
    assert found.stderr == pytest.approx(0.05 * math.sqrt(2))
    assert row_of(compare(names), "zero-shot", "piqa", "perplexity").differences[1].stderr is None


def test_samples_of_another_evaluation_are_not_paired(tmp_path):
    """The report was replaced by a later evaluation without --log-samples."""
    first = write_zero_shot(tmp_path / "a", [1.0, 0.0, 1.0, 1.0])
    second = write_zero_shot(tmp_path / "b", [1.0, 0.0, 0.0, 1.0], acc=0.75)
    comparison = compare([str(first), str(second)])
    assert not row_of(comparison, "zero-shot", "piqa", "acc").differences[1].is_paired
    assert comparison.notes == ["b: piqa acc: its samples are not averaged to its value, so it is not paired"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"limit": 20}, "limit"),
        ({"apply_chat_template": True}, "apply_chat_template"),
        ({"num_fewshot": {"piqa": 5}}, "num_fewshot"),
        ({"task_versions": {"piqa": 2.0}}, "task_versions"),
        ({"num_samples": {"piqa": {"original": 100, "effective": 7}}}, "number of examples"),
    ],
)
def test_results_of_other_settings_have_no_difference(tmp_path, change, name):
    first = write_zero_shot(tmp_path / "a", [1.0, 0.0])
    second = write_zero_shot(tmp_path / "b", [1.0, 0.0], **change)
    comparison = compare([str(first), str(second)])
    row = row_of(comparison, "zero-shot", "piqa", "acc")
    assert row.differences == [None, None]
    assert None not in row.values
    assert f"zero-shot piqa acc: a and b differ in {name}: no difference" in comparison.notes


def test_the_reports_of_all_commands_are_read(tmp_path, checkpoints, task_folder, capsys):
    """The files that the commands write, in one table, one picture and all formats."""
    text = tmp_path / "book.txt"
    text.write_text("The ship lay in the harbour, and the rain fell on the river. " * 20)
    folders = []
    for num_sinks in (0, 1):
        folder, model = tmp_path / f"sinks-{num_sinks}", str(checkpoints[num_sinks])
        zero_shot(model, "rooms", include_path=task_folder, log_samples=True, output=folder)
        streaming(model, [text], caches="0+16,2+14", methods="window,streaming", output=folder)
        name = ("vanilla", "learnable-sink")[num_sinks]
        shutil.copy(RESULTS / f"sinks-{name}.json", folder / "sinks.json")
        folders.append(str(folder))
    capsys.readouterr()

    command(folders, output=tmp_path / "out")

    shown = capsys.readouterr().out
    assert "compare.png" in shown.replace("\n", "")
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    by_key = {(row["measurement"], row["name"], row["metric"]): row for row in report["rows"]}
    first, second = (json.loads((Path(folder) / "zero_shot.json").read_text()) for folder in folders)
    acc = by_key["zero-shot", "rooms", "acc"]
    assert [run["value"] for run in acc["runs"]] == [first["tasks"]["rooms"]["acc"], second["tasks"]["rooms"]["acc"]]
    assert acc["differences"][0]["paired"] is True
    stream = json.loads((Path(folders[1]) / "streaming.json").read_text())
    assert by_key["streaming", "2+14", "perplexity"]["runs"][1]["value"] == stream["results"][1]["perplexity"]
    assert by_key["streaming", "2+14", "bits per byte"]["runs"][1]["value"] == stream["results"][1]["bits_per_byte"]
    assert by_key["sinks", "first text token", "sink rate"]["differences"][0]["value"] == pytest.approx(
        -0.3908, abs=1e-4
    )
    # the model with sinks also scores the first token of the text, and is compared all the same
    for metric in ("perplexity", "bits per byte"):
        assert len(by_key["streaming", "2+14", metric]["differences"]) == 1
    assert report["notes"] == []

    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "compare.csv").read_text())))
    chosen = [row for row in rows if (row["name"], row["metric"]) == ("rooms", "acc")]
    assert [float(row["value"]) for row in chosen] == [run["value"] for run in acc["runs"]]
    assert "| zero-shot | rooms | acc |" in (tmp_path / "out" / "compare.md").read_text()
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_streaming_qa_is_paired_by_question(tmp_path):
    names = []
    for name, right in (("a", "1100"), ("b", "1011")):
        result = {"task": "arc_easy", "configuration": "4+60", "num_questions": 4, "right": right, "stderr": 0.2}
        result["exact_match"] = right.count("1") / 4
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"questions_sha256": {"arc_easy": "x"}, "results": [result]}))
        names.append(str(path))
    found = row_of(compare(names), "stream-qa", "arc_easy, 4+60", "exact match").differences[1]
    assert (found.value, found.is_paired) == (0.25, True)
    assert found.stderr == pytest.approx(statistics.stdev([0, -1, 1, 1]) / 2)


def test_tables_escape_names_and_leave_missing_values_empty(tmp_path):
    first = write_zero_shot(tmp_path / "a|b", [1.0, 0.0])
    second = tmp_path / "c"
    second.mkdir()
    (second / "stream_qa.json").write_text(json.dumps({"questions_sha256": {}, "results": []}))
    comparison = compare([str(first), str(second)])
    text = markdown(comparison)
    assert "a\\|b" in text
    assert "| zero-shot | piqa | acc | 0.5000 ± 0.0500 |  |  |" in text
    assert len(results_table(comparison, "x").columns) == 6
    assert len(csv_text(comparison).splitlines()) == 3
    assert comparison_figure(comparison) is not None


def test_names_are_as_short_as_possible():
    assert short_names(["runs/vanilla", "runs/sink"]) == ["vanilla", "sink"]
    assert short_names(["a/x/zero_shot.json", "b/x/zero_shot.json"]) == ["a/x", "b/x"]
    assert short_names(["EleutherAI/pythia-1.4b", "other"]) == ["pythia-1.4b", "other"]
    assert short_names(["runs/a", "runs/a"]) == ["a", "a (2)"]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="runs/a is no file or folder here, and has no results: evaluate it first"
    ):
        compare(["runs/a"])
    for content, message in (("{", "is not JSON"), ("[]", "is not a report"), ("{}", "is not a report")):
        Path("x.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            compare(["x.json"])
    Path("x.json").write_text(json.dumps({"tasks": {"piqa": {"acc": 1.0}}}))
    with pytest.raises(ValueError, match="is not a complete report"):
        compare(["x.json"])
    folder = write_zero_shot(tmp_path / "results" / "runs-a", [1.0, 0.0])
    (folder / "samples_piqa.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"samples_piqa\.jsonl is damaged"):
        compare(["runs/a"])
    (folder / "samples_piqa.jsonl").unlink()
    assert compare(["runs/a"]).runs[0].files == [Path("results/runs-a/zero_shot.json")]
    with pytest.raises(ValueError, match="at most 7"):
        compare(["runs/a"] * 8)


@pytest.mark.parametrize(
    ("change", "unlike"),
    [
        ({}, ""),
        ({"sha256": "y"}, "text"),
        ({"num_scored": 50}, "scored"),
    ],
)
def test_perplexities_of_the_same_tokens_are_compared(tmp_path, change, unlike):
    """The second model has a sink, so it scores the first token too."""
    for name, num_sinks in (("a", 0), ("b", 1)):
        result = {"configuration": "4+60", "method": "streaming", "num_scored": 99 + num_sinks, "perplexity": 10.0}
        text = {"sha256": "x", "num_tokens": 100, "num_prefix_tokens": 0, "num_bytes": 300}
        for values in (result, text) if num_sinks else ():
            values |= {key: value for key, value in change.items() if key in values}
        result |= {"bits_per_byte": 1.0, "num_bytes_scored": 3 * result["num_scored"]}
        report = {"model": {"num_sinks": num_sinks}, "bin_edges": [], "text": text, "results": [result]}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    comparison = compare([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    for metric in ("perplexity", "bits per byte"):
        found = row_of(comparison, "streaming", "4+60", metric).differences[1]
        assert (found is None) == bool(unlike)
    assert all(unlike in note for note in comparison.notes)
    assert len(comparison.notes) == (2 if unlike else 0)
