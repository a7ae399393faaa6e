"""``sinklm data inspect``; ``merge`` is tested in tests/data/test_merge.py."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.data import TokenStore, find_inputs, prepare_store
from sinklm.data.tokenizer import load_tokenizer_file
from sinklm.train.batches import open_windows, sample_order
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train

from ..data.corpora import records, stored_documents, write_json_lines
from ..data.processes import InProcessPool
from ..data.test_megatron_order import build_arrays
from ..data.test_megatron_order import write as write_order
from ..eval.checkpoints import small_tokenizer
from ..train.tiny import RECIPE, bad_loss_in, metrics

SIZES = ["train.seq_length=32", "train.batch_size_tokens=128", "train.micro_batch_size=1"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    inputs = [str(write_json_lines(tmp_path / f"{seed}.jsonl", records(seed, 30))) for seed in (1, 2)]
    shards = find_inputs(inputs).shards
    prepare_store(shards, tmp_path / "store", tokenizer=tmp_path, validation_fraction=0.3, split_sets=True)
    return tmp_path / "store"


def inspect(store: Path, *arguments: object) -> str:
    command = ["data", "inspect", str(store), *map(str, arguments)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_summary_has_counts_sources_and_fingerprint(store: Path) -> None:
    opened, said = TokenStore(store), inspect(store, "--verify")
    for name, counts in opened.manifest.splits["validation"].sets.items():
        assert f" {name} " in said
        assert f" {counts.documents}" in said
    assert "sources: 2\n" in said
    assert f"tokenizer: {opened.tokenizer_size} ids, documents end with id 0\n" in said
    assert f"fingerprint {opened.fingerprint}\n" in said
    assert said.endswith("all checksums are right\n")


def test_any_document_is_printed(store: Path) -> None:
    opened, tokenizer = TokenStore(store), load_tokenizer_file(store)
    for split in ("train", "validation"):
        documents = stored_documents(store, opened.manifest, split)
        for i, ids in enumerate(documents):
            assert opened.document(split, i).tolist() == ids
        last = len(documents) - 1
        said = inspect(store, "--document", last, "--split", split)
        assert said.startswith(f"document {last} of the {split} split, {len(documents[last])} tokens:\n")
        assert tokenizer.decode(documents[last], skip_special_tokens=False) in said
        with pytest.raises(ValueError, match=rf"the {split} split has {last + 1} documents, numbered from 0"):
            inspect(store, "--document", last + 1, "--split", split)


def test_samples_and_steps_are_those_of_training(store: Path) -> None:
    tokenizer = load_tokenizer_file(store)
    for weights in ((), ("data.weights={A: 1, B: 3}",)):
        plan = Plan(load_config("quickstart", [*SIZES, *weights]), 1, TokenStore(store).tokenizer_size)
        windows, _ = open_windows(TokenStore(store), plan)
        numbers = sample_order(TokenStore(store), windows, plan)(np.arange(12, 16))
        said = inspect(store, "--recipe", "quickstart", "--step", 4, *SIZES, *weights, "validation.by_set=true")
        assert said.startswith("step 4: positions 12 to 15 of the data order\n")
        for line, position, number in zip(said.splitlines()[2:], range(12, 16), numbers, strict=True):
            name = f"[{windows.place_of(number)[0]}] " if weights else ""
            text = tokenizer.decode(windows[number].tolist(), skip_special_tokens=False)
            assert line == f"{position}  {number}  {name}{text[:60]!r}"
        path = f"data.path={store}"  # of the command that trains
        said = inspect(store, "--recipe", "quickstart", "--sample", int(numbers[0]), path, *SIZES, *weights)
        assert tokenizer.decode(windows[numbers[0]].tolist(), skip_special_tokens=False) in said
        with pytest.raises(ValueError, match=rf"--sample {len(windows)}: there are {len(windows)} samples"):
            inspect(store, "--recipe", "quickstart", "--sample", len(windows), *SIZES, *weights)


def test_a_store_may_have_any_name(store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2024", "{a}", "a: b"):
        Path(name).symlink_to(store)
        assert "sample 0 of" in inspect(Path(name), "--recipe", "quickstart", "--sample", 0, *SIZES)


@pytest.mark.parametrize("weights", [(), ("data.weights={A: 1, B: 3}",)])
def test_a_step_has_the_number_and_samples_of_the_runs_metrics(store: Path, tmp_path: Path, weights) -> None:
    (tmp_path / "tiny.yaml").write_text(f"{RECIPE}\ndata: {{path: {store}}}\n")
    settings = [f"train.run_dir={tmp_path / 'run'}", "validation.every_steps=null", *weights]
    with bad_loss_in(2, num_micro_batches=2), pytest.raises(ValueError, match="loss is nan"):
        train(str(tmp_path / "tiny.yaml"), settings)
    record = metrics(tmp_path / "run")[-1]
    assert record["step"] == 2
    for recipe in (tmp_path / "run/config.yaml", tmp_path / "run"):
        said = inspect(store, "--recipe", recipe, "--step", 2)
        assert [int(line.split()[1]) for line in said.splitlines()[2:]] == record["samples"]


def test_a_step_after_the_last_one_is_an_error(store: Path) -> None:
    with pytest.raises(ValueError, match=r"--step 5: training ends at step 4; add train\.num_steps=5"):
        inspect(store, "--recipe", "quickstart", "--step", 5, *SIZES, "train.num_steps=4")
    assert inspect(store, "--recipe", "quickstart", "--step", 5, *SIZES, "train.num_steps=5").startswith("step 5: ")


def test_a_folder_with_the_name_of_a_recipe_does_not_replace_it(store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "config.yaml").write_text("no: recipe")
    assert inspect(store, "--recipe", "quickstart", "--step", 1, *SIZES).startswith("step 1: ")


def test_there_is_no_step_0(store: Path) -> None:
    command = ["data", "inspect", str(store), "--recipe", "quickstart", "--step", "0"]
    assert CliRunner().invoke(app, command).exit_code == 2


def test_a_split_that_does_not_exist_is_an_error(store: Path) -> None:
    with pytest.raises(ValueError, match=r"has no split 'test', only train, validation"):
        inspect(store, "--split", "test", "--document", 0)


@pytest.mark.parametrize("kind", ["rows", "order"])
def test_what_has_no_checksums_is_not_called_right(kind: str, tmp_path: Path) -> None:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    if kind == "order":
        arrays = build_arrays(np.full(10, 20), 16, 1, 0)
        folder = write_order(tmp_path / "order", tmp_path / "tokenizer.json", [np.zeros(20, np.uint16)] * 10, arrays)
    else:
        folder = tmp_path
        np.zeros(2 * 2049, np.uint16).tofile(folder / "x.bin")
    said = inspect(folder, "--verify")
    assert said.endswith(f"{folder}: has no checksums, so nothing was verified\n")
    assert "right" not in said


def test_samples_without_a_recipe_are_an_error(store: Path) -> None:
    with pytest.raises(ValueError, match="samples and steps depend on the recipe: pass --recipe"):
        inspect(store, "--step", 3)
