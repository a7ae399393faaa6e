"""Reading reports: which files, what is damaged, and the names of runs."""

import json
import math
from pathlib import Path

import pytest

from sinklm.eval.saved_reports import read_run, short_names, with_stderr
from sinklm.eval.sinks.tables import shown_positions

from .reports import answered, streamed, write_zero_shot

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_each_metric_has_the_standard_error_of_its_filter():
    metrics = {"acc": 0.5, "acc_stderr": 0.1, "acc,first": 0.75, "acc_stderr,first": 0.25}
    metrics |= {"f1": 1.0, "mcc": 0.0, "mcc_stderr": math.nan}
    expected = [("acc", 0.5, 0.1), ("acc,first", 0.75, 0.25), ("f1", 1.0, None), ("mcc", 0.0, None)]
    assert list(with_stderr(metrics)) == expected


def test_a_later_evaluation_without_samples_deletes_those_of_the_one_before(tmp_path):
    folder = write_zero_shot(tmp_path, [1.0, 0.0])
    mine = folder / "samples_mine.jsonl"
    mine.write_text("of no report")
    assert (folder / "samples_piqa.jsonl").exists()
    write_zero_shot(tmp_path, None, acc=0.5)
    assert sorted(path.name for path in folder.iterdir()) == ["samples_mine.jsonl", "zero_shot.json"]


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs", "is_same"),
    [
        ("runs/a", "/home/me/runs/a", True),
        ("./runs/a/", "../x/runs/a", True),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-70m", True),
        ("EleutherAI/pythia-70m", "/cache/models--EleutherAI--pythia-70m/snapshots/a39f36b", True),
        ("", "runs/a", True),  # of a report without a name
        ("runs/a", "runs/b", False),
        ("runs/a/checkpoints/step-1/model", "runs/a/checkpoints/step-2/model", False),
    ],
)
def test_the_reports_of_a_folder_are_of_one_model(tmp_path, ours, theirs, is_same, is_folder):
    folder = write_zero_shot(tmp_path, [1.0, 0.0], model={"folder": ours})
    report = json.loads(streamed())
    report["model"]["folder" if is_folder else "name_or_path"] = theirs
    (folder / "streaming.json").write_text(json.dumps(report))
    if is_same:
        assert len(read_run(str(folder), "a").files) == 2
        return
    with pytest.raises(ValueError, match=rf"zero_shot.json is of the model {ours}, but .*streaming.json of {theirs}: "):
        read_run(str(folder), "a")


def test_names_are_as_short_as_possible():
    assert short_names(["runs/vanilla", "runs/sink"]) == ["vanilla", "sink"]
    assert short_names(["a/x/zero_shot.json", "b/x/zero_shot.json"]) == ["a/x", "b/x"]
    assert short_names(["EleutherAI/pythia-1.4b", "other"]) == ["pythia-1.4b", "other"]
    assert short_names(["/a/x", "/x"]) == ["a/x", "/x"]
    assert short_names(["/a/b", "/b", "/"]) == ["a/b", "/b", "/"]
    for same in ("runs/a", "./runs/a", "runs/b/../a/", "runs/a/zero_shot.json"):
        assert short_names(["runs/a", same]) == ["a", "a (2)"]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs/a is no file or folder here, and has no results: evaluate"):
        read_run("runs/a", "a")
    with pytest.raises(FileNotFoundError, match=r"^results/a/zero_shot.json: no such file or folder; check the path$"):
        read_run("results/a/zero_shot.json", "a")
    folder = write_zero_shot(tmp_path / "results" / "runs-a", [1.0, 0.0])
    assert read_run("runs/a", "a").files == [Path("results/runs-a/zero_shot.json")]
    (folder / "samples_piqa.jsonl").write_text("{")
    assert "samples_piqa.jsonl is missing or of another" in read_run("runs/a", "a").notes[0]


def test_folders_that_are_not_used_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a/results", "results/runs-a"):
        write_zero_shot(tmp_path / folder, [1.0, 0.0])
    run = read_run("runs/a", "a")
    assert run.files == [Path("runs/a/results/zero_shot.json")]
    assert run.notes == ["results of runs/a/results; not used: results/runs-a"]
    assert read_run("runs/a/results", "a").notes == []
    assert read_run("runs/a/results/zero_shot.json", "a").notes == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a report that can be compared: use one of zero_shot.json, "),
        ('{"formats": []}', "is not a report that can be compared"),  # of eval quantization
        ('{"tasks": ' + "[" * 100_000, "is not JSON: it is nested too deeply"),
        (json.dumps({"tasks": {"piqa": {"acc": 1.0}}}), "is not a complete report"),
        (json.dumps({"tasks": {"piqa": {"acc": 10**400}}, "groups": {}}), "is not a complete report"),
        (streamed(perplexity=None), "is not a complete report .*'None' and not a number"),
        (streamed(perplexity="3"), "is not a complete report .*'3' and not a number"),
        (streamed(perplexity=10**400), "is not a complete report"),
        (streamed(perplexity=math.nan), "is not JSON: NaN is not a number"),
        (streamed(perplexity=1).replace('": 1,', '": 1e999,'), "is not a complete report .*'inf' and not a number"),
        (streamed(num_scored="9"), "is not a complete report"),
        (streamed(configuration=[4, 60]), r"is not a complete report .*'\[4, 60\]' and not a text"),
        (answered(exact_match=None), "is not a complete report"),
        (answered(stderr="0.1"), "is not a complete report"),
        (answered(right=None), "is not a complete report"),
    ],
)  # fmt: skip
def test_a_damaged_report_is_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"x\.json {message}"):
        read_run(str(path), "x")


@pytest.mark.parametrize(("mass", "is_shown"), [(9e-4, False), (0.2, True)])
def test_attention_to_no_token_is_read_if_it_is_more_than_rounding(tmp_path, mass, is_shown):
    report = json.loads((RESULTS / "sinks-vanilla.json").read_text())
    report["mass"]["no token"] = mass
    (tmp_path / "sinks.json").write_text(json.dumps(report))
    assert (("sinks", "no token", "attention") in read_run(str(tmp_path), "a").values) == is_shown
    assert ("no token" in shown_positions(report)) == is_shown
