"""The study of windows: its measurements, and the tables made from them."""

import json
from pathlib import Path

import pytest
import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.losses import streaming_losses
from sinklm.eval.perplexity import read_text_files
from sinklm.models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from sinklm.train.run import train

from .train.tiny import make_store

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EDGES = [0, 64, 128, 256, 511]
SIZES = [16, 32, 64, 128]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The folder of a script is on its path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def write_result(folder: Path, name: str, perplexities: list[float], attention: dict | None = None, **more) -> None:
    """A model of 128 positions, measured in caches of 16 to 128 tokens with 0 and 1 kept."""
    attention = {"pattern": "full", "window": None, "num_kept": None} | (attention or {})
    caches = {f"{n}+{size - n}": value + n for n in (0, 1) for size, value in zip(SIZES, perplexities, strict=True)}
    result = {
        "config": {"train": {"seq_length": 128}, "model": {"num_hidden_layers": 4, "attention": attention}},
        "data_fingerprint": "d",
        "tokens": 2_000_000,
        "is_finished": True,
        "tokens_per_second": 1000.0,
        "memory_gib": 1.5,
        "loss": [[1, 9.0], *([step, 1.5] for step in range(2, 12))],
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


def test_seeds_are_one_row_with_their_standard_error(models):
    from benchmarks.windows_report import caches, training

    found = rows_of(caches(models))
    assert list(found) == ["tokens in the cache", "---", "full", "drawn", "none"]
    assert found["tokens in the cache"] == ["16", "32", "64", "128"]
    assert found["full"] == ["41.00 ± 1.00", "31.00 ± 1.00", "25.00 ± 1.00", "21.00 ± 1.00"]
    assert found["drawn"] == ["30.00", "25.00", "22.00", "20.00"]
    assert found["none"] == ["20.00", "19.00", "21.00", "20.00"]  # without a kept token, as it was trained
    assert rows_of(training(models))["full"] == [
        "none",
        "2",
        "2",
        "1.5000 ± 0.0000",
        "2.0000 ± 0.1000",
        "1,000 ± 0",
        "1.5",
        "",
    ]


def test_a_cache_that_was_not_measured_with_every_seed_is_left_out(tmp_path):
    from benchmarks.windows_report import by_model, caches, collect, largest_binned

    write_result(tmp_path, "full", [40.0, 30.0, 24.0, 20.0])
    half = {"perplexity": {"0+16": 9.0, "1+15": 9.0}, "binned_losses": {"1+15": [5.0] * 4}}
    write_result(tmp_path, "full-seed-2", [40.0, 30.0, 24.0, 20.0], **half)
    models = by_model(collect(tmp_path))
    assert rows_of(caches(models))["full"] == ["25.00 ± 16.00"]
    assert largest_binned(models["full"]) == [[9.0] * 4, [5.0] * 4]


def test_an_unfinished_run_does_not_count_as_a_seed_or_as_the_reference(tmp_path):
    from benchmarks.windows_report import answer, by_model, caches, collect, doublings, picture, relative

    write_result(tmp_path, "drawn", [40.0, 30.0, 24.0, 20.0])
    write_result(tmp_path, "drawn-seed-2", [4.0, 3.0, 2.0, 1.0], is_finished=False)
    write_result(tmp_path, "full", [4.0, 3.0, 2.0, 1.0], is_finished=False)
    models = by_model(collect(tmp_path))
    assert rows_of(caches(models))["drawn"] == ["41.00", "31.00", "25.00", "21.00"]
    assert "full (unfinished)" in models
    assert answer(models) == relative(models) == ""
    assert rows_of(doublings(models))[""] == ["tokens in the cache", "each larger one is better", "best"]
    assert len(picture(models).axes) == 1


def test_the_answer_is_the_size_with_the_same_perplexity(models):
    from benchmarks.windows_report import answer

    found = rows_of(answer(models))
    assert found["same perplexity as full with"] == ["16", "32", "64", "128"]
    assert found["drawn"] == ["≤ 16", "≤ 16", "32 (0.50 ×)", "91 (0.71 ×)"]  # 21 is half way from 22 to 20
    assert found["none"] == ["≤ 16"] * 4
    assert "full" not in found


def test_a_larger_cache_helps_if_it_is_better_than_all_smaller_ones(models):
    from benchmarks.windows_report import doublings

    found = rows_of(doublings(models))
    assert found["full"] == ["16 to 128", "yes", "128", "+0.00 %"]
    assert found["drawn"] == ["16 to 128", "yes", "128", "−4.76 %"]
    rises = "no: 64 (+10.53 % from 32), 128 (+5.26 % from 32)"  # also 128, though it is better than 64
    assert found["none"] == ["16 to 128", rises, "32", "−9.52 %"]


def test_caches_beyond_the_windows_of_all_layers_are_named_and_count_once(tmp_path):
    from benchmarks.windows_report import answer, by_model, caches, collect, doublings, kept, training

    write_result(tmp_path, "full", [9.0, 8.0, 7.0, 6.0])
    write_result(tmp_path, "drawn", [8.0, 7.0, 6.5, 6.5], {"pattern": "window", "window": [8, 63]})
    write_result(tmp_path, "fixed", [8.0, 7.0, 7.0, 7.0], {"pattern": "window", "window": 31})
    write_result(tmp_path, "hybrid", [8.0, 7.0, 6.5, 6.0], {"pattern": "3:1", "window": 31})
    models = by_model(collect(tmp_path))
    found = rows_of(caches(models))
    assert found["drawn"] == ["9.00", "8.00", "7.50", "7.50 (1+63)"]
    assert found["fixed"] == ["9.00", "8.00", "8.00 (1+31)", "8.00 (1+31)"]
    assert found["hybrid"] == ["9.00", "8.00", "7.50", "7.00"]
    assert "In brackets" in caches(models)
    windows = {name: cells[0] for name, cells in rows_of(training(models)).items() if name in models}
    assert windows == {"drawn": "drawn from 8 to 63", "fixed": "31", "full": "none", "hybrid": "31 in 3 of 4 layers"}
    assert rows_of(kept(models))["drawn"][-2:] == ["6.50 (0+63)", "7.50 (1+63)"]
    found = rows_of(doublings(models))
    assert [found[name][0] for name in ("drawn", "fixed", "hybrid")] == ["16 to 64", "16 to 32", "16 to 128"]
    assert found["fixed"][1] == "yes"
    assert rows_of(answer(models))["fixed"] == ["≤ 16", "≤ 16", "32 (0.50 ×)", "none"]


def test_a_rise_is_shown_by_text_and_by_position(tmp_path):
    from benchmarks.windows_report import by_model, collect, relative, worse

    binned = {"1+15": [1.0, 2.0, 3.0, 4.0], "1+31": [1.0, 2.0, 3.0, 4.02]}
    texts = {"1+15": [3.0, 4.0, 5.0], "1+31": [3.0, 4.01, 5.02]}
    write_result(tmp_path, "full", [9.0, 9.5, 8.0, 7.0], binned_losses=binned, text_losses=texts)
    write_result(tmp_path, "old", [9.0, 9.5, 8.0, 7.0], binned_losses=binned)
    found = rows_of(worse(by_model(collect(tmp_path))))
    by_position = ["to 64", "to 128", "to 256", "to 512"]
    assert found[""] == ["change", "standard error over texts", "texts that are worse", *by_position]
    changes = ["+0.00 %", "+0.00 %", "+0.00 %", "+2.02 %"]
    assert found["full, 16 to 32"] == ["+5.00 %", "0.58 %", "2 of 3", *changes]
    assert found["old, 16 to 32"] == ["+5.00 %", "", "", *changes]
    assert rows_of(relative(by_model(collect(tmp_path))))["old"] == ["+0.00 %"] * 4


def test_without_a_rise_the_page_says_so(tmp_path, models):
    from benchmarks.windows_report import worse

    assert worse({"full": models["full"]}) == "Every larger cache is better than all smaller ones."
    assert worse({}) == ""


def test_positions_are_means_over_octaves_of_the_trained_length(models):
    from benchmarks.windows_report import positions

    found = rows_of(positions(models))
    assert found["tokens of the text"] == ["to 64", "to 128", "to 256", "to 512"]
    assert found["drawn"] == ["54.60", "20.09", "7.39", "2.72"]


def test_pieces_are_shown_by_position_and_compared_with_the_stream(tmp_path):
    from benchmarks.windows_report import by_model, collect, pieces, training

    part = {"loss": 2.0, "streamed": 2.25, "bin_edges": EDGES[:4], "binned_losses": [4.0, 3.0, 2.0]}
    write_result(tmp_path, "full", [9.0, 8.0, 7.0, 6.0], pieces=part)
    write_result(tmp_path, "old", [9.0, 8.0, 7.0, 6.0])
    models = by_model(collect(tmp_path))
    found = rows_of(pieces(models))
    assert found["tokens of a piece"] == ["to 64", "to 128", "to 256"]
    assert found["full"] == ["54.60", "20.09", "7.39"]
    assert "old" not in found
    assert [rows_of(training(models))[name][-1] for name in ("full", "old")] == ["+0.2500", ""]


def test_a_model_without_a_sink_token_has_no_rate_for_one(tmp_path):
    from benchmarks.windows_report import by_model, collect, sinks

    rates = {"sink_rate": {"first text token": 0.25, "no token": 0.0}}
    write_result(tmp_path, "none", [9.0, 8.0, 7.0, 6.0], num_sinks=0, sinks=rates)
    write_result(tmp_path, "token", [9.0, 8.0, 7.0, 6.0])
    found = rows_of(sinks(by_model(collect(tmp_path))))
    assert found["none"] == ["", "25.0", "0.0"]
    assert found["token"] == ["50.0", "25.0", "0.0"]


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
    assert page.startswith("before\n<!-- caches -->\n| tokens in the cache | 16 |")
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
    (call.run.parents[1] / "results" / "full.json").write_text(
        json.dumps({key: value for key, value in more.items() if key not in ("text_losses", "pieces")})
    )
    again = call(*call.texts, "--kept", "1")  # results of an older version
    assert again["text_losses"].keys() == {"1+7", "1+15"}
    assert again["perplexity"]["1+7"] == found["perplexity"]["1+7"]
    assert again["pieces"] == more["pieces"]


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
    assert found["text_losses"]["1+15"] == pytest.approx(losses.mean(1).tolist(), abs=1e-5)
    assert set(found["sinks"]["sink_rate"]) == {"sink token 1", "first text token", "no token"}


def test_pieces_have_the_losses_of_a_cache_that_holds_them(call):
    found = call(*call.store, *call.texts, "--kept", "1")["pieces"]
    (checkpoint,) = (call.run / "checkpoints").glob("step-2")
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    assert (found["num_pieces"], found["length"]) == (6, 31)  # 100 tokens of two texts; with the sink token, 32
    texts = [read_text_files([Path(path)], tokenizer, 100) for path in call.texts[1:]]
    pieces = [text.ids[start : start + 31] for text in texts for start in (0, 31, 62)]
    losses = torch.stack([streaming_losses(model, piece, 1, 30)[1:] for piece in pieces])
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["streamed"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["bin_edges"] == [0, 30]
    assert found["binned_losses"] == pytest.approx([found["loss"]])


@pytest.mark.parametrize("pattern", [[7, 7], [7, None]])
def test_pieces_are_streamed_as_windowed_layers_are_trained(pattern):
    from benchmarks.windows_study import of_pieces

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sink = {"kind": "token", "first_token_id": 60}
    torch.manual_seed(0)
    config = SinkGPTNeoXConfig(
        **sizes, intermediate_size=64, max_position_embeddings=32, sink=sink, layer_windows=pattern
    )
    model = SinkGPTNeoXForCausalLM(config).eval()
    found = of_pieces(model, torch.randint(60, (2, 70)), chunk=16)
    assert (found["num_pieces"], found["length"]) == (4, 31)
    assert found["streamed"] == pytest.approx(found["loss"], rel=1e-5)
