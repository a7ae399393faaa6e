"""The study of windows: its measurements, and the tables made from them."""

import json
from pathlib import Path

import pytest
import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.losses import streaming_losses
from sinklm.eval.perplexity import read_text_files
from sinklm.train.run import train

from .train.tiny import make_store

EDGES = [0, 64, 128, 256, 511]
SIZES = [16, 32, 64, 128]


def write_result(folder: Path, name: str, perplexities: list[float], num_kept: int | None = None, **more) -> None:
    """A model of 128 positions, measured in caches of 16 to 128 tokens with 0 and 1 kept."""
    caches = {f"{n}+{size - n}": value + n for n in (0, 1) for size, value in zip(SIZES, perplexities, strict=True)}
    result = {
        "config": {"train": {"seq_length": 128}, "model": {"attention": {"num_kept": num_kept}}},
        "data_fingerprint": "d",
        "tokens": 2_000_000,
        "is_finished": True,
        "tokens_per_second": 1000.0,
        "memory_gib": 1.5,
        "validation_loss": [[1, 3.0], [2, perplexities[-1] / 10]],
        "num_sinks": 1,
        "text": {"bin_edges": EDGES},
        "perplexity": caches,
        "binned_losses": {"1+15": [9.0] * 4, "1+127": [4.0, 3.0, 2.0, 1.0]},
        "sinks": {"sink_rate": {"sink token 1": 0.5, "first text token": 0.25, "no token": 0.0}},
    }
    path = folder / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | more))


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def models(tmp_path):
    from benchmarks.windows_report import by_model, collect

    write_result(tmp_path, "drawn", [29.0, 24.0, 21.0, 19.0])
    write_result(tmp_path, "full", [39.0, 29.0, 23.0, 19.0])
    write_result(tmp_path, "full-seed-2", [41.0, 31.0, 25.0, 21.0])
    write_result(tmp_path, "none", [20.0, 19.0, 21.0, 20.0], num_sinks=0)
    return by_model(collect(tmp_path))


def test_seeds_are_one_row_with_their_deviation(models):
    from benchmarks.windows_report import caches, training

    found = rows_of(caches(models))
    assert list(found) == ["", "---", "full", "drawn", "none"]
    assert found[""] == ["16", "32", "64", "128"]
    assert found["full"] == ["41.00 ± 1.41", "31.00 ± 1.41", "25.00 ± 1.41", "21.00 ± 1.41"]
    assert found["drawn"] == ["30.00", "25.00", "22.00", "20.00"]
    assert found["none"] == ["20.00", "19.00", "21.00", "20.00"]  # without a kept token, as it was trained
    assert rows_of(training(models))["full"] == ["2", "2.0000 ± 0.1414", "1,000 ± 0", "1.5"]


def test_a_cache_that_was_not_measured_with_every_seed_is_left_out(tmp_path):
    from benchmarks.windows_report import by_model, caches, collect, largest_binned

    write_result(tmp_path, "full", [40.0, 30.0, 24.0, 20.0])
    half = {"perplexity": {"0+16": 9.0, "1+15": 9.0}, "binned_losses": {"1+15": [5.0] * 4}}
    write_result(tmp_path, "full-seed-2", [40.0, 30.0, 24.0, 20.0], **half)
    models = by_model(collect(tmp_path))
    assert rows_of(caches(models))["full"] == ["25.00 ± 22.63"]
    assert largest_binned(models["full"]) == (EDGES, [7.0] * 4)


def test_the_answer_is_the_size_with_the_same_perplexity_and_the_caches_that_do_not_help(models):
    from benchmarks.windows_report import answer

    found = rows_of(answer(models))
    same = [f"same perplexity as full with {size}" for size in (16, 128)]
    assert found[""] == ["128 against full", *same, "larger caches that do not help"]
    assert found["full"] == ["+0.00 %", "≤ 16", "128", "none"]
    assert found["drawn"] == ["−4.76 %", "≤ 16", "91", "none"]  # 21 is half way from 22 to 20
    assert found["none"] == ["−4.76 %", "≤ 16", "≤ 16", "64"]


def test_positions_are_means_over_octaves_of_the_trained_length(models):
    from benchmarks.windows_report import positions

    found = rows_of(positions(models))
    assert found[""] == ["to 64", "to 128", "to 256", "to 512"]
    assert found["drawn"] == ["54.60", "20.09", "7.39", "2.72"]


