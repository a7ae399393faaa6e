"""Comparison of reports: differences, what is not comparable, and the outputs."""

import csv
import io
import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest

from sinklm.cli.compare import compare as command
from sinklm.cli.evaluate import streaming, zero_shot
from sinklm.console import Console
from sinklm.eval.compare import Difference, compare, difference
from sinklm.eval.compare_output import comparison_figure, csv_text, legend, markdown, results_table
from sinklm.eval.saved_reports import Value, read_run

from .reports import streamed, write_perplexity, write_stream_eval, write_streamed, write_zero_shot

RESULTS = Path(__file__).parents[2] / "docs" / "results"


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
    """A later evaluation replaced the samples of a renamed report. The means are equal."""
    first = write_zero_shot(tmp_path / "a", [1.0, 0.0, 1.0, 1.0])
    renamed = write_zero_shot(tmp_path / "b", [1.0, 0.0, 1.0, 1.0]) / "before.json"
    (tmp_path / "b" / "zero_shot.json").rename(renamed)
    second = write_zero_shot(tmp_path / "b", [1.0, 1.0, 0.0, 1.0])
    comparison = compare([str(first), str(renamed), str(second)])
    _, of_renamed, of_second = row_of(comparison, "zero-shot", "piqa", "acc").differences
    assert (of_renamed.is_paired, of_second.is_paired) == (False, True)
    assert comparison.notes == [
        "before.json: piqa: samples_piqa.jsonl is missing or of another evaluation, so it is not paired"
    ]


def test_samples_that_are_not_averaged_to_the_value_are_not_paired(tmp_path):
    first = write_zero_shot(tmp_path / "a", [1.0, 0.0, 1.0, 1.0])
    second = write_zero_shot(tmp_path / "b", [1.0, 0.0, 0.0, 1.0], acc=0.75)
    comparison = compare([str(first), str(second)])
    assert not row_of(comparison, "zero-shot", "piqa", "acc").differences[1].is_paired
    assert comparison.notes == ["b: piqa acc: its samples are not averaged to its value, so it is not paired"]


def test_a_group_with_other_questions_in_one_of_its_tasks_has_no_difference(tmp_path):
    group = {"groups": {"all": {"acc": 0.5}}, "group_tasks": {"all": ["some"], "some": ["piqa"]}}
    names = [
        str(write_zero_shot(tmp_path / name, [1.0, 0.0], questions_sha256={"piqa": name}, **group)) for name in "ab"
    ]
    comparison = compare(names)
    assert row_of(comparison, "zero-shot", "all", "acc").differences == [None, None]
    assert comparison.notes == [
        "zero-shot: a and b differ in questions: no difference in piqa acc, piqa perplexity, all acc"
    ]


def test_other_examples_are_not_paired():
    """Not even if one report has all examples of the other."""
    few = Value(0.5, 0.1, examples={"0 h": 1.0, "1 h": 0.0})
    for examples in ({"0 h": 1.0, "1 h": 0.0, "2 h": 1.0}, {"0 h": 1.0, "1 other": 1.0}, {"0 h": 1.0}):
        found, unlike = difference(few, Value(0.75, 0.2, examples=examples))
        assert (found, unlike) == (Difference(0.25, math.hypot(0.1, 0.2), False), "")


def test_a_group_of_an_older_report_has_all_its_tasks(tmp_path):
    """It does not say which tasks a group has."""
    old = {"tasks": {"piqa": {"acc": 0.5}, "arc_easy": {"acc": 0.4}}, "groups": {"all": {"acc": 0.45}}}
    names = [
        str(write_zero_shot(tmp_path / name, None, acc=0.5, group_tasks={}, num_fewshot={"arc_easy": shots}, **old))
        for name, shots in (("a", 0), ("b", 5))
    ]
    comparison = compare(names)
    assert row_of(comparison, "zero-shot", "piqa", "acc").differences[1] is not None
    assert row_of(comparison, "zero-shot", "all", "acc").differences == [None, None]
    assert comparison.notes == ["zero-shot: a and b differ in num_fewshot: no difference in arc_easy acc, all acc"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"limit": 20}, "limit"),
        ({"apply_chat_template": True}, "apply_chat_template"),
        ({"max_length": 24}, "max_length"),
        ({"model_args": {"add_bos_token": True}}, "model_args"),
        ({"num_fewshot": {"piqa": 5}}, "num_fewshot"),
        ({"task_versions": {"piqa": 2.0}}, "task_versions"),
        ({"questions_sha256": {"piqa": "other"}}, "questions"),
        ({"prompts_sha256": {"piqa": "other"}}, "prompts"),
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
    assert comparison.notes == [f"zero-shot: a and b differ in {name}: no difference in piqa acc, piqa perplexity"]


