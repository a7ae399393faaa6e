"""Scores from local files equal those of lm-eval's own tasks; the forms of data sets; refusals."""

import gzip
import json
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.lm import as_lm
from sinklm.eval.local_data import Source, find_files, load_rows, use_local_data
from sinklm.eval.local_rows import FIELDS
from sinklm.eval.zero_shot import PAPER_FOLDERS, evaluate, find_tasks, task_manager

from .benchmarks import ARC, DATA, HELLASWAG, TASKS, write_benchmarks, write_card, write_rows

WINOGRANDE = DATA["allenai/winogrande", "winogrande_xl"]["validation"][0]
LINE = json.dumps(ARC[0]).encode() + b"\n"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


def from_the_hub(path: str, name: str | None = None, **options) -> datasets.DatasetDict:
    """The data set as on the Hub, which has all splits."""
    splits = {split: next(iter(DATA[path, name].values())) for split in ("train", "validation", "test")}
    splits |= DATA[path, name]
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


@pytest.mark.parametrize("num_fewshot", [None, 1])
def test_scores_equal_those_of_stock_lm_eval_on_the_same_data(benchmarks, checkpoints, monkeypatch, num_fewshot):
    """lm-eval's task files as they are; only the download is replaced."""
    tasks = list(TASKS) if num_fewshot is None else ["arc_easy"]
    model, tokenizer = load_model(checkpoints[1]), load_tokenizer(checkpoints[1])
    found = find_tasks(tasks, data_dir=benchmarks, num_fewshot=num_fewshot)
    ours = evaluate(model, tokenizer, found, log_samples=True, batch_size=4)

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in PAPER_FOLDERS]
    stock = simple_evaluate(
        as_lm(model, tokenizer, batch_size=4),
        tasks=tasks,
        task_manager=TaskManager(include_path=folders, include_defaults=False),
        num_fewshot=num_fewshot,
        bootstrap_iters=100_000,
    )

    for task in tasks:
        expected = {k.removesuffix(",none"): v for k, v in stock["results"][task].items() if isinstance(v, float)}
        assert {k: ours["tasks"][task][k] for k in expected} == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert [s["arguments"] for s in ours["samples"][task]] == [s["arguments"] for s in stock["samples"][task]]
    assert len(ours["data_files"]) == len(tasks)


def arc_source(task: str = "arc_easy", fewshot: str | None = None) -> Source:
    return Source(task, *TASKS[task], evaluated="test", fewshot=fewshot)


@pytest.mark.parametrize(
    ("path", "is_found"),
    [
        ("ai2_arc/ARC-Easy/test-00000-of-00001.parquet", True),
        ("allenai/ai2_arc/ARC-Easy/test-00000-of-00001-0f1e2d3c4b5a6978.parquet", True),
        ("allenai__ai2_arc/ARC-Easy/test/0000.parquet", True),
        ("datasets--allenai--ai2_arc/snapshots/abc/ARC-Easy/test-00000-of-00001.parquet", True),
        ("arc_easy/test.jsonl", True),
        ("arc_easy/data/test-00000-of-00001.parquet", True),
        ("arc_easy_test.jsonl", True),
        ("ARC-Easy-Test.jsonl", True),
        ("arc_easy.jsonl", True),
        ("ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", False),  # another configuration
        ("ai2_arc/test.jsonl", False),  # of which configuration?
        ("arc_easy_validation.jsonl", False),
        ("arc_easy_test_de.jsonl", False),
        ("my_arc_easy_test.jsonl", False),
    ],
)
def test_the_forms_of_a_data_set(tmp_path, path, is_found):
    write_rows(tmp_path / path, ARC)
    found = find_files(arc_source(), tmp_path).get("test", [])
    assert found == ([tmp_path / path] if is_found else [])