def test_results_on_other_data_or_texts_are_not_compared(tmp_path):
    from benchmarks.windows_report import collect

    write_result(tmp_path, "full", [4.0, 3.0, 2.0, 1.0])
    write_result(tmp_path, "other", [4.0, 3.0, 2.0, 1.0], data_fingerprint="e")
    with pytest.raises(ValueError, match="other and full have another data_fingerprint"):
        collect(tmp_path)
    write_result(tmp_path, "other", [4.0, 3.0, 2.0, 1.0], text={"bin_edges": [0, 2]})
    with pytest.raises(ValueError, match="other and full have another text"):
        collect(tmp_path)


def test_tables_replace_those_between_their_marks(tmp_path, models, monkeypatch):
    from benchmarks import windows_report

    (tmp_path / "windows.md").write_text("before\n<!-- caches -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["windows_report.py", str(tmp_path), "--output", str(tmp_path)])
    windows_report.main()
    page = (tmp_path / "windows.md").read_text()
    assert page.startswith("before\n<!-- caches -->\n|  | 16 |")
    assert page.endswith("<!-- end -->\nafter\n")
    assert "old" not in page
    assert (tmp_path / "windows.png").stat().st_size > 10_000
    (tmp_path / "results" / "full.json").unlink()
    monkeypatch.setattr("sys.argv", ["windows_report.py", "--output", str(tmp_path)])
    windows_report.main()  # from windows.json alone
    assert (tmp_path / "windows.md").read_text() == page


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the study of a tiny model in this process."""
    from benchmarks import windows_study

    store = make_store(tmp_path / "store")
    words = json.loads((store.parent / "corpus.jsonl").read_text().splitlines()[0])["text"]
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for number, path in enumerate(texts):
        path.write_text(" ".join([*words.split()[number:], *words.split()]) * 3)
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2"]
    sizes += ["train.seq_length=32", "train.batch_size_tokens=128", "train.micro_batch_size=4", "train.precision=fp32"]
    sizes += ["train.num_steps=2", "validation.num_samples=2"]

    def train_here(name: str, run: Path, arguments) -> None:
        train(f"windows/{name}", [*sizes, f"data.path={arguments.store}", f"train.run_dir={run}"])

    def call(*options: str) -> dict:
        fixed = ["full", "--folder", str(tmp_path), "--length", "100", "--sizes", "8,16", "--chunk", "32"]
        monkeypatch.setattr("sys.argv", ["windows_study.py", *fixed, *options])
        with pytest.raises(SystemExit) as ended:
            windows_study.main()
        assert not ended.value.code
        return json.loads((tmp_path / "results" / "full.json").read_text())

    monkeypatch.setattr(windows_study, "train", train_here)
    call.store, call.texts, call.run = ["--store", str(store)], ["--text", *map(str, texts)], tmp_path / "runs" / "full"
    return call


def test_results_are_added_to_those_that_are_there(call):
    trained = call(*call.store)
    assert (trained["tokens"], trained["is_finished"], len(trained["loss"])) == (256, True, 2)
    assert "perplexity" not in trained
    found = call(*call.texts, "--kept", "1")
    assert found["perplexity"].keys() == {"1+7", "1+15"}
    (call.run.parents[1] / "results" / "full.json").write_text(json.dumps(found | {"perplexity": {"1+7": 5.0}}))
    more = call(*call.texts, "--kept", "0,1")
    assert more["perplexity"].keys() == {"0+8", "1+7", "0+16", "1+15"}
    assert more["perplexity"]["1+7"] == 5.0
    assert more["perplexity"]["1+15"] == found["perplexity"]["1+15"]


def test_octaves_begin_at_edges():
    from benchmarks.windows_study import position_edges

    edges = position_edges(65_535)
    assert edges[:6] == [0, 64, 76, 91, 108, 128]
    assert {2**n for n in range(6, 16)} <= set(edges)
    assert edges == sorted(edges)
    assert edges[-1] == 65_535
    assert position_edges(30) == [0, 30]


def test_perplexity_is_that_of_each_text_alone(call):
    found = call(*call.store, *call.texts, "--kept", "1")
    (checkpoint,) = (call.run / "checkpoints").glob("step-2")
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    texts = [read_text_files([Path(path)], tokenizer, 100) for path in call.texts[1:]]
    losses = torch.stack([streaming_losses(model, text.ids, 1, 15)[1:] for text in texts])
    assert found["perplexity"]["1+15"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    edges, means = found["text"]["bin_edges"], found["binned_losses"]["1+15"]
    assert sum((b - a) * mean for a, b, mean in zip(edges, edges[1:], means, strict=False)) == pytest.approx(
        losses.mean(0).sum().item(), rel=1e-5
    )
    assert set(found["sinks"]["sink_rate"]) == {"sink token 1", "first text token", "no token"}