def folder_of_model(report: Path) -> str:
    return json.loads(report.read_text())["model"]["folder"]


@pytest.mark.parametrize("template", [False, True])
def test_prompts_may_differ_by_chat_template_and_are_not_in_older_reports(tmp_path, template):
    names = [
        str(write_zero_shot(tmp_path / name, [1.0, 0.0], apply_chat_template=template, prompts_sha256=prompts))
        for name, prompts in (("a", {"piqa": "p"}), ("b", {"piqa": "other"} if template else {}))
    ]
    comparison = compare(names)
    assert row_of(comparison, "zero-shot", "piqa", "acc").differences[1].is_paired
    assert comparison.notes == []


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"length": 512}, "length (256 and 512)"),
        ({"model": {"dtype": "bfloat16"}}, "dtype (float32 and bfloat16)"),
        ({"length": None}, ""),  # of an older version
    ],
)
def test_other_lengths_and_data_types_of_models_are_noted(tmp_path, change, note):
    common = {"model": {"dtype": "float32"}, "length": 256}
    names = [
        str(write_zero_shot(tmp_path / name, [1.0, 0.0], **more))
        for name, more in (("a", common), ("b", common | change))
    ]
    comparison = compare(names)
    assert row_of(comparison, "zero-shot", "piqa", "acc").differences[1].is_paired
    noted = f"zero-shot: a and b differ in {note}, which may be a part of the differences"
    assert comparison.notes == ([noted] if note else [])


@pytest.mark.parametrize(
    ("change", "note", "has_difference"),
    [
        ({}, "", True),
        (
            {"length": 512},
            "perplexity: a.json and b.json differ in length of a window (256 and 512): no difference in Books",
            False,
        ),
        ({"length": None, "model": {"max_position_embeddings": 512}}, "(256 and 512): no difference", False),  # older
        ({"length": None, "max_length": 512}, "(256 and 512): no difference", False),  # older
        ({"length": None, "model": {}}, "", True),
        (
            {"model": {"dtype": "bfloat16"}},
            "perplexity: a.json and b.json differ in dtype (float32 and bfloat16), which",
            True,
        ),
    ],
)
def test_perplexity_by_set_is_compared_in_windows_of_the_same_length(tmp_path, change, note, has_difference):
    names = [
        write_perplexity(tmp_path / "a.json", {"Books": 10.0, "all": 12.0}),
        write_perplexity(tmp_path / "b.json", {"Books": 9.0, "all": 12.0}, **change),
    ]
    comparison = compare(names)
    found = row_of(comparison, "perplexity", "Books", "perplexity").differences[1]
    assert (found is not None) == has_difference
    assert note in "".join(comparison.notes[:1])
    assert bool(note) == bool(comparison.notes)


def test_a_set_named_all_is_not_the_total(tmp_path):
    """Older reports do not mark the total, but it is always the last one."""
    old = write_perplexity(tmp_path / "a.json", {"Books": 8.0, "all": 12.0})
    new = write_perplexity(tmp_path / "b.json", {"Books": 9.0})
    report = json.loads(Path(new).read_text())
    (row,) = report["results"]
    marks = (("Books", 9.0, False), ("all", 10.0, False), ("all", 11.0, True))
    rows = [row | {"set": name, "perplexity": value, "is_total": is_total} for name, value, is_total in marks]
    Path(new).write_text(json.dumps(report | {"results": rows}))
    comparison = compare([old, new])
    found = {row.key[1]: [value and value.value for value in row.values] for row in comparison.rows}
    assert found == {"Books": [8.0, 9.0], "all": [None, 10.0], "all sets": [12.0, 11.0]}