def test_a_folder_of_save_to_disk_and_a_compressed_file_are_read(tmp_path):
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list(ARC), "train": datasets.Dataset.from_list(ARC)})
    saved.save_to_disk(tmp_path / "arc_easy")
    assert load_rows("arc_easy", tmp_path) == ARC

    with gzip.open(tmp_path / "arc_challenge_test.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ARC[:2]))
    assert load_rows("arc_challenge", tmp_path) == ARC[:2]


def test_all_shards_are_read_and_a_missing_one_is_named(tmp_path):
    for i in range(3):
        write_rows(tmp_path / "ai2_arc/ARC-Easy" / f"test-{i:05}-of-00003.parquet", ARC[i : i + 1])
    assert load_rows("arc_easy", tmp_path) == ARC
    (tmp_path / "ai2_arc/ARC-Easy/test-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="2 of 3 files of the split test"):
        load_rows("arc_easy", tmp_path)


def test_the_newest_snapshot_of_the_hubs_cache_is_read(tmp_path):
    cache = tmp_path / "datasets--allenai--ai2_arc"
    write_rows(cache / "snapshots/aaa/ARC-Easy/test.jsonl", ARC[:1])
    write_rows(cache / "snapshots/bbb/ARC-Easy/test.jsonl", ARC)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("aaa")
    assert load_rows("arc_easy", tmp_path) == ARC[:1]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"arc_easy_validation.jsonl": ARC}, FileNotFoundError, "evaluates the split test of .* only validation"),
        ({"piqa_validation.jsonl": ARC}, FileNotFoundError, "none of its files"),
        ({"arc_easy_test.jsonl": ARC, "arc_easy/test.jsonl": ARC}, ValueError, "data of arc_easy twice"),
        ({"arc_easy/test.jsonl": ARC, "arc_easy/test.parquet": ARC}, ValueError, "are both the split test"),
    ],
)  # fmt: skip
def test_missing_and_ambiguous_files_are_named(tmp_path, files, error, message):
    for path, rows in files.items():
        write_rows(tmp_path / path, rows)
    with pytest.raises(error, match=message):
        use_local_data(task_manager(["arc_easy"]), ["arc_easy"], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"", "is empty"),
        (b"\n\n", "no rows"),
        (LINE + LINE[:40], r"is damaged in line 2 \(Unterminated string"),
        (b"\x00\xff\x17 garbage", "is damaged in line 1"),
        (LINE + b"3\n", "has no JSON object in line 2"),
        (LINE + b"[" * 100_000, "is damaged in line 2"),
        (LINE.decode().encode("utf-16"), "is UTF-16 and not UTF-8"),
        (LINE.replace(b"?", b"\xef"), r"is not UTF-8 \(invalid continuation byte at byte \d+\): convert it"),
    ],
)
def test_files_without_data_are_named(tmp_path, content, message, caplog):
    (tmp_path / "arc_easy_test.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"arc_easy_test\.jsonl.* {message}"):
        load_rows("arc_easy", tmp_path)
    assert not caplog.records  # the error is not printed twice


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    write_rows(tmp_path / "arc_easy_test.jsonl", ARC)
    expected = load_rows("arc_easy", tmp_path)
    content = (tmp_path / "arc_easy_test.jsonl").read_bytes()
    (tmp_path / "arc_easy_test.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    assert load_rows("arc_easy", tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("arc_easy_test.json", b'[{"question": "a"}, {"ques', r"json is damaged \("),
        ("arc_easy_test.json", b"[]", "no rows"),
        ("arc_easy_test.jsonl.gz", gzip.compress(LINE * 9)[:-12], "gz is damaged"),
        ("arc_easy_test.parquet", b"PAR1 and no more", r"parquet: cannot be read"),
    ],
)
def test_damaged_files_of_other_formats_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows("arc_easy", tmp_path)


@pytest.mark.parametrize(
    "entry", [*({"split": "test", "path": path} for path in ("/etc/*", 5, "", [3])), {"split": ["test"], "path": "*"}]
)
def test_a_wrong_path_in_the_header_of_a_data_set_names_the_file(tmp_path, entry):
    write_rows(tmp_path / "ai2_arc" / "ARC-Easy" / "test.jsonl", ARC)
    listed = [{"config_name": "ARC-Easy", "data_files": [entry]}]
    (tmp_path / "ai2_arc" / "README.md").write_text(f"---\nconfigs: {json.dumps(listed)}\n---\n")
    with pytest.raises(ValueError, match=r"ai2_arc/README\.md: the header has the entry .*'test'"):
        load_rows("arc_easy", tmp_path)


def test_a_header_with_other_bytes_than_utf8_and_wrong_dates_is_read_or_ignored(tmp_path):
    write_rows(tmp_path / "ai2_arc" / "ARC-Easy" / "test.jsonl", ARC)
    write_card(tmp_path / "ai2_arc", {"ARC-Easy": {"test": "ARC-Easy/test.jsonl"}})
    readme = tmp_path / "ai2_arc" / "README.md"
    for content in (readme.read_bytes() + b"caf\xe9\n", b"---\ndate: 2024-13-45\n---\n"):
        readme.write_bytes(content)
        assert load_rows("arc_easy", tmp_path) == ARC


def test_few_shot_examples_are_drawn_from_the_split_of_lm_eval_or_refused(tmp_path):
    write_rows(tmp_path / "arc_easy_test.jsonl", ARC)
    with pytest.raises(FileNotFoundError, match="draws few-shot examples from the split train"):
        use_local_data(task_manager(["arc_easy"]), ["arc_easy"], tmp_path, num_fewshot=2)


def test_rows_with_other_fields_are_named(tmp_path, checkpoints, monkeypatch):
    write_rows(tmp_path / "arc_easy_test.jsonl", [{"stem": "Which?", "choices": ["a", "b"], "answer": "a"}])
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl has no field 'question', only stem, choices, answer"):
        use_local_data(task_manager(["arc_easy"]), ["arc_easy"], tmp_path)
    monkeypatch.setattr("sinklm.eval.local_rows.FIELDS", {})  # of a task whose fields are not known
    with pytest.raises(ValueError, match=r"does not have the fields of the Hub's.*arc_easy_test\.jsonl"):
        evaluate(
            load_model(checkpoints[0]), load_tokenizer(checkpoints[0]), find_tasks(["arc_easy"], data_dir=tmp_path)
        )