METHODS = "dense,window,streaming,recompute"


def test_the_reports_of_all_commands_are_read(tmp_path, checkpoints, task_folder, capsys):
    """The files that the commands write, in one table, one picture and all formats."""
    text = tmp_path / "book.txt"
    text.write_text("The ship lay in the harbour, and the rain fell on the river. " * 60)
    folders = []
    for num_sinks in (0, 1):
        folder, model = tmp_path / f"sinks-{num_sinks}", str(checkpoints[num_sinks])
        zero_shot(model, "rooms", include_path=task_folder, log_samples=True, output=folder)
        streaming(model, [text], caches="0+16,2+14", methods=METHODS, recompute_every=50, output=folder)
        name = ("vanilla", "learnable-sink")[num_sinks]
        sinks = json.loads((RESULTS / f"sinks-{name}.json").read_text())
        sinks["model"]["folder"] = folder_of_model(folder / "zero_shot.json")
        (folder / "sinks.json").write_text(json.dumps(sinks))
        folders.append(str(folder))
    capsys.readouterr()

    command(folders, output=tmp_path / "out")

    shown = capsys.readouterr().out
    assert "compare.png" in shown.replace("\n", "")
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    by_key = {(row["measurement"], row["name"], row["metric"]): row for row in report["rows"]}
    first, second = (json.loads((Path(folder) / "zero_shot.json").read_text()) for folder in folders)
    assert first["questions_sha256"] == second["questions_sha256"]
    assert first["prompts_sha256"] == second["prompts_sha256"]
    assert len(first["questions_sha256"]["rooms"]) == len(first["prompts_sha256"]["rooms"]) == 64
    acc = by_key["zero-shot", "rooms", "acc"]
    assert [run["value"] for run in acc["runs"]] == [first["tasks"]["rooms"]["acc"], second["tasks"]["rooms"]["acc"]]
    assert acc["differences"][0]["paired"] is True
    stream = json.loads((Path(folders[1]) / "streaming.json").read_text())
    (kept,) = (result for result in stream["results"] if result["configuration"] == "2+14")
    for metric in ("perplexity", "bits per byte"):
        assert by_key["streaming", "2+14", metric]["runs"][1]["value"] == kept["after_first"][metric.replace(" ", "_")]
    assert by_key["sinks", "first text token", "sink rate"]["differences"][0]["value"] == pytest.approx(
        -0.3908, abs=1e-4
    )
    # the model with sinks also scores the first token of the text, which is left out here
    dense = stream["results"][0]
    assert dense["num_scored"] < stream["text"]["num_tokens"]
    for configuration in ("dense", "0+16", "2+14", "recompute 16"):
        for metric in ("perplexity", "bits per byte"):
            assert len(by_key["streaming", configuration, metric]["differences"]) == 1
    (note,) = report["notes"]
    assert note.startswith("streaming: without the first token")
    assert f"- {note}\n" in (tmp_path / "out" / "compare.md").read_text()

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
    assert legend(compare(names)) == "± one standard error; p: paired, over the same examples"
    assert (found.value, found.is_paired) == (0.25, True)
    assert found.stderr == pytest.approx(statistics.stdev([0, -1, 1, 1]) / 2)


def test_stream_eval_with_other_places_of_questions_has_no_difference(tmp_path):
    """Reports of older versions, without the number, have a question every ten lines."""
    key = ("stream-eval", "4+252, 20 lines back", "accuracy")
    first = write_stream_eval(tmp_path / "a.json", 0.25, lines_per_question=10)
    older = write_stream_eval(tmp_path / "b.json", 0.5)
    fewer = write_stream_eval(tmp_path / "c.json", 0.75, lines_per_question=50)
    comparison = compare([first, older, fewer])
    _, of_older, of_fewer = row_of(comparison, *key).differences
    assert (of_older.value, of_fewer) == (0.25, None)
    (note,) = comparison.notes
    assert note.endswith(
        f"a.json and c.json differ in lines_per_question (10 and 50): no difference in {' '.join(key[1:])}"
    )


def test_tables_escape_names_and_leave_missing_values_empty(tmp_path):
    first = write_zero_shot(tmp_path / "a|b", [1.0, 0.0])
    second = tmp_path / "c"
    second.mkdir()
    (second / "stream_qa.json").write_text(json.dumps({"questions_sha256": {}, "results": []}))
    comparison = compare([str(first), str(second)])
    text = markdown(comparison)
    assert "a\\|b" in text
    assert "| zero-shot | piqa | acc | 0.5000 ± 0.0500 |  |  |" in text
    assert len(results_table(comparison, "x", width=200).columns) == 6
    narrow = Console(width=60, file=io.StringIO())
    narrow.print(results_table(comparison, "x", width=60))
    assert re.search(r"│   a\|b +│ 0\.5000 ± 0\.0500 │ +│\n│   c +│ +│ +│\n", narrow.file.getvalue())
    assert len(csv_text(comparison).splitlines()) == 3
    assert comparison_figure(comparison) is not None


def test_counts_have_no_decimals_and_all_other_numbers_have(tmp_path):
    sinks = [str(RESULTS / f"sinks-{name}.json") for name in ("vanilla", "smollm2")]
    row = "| sinks | all positions | massive activations | 0 | 24 |"
    assert row in markdown(compare(sinks))
    assert legend(compare(sinks)) == ""
    zero_shot = [str(write_zero_shot(tmp_path / name, [1.0, 1.0])) for name in "ab"]
    assert "| zero-shot | piqa | acc | 1.0000 ± 0.0500 | 1.0000 ± 0.0500 |" in markdown(compare(zero_shot))
    assert "\n\n± one standard error; p: paired, over the same examples\n" in markdown(compare(zero_shot))