PIQA = {"goal": "open a door", "sol1": "a key", "sol2": "a spoon", "label": 0}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("arc_easy", ARC[0] | {"question": None}, "null as question in row 1"),
        ("arc_easy", ARC[0] | {"choices": {"text": ["a", None, "c"], "label": ["A", "B", "C"]}}, "null as choices"),
        ("arc_easy", ARC[0] | {"answerKey": "Z"}, "answerKey 'Z' in row 1, which is not one of its choices"),
        ("arc_easy", ARC[0] | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "not one of its choices"),
        ("hellaswag", HELLASWAG[0] | {"endings": ["a", None]}, "null as endings"),
        ("hellaswag", HELLASWAG[0] | {"label": "4"}, "label '4' in row 1"),
        ("piqa", PIQA | {"sol2": None}, "null as sol2"),
        ("piqa", PIQA | {"label": 2}, "label 2 in row 1"),
        ("winogrande", WINOGRANDE | {"answer": "3"}, "answer '3' in row 1"),
    ],
)
def test_rows_that_lm_eval_would_score_without_their_content_are_named(tmp_path, task, row, message):
    split = "test" if task == "arc_easy" else "validation"
    good = {"arc_easy": ARC[0], "hellaswag": HELLASWAG[0], "piqa": PIQA, "winogrande": WINOGRANDE}[task]
    write_rows(tmp_path / f"{task}_{split}.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"{task}_{split}\.jsonl has .*{message}"):
        use_local_data(task_manager([task]), [task], tmp_path)


@pytest.mark.parametrize(("label", "message"), [(-1, "has no label in row 1"), (None, "has no field 'label'")])
def test_rows_without_labels_are_named(tmp_path, label, message):
    """lm-eval would count them as wrong. In PIQA's own download, labels are another file."""
    rows = [{"goal": "open a door", "sol1": "a key", "sol2": "a spoon", "label": value} for value in (0, label)]
    rows = [{key: value for key, value in row.items() if label is not None or key != "label"} for row in rows]
    write_rows(tmp_path / "piqa" / "valid.jsonl", rows)
    with pytest.raises(ValueError, match=rf"piqa/valid\.jsonl {message}"):
        use_local_data(task_manager(["piqa"]), ["piqa"], tmp_path)


@pytest.mark.parametrize(
    ("task", "label", "message"),
    [
        ("piqa", "1", "the label '1' in row 0, which is not one of its choices"),
        ("piqa", 2, "the label 2 in row 1"),  # labels from 1
        ("hellaswag", "4", "the label '4' in row 1"),
        ("winogrande", 1, "the answer 1 in row 0"),
        ("arc_easy", "E", "the answerKey 'E' in row 1"),
        ("openbookqa", 0, "the answerKey 0 in row 0"),
        ("piqa", 1, None),
        ("hellaswag", 3, None),
        ("openbookqa", " B", None),
    ],
)
def test_labels_that_lm_eval_would_score_as_wrong_are_named(tmp_path, task, label, message):
    (split, rows), field = next(iter(DATA[TASKS[task]].items())), FIELDS[TASKS[task][0]][-1]
    wrong = rows[-1] | {field: label}
    is_same_type = type(rows[-1][field]) is type(label)  # which a field has in all rows of a file
    write_rows(tmp_path / task / f"{split}.jsonl", [rows[-1], wrong] if is_same_type else [wrong])
    if message is None:
        use_local_data(task_manager([task]), [task], tmp_path)
    else:
        with pytest.raises(ValueError, match=message):
            use_local_data(task_manager([task]), [task], tmp_path)


def test_choices_without_labels_are_named(tmp_path):
    write_rows(tmp_path / "arc_easy_test.jsonl", [ARC[0] | {"choices": ["a stone", "a horse"]}])
    with pytest.raises(ValueError, match=r"arc_easy_test\.jsonl has the answerKey 'B' in row 0"):
        use_local_data(task_manager(["arc_easy"]), ["arc_easy"], tmp_path)


CUSTOM = {
    "own": "dataset_path: csv\ndataset_kwargs: {data_files: {test: own.csv}}\ntest_split: test\n",
    "shots": """\
dataset_path: allenai/ai2_arc
dataset_name: ARC-Easy
training_split: train
test_split: test
num_fewshot: 1
fewshot_config: {sampler: first_n, samples: [{question: Q, choices: {text: [a], label: [A]}, answerKey: A}]}
""",
}


@pytest.mark.parametrize(("task", "is_replaced"), [("stream_eval", False), ("own", False), ("shots", True)])
def test_only_what_comes_from_the_hub_is_replaced(tmp_path, task, is_replaced):
    if task in CUSTOM:
        (tmp_path / "own.yaml").write_text(f"task: {task}\n{CUSTOM[task]}doc_to_text: question\n")
    write_rows(tmp_path / "shots_test.jsonl", ARC)
    files = use_local_data(task_manager([task], tmp_path), [task], tmp_path)
    assert files == ({task: [tmp_path / "shots_test.jsonl"]} if is_replaced else {})


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="check --data-dir"):
        use_local_data(task_manager(["piqa"]), ["piqa"], Path("nowhere"))