def test_the_picture_of_an_earlier_comparison_is_deleted(tmp_path, capsys):
    plotted = [str(write_zero_shot(tmp_path / name, [1.0, 0.0])) for name in "ab"]
    command(plotted, output=tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").exists()
    unplotted = [write_perplexity(tmp_path / f"{name}.json", {"Books": 9.0}) for name in "cd"]
    command(unplotted, output=tmp_path / "out")
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv", ".json", ".md"]
    assert "png" not in capsys.readouterr().out.rpartition("Results in")[2]


@pytest.mark.parametrize(
    ("change", "unlike", "without"),
    [
        ({}, "", ()),
        ({"sha256": "y"}, "differ in text:", ("perplexity", "bits per byte")),
        ({"num_scored": 50, "num_bytes_scored": 150}, "scored (", ("perplexity", "bits per byte")),
        ({"ids_sha256": "j"}, "differ in tokens:", ("perplexity",)),  # of another tokenizer
        ({"is_old": True}, "evaluate both again", ("perplexity", "bits per byte")),
    ],
)
def test_perplexities_of_the_same_tokens_are_compared(tmp_path, change, unlike, without):
    old = {"is_old": True} if "is_old" in change else {}
    names = [write_streamed(tmp_path / "a.json", 0, **old), write_streamed(tmp_path / "b.json", 1, **change)]
    comparison = compare(names)
    for metric in ("perplexity", "bits per byte"):
        found = row_of(comparison, "streaming", "dense", metric).differences[1]
        assert (found is None) == (metric in without)
    notes = [note for note in comparison.notes if "without the first token" not in note]
    assert all(unlike in note for note in notes)
    named = ", ".join(note.partition(": no difference in ")[2] for note in notes)
    assert named == ", ".join(f"dense {metric}" for metric in without)


@pytest.mark.parametrize("method", ["recompute", "streaming"])
def test_recomputed_perplexities_are_of_the_same_tokens(tmp_path, method):
    """The other methods score all tokens, whatever the report has as recompute_every."""
    names = []
    for every in (2, 4):
        report = json.loads(streamed(method=method)) | {"recompute_every": every}
        (tmp_path / f"{every}.json").write_text(json.dumps(report))
        names.append(str(tmp_path / f"{every}.json"))
    comparison = compare(names)
    found = row_of(comparison, "streaming", "4+60", "perplexity").differences[1]
    assert (found is None) == (method == "recompute")
    unlike = "streaming: 2.json and 4.json differ in recompute_every (2 and 4): no difference in 4+60 perplexity"
    assert comparison.notes == ([unlike] if method == "recompute" else [])


def test_values_and_differences_leave_out_the_first_token_if_one_model_cannot_score_it(tmp_path):
    plain, sink, better = (
        write_streamed(tmp_path / f"{name}.json", num_sinks, perplexity=perplexity)
        for name, num_sinks, perplexity in (("a", 0, 10.0), ("b", 1, 9.5), ("c", 1, 9.0))
    )
    comparison = compare([plain, sink])
    row = row_of(comparison, "streaming", "dense", "perplexity")
    assert [value.value for value in row.values] == [10.0, 9.5]
    assert row.differences[1].value == -0.5
    assert comparison.notes == ["streaming: without the first token of the text, which only some of these models score"]
    comparison = compare([sink, better])
    row = row_of(comparison, "streaming", "dense", "perplexity")
    assert [value.value for value in row.values] == [10.5, 10.0]
    assert row.differences[1].value == -0.5
    assert comparison.notes == []


def test_the_largest_perplexities_are_compared(tmp_path):
    """Those that the commands write, in all outputs."""
    names = [
        write_streamed(tmp_path / f"{i}.json", 0, perplexity=value) for i, value in enumerate((9.5, math.exp(700)))
    ]
    command(names, output=tmp_path / "out")
    row = row_of(compare(names), "streaming", "dense", "perplexity")
    assert row.differences[1].value == pytest.approx(math.exp(700))
    assert "| 9.5000 | 1.014e+304 | +1.014e+304 |" in (tmp_path / "out" / "compare.md").read_text()
    low, high = comparison_figure(compare(names)).axes[0].get_xlim()
    assert low < 9.5 < 1e200 < high < math.inf
    too_large = write_streamed(tmp_path / "x.json", 0, perplexity=1e305)
    with pytest.raises(ValueError, match=r"perplexity is '1e\+305' and not a number"):
        read_run(too_large, "x")


@pytest.mark.parametrize(
    ("perplexities", "labels"),
    [
        ((30.0, 80.0), {"30", "40", "50", "60", "70", "80"}),
        ((33.1, 33.8), {f"33.{i}" for i in range(1, 9)}),
        ((30.0, 3_000_000.0), {"100", "1,000", "10,000", "100,000", "1,000,000"}),
    ],
)
def test_the_axis_of_perplexities_has_labels_for_any_range(tmp_path, perplexities, labels):
    names = [write_streamed(tmp_path / f"{i}.json", 0, perplexity=value) for i, value in enumerate(perplexities)]
    (axes,) = comparison_figure(compare(names)).axes
    low, high = axes.get_xlim()
    shown = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    minor = zip(axes.get_xticks(minor=True), axes.get_xticklabels(minor=True), strict=True)
    found = {text.get_text() for value, text in (*shown, *minor) if low <= value <= high}
    assert found - {""} == labels


def test_how_many_tokens_were_scored_is_in_the_note(tmp_path):
    names = [write_streamed(tmp_path / f"{num}.json", 0, num_scored=num) for num in (99, 50)]
    assert "differ in number of tokens scored (99 and 50): no difference" in compare(names).notes[0]


def test_two_to_seven_runs_are_compared(tmp_path):
    name = write_perplexity(tmp_path / "a.json", {"Books": 10.0})
    for num in (2, 7):
        assert len(compare([name] * num).runs) == num
    for num in (1, 8):
        with pytest.raises(ValueError, match=rf"{num} runs?: compare at least 2 and at most 7"):
            compare(["runs/a"] * num)
