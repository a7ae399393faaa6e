"""`sinklm eval sinks`: its input sequences, and the command with its tables and pictures."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.folders import CheckpointState
from sinklm.cli.sinks import sinks
from sinklm.data import open_store
from sinklm.eval.sinks import measure, sequences_of_store, sequences_of_texts
from sinklm.eval.sinks.plots import checkpoints_figure, heads_figure, layers_figure, maps_figure
from sinklm.eval.sinks.tables import as_json, named_positions
from sinklm.models.config import num_prepended_sinks

from ..checkpoints.seal import seal
from ..train.tiny import make_store
from .checkpoints import small_model, write_checkpoint

# -- input sequences -------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i}. In the morning the sea was calm.\n" for i in range(60)))
    return path


def report_of(folder, book) -> dict:
    """The command's report on 4 sequences of 20 positions."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    num_sinks = num_prepended_sinks(model.config)
    sequences = sequences_of_texts([book], tokenizer, 4, 20 - num_sinks)
    statistics = measure(model, sequences.ids)
    return {"epsilon": 0.3, **as_json(statistics, named_positions(num_sinks, sequences.num_prefix))}


def test_sequences_lie_evenly_over_the_text(checkpoints, book, tmp_path):
    tokenizer = load_tokenizer(checkpoints[1])
    ids = torch.tensor(tokenizer(book.read_text())["input_ids"])
    sequences = sequences_of_texts([book], tokenizer, 5, 40)
    stride = len(ids) // 5
    assert torch.equal(sequences.ids, torch.stack([ids[i * stride : i * stride + 40] for i in range(5)]))
    assert sequences.num_prefix == 0
    with pytest.raises(ValueError, match=rf"book\.txt has {len(ids)} tokens, but 500 sequences of 40 are needed"):
        sequences_of_texts([book], tokenizer, 500, 40)
    with pytest.raises(ValueError, match="--seq-length leaves no room"):
        sequences_of_texts([book], tokenizer, 5, 1)


@pytest.mark.parametrize("num_sinks", [1, 2])
def test_an_export_has_the_sinks_of_its_checkpoint(checkpoints, tmp_path, book, num_sinks, monkeypatch):
    monkeypatch.setattr("sinklm.eval.sinks.plots.plot_sinks", lambda *args, **options: [])  # takes a second
    export = export_model(checkpoints[num_sinks], tmp_path / "export")
    ours, theirs = report_of(checkpoints[num_sinks], book), report_of(export, book)
    assert next(iter(ours["positions"])).startswith("sink token")
    sinks(str(export), [book], num_sequences=2, seq_length=8, output=tmp_path)
    assert json.loads((tmp_path / "sinks.json").read_text())["positions"] == ours["positions"]
    assert list(theirs["positions"].values()) == list(ours["positions"].values()) == [*range(num_sinks + 1), -1]
    for key in ("sink_rate", "mass"):
        assert ours["by_position"][key] == pytest.approx(theirs["by_position"][key], abs=1e-5)
    for name, values in ours["layers"].items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(theirs["layers"][name]), rtol=1e-3, atol=1e-4)


def test_a_store_is_read_in_its_held_out_split(tmp_path, checkpoints):
    folder = make_store(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    sequences = sequences_of_store(folder, tokenizer, 3, 20)
    stream = open_store(folder).split("validation")
    stride = len(stream) // 3
    assert sequences.ids.tolist() == [stream.read(i * stride, i * stride + 20).tolist() for i in range(3)]
    assert sequences.source["split"] == "validation"
    with pytest.raises(ValueError, match="made with a different tokenizer"):
        sequences_of_store(folder, load_tokenizer(checkpoints[1]), 3, 20)
    with pytest.raises(ValueError, match=r"the validation split of .*, but 999 sequences of 20 are needed"):
        sequences_of_store(folder, tokenizer, 999, 20)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run's folder with three complete checkpoints and an interrupted one."""
    for step in (0, 4, 8, 12):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
        torch.manual_seed(step)
        write_checkpoint(folder / "model", small_model(1))
        facts = {"data_fingerprint": "", "world_size": 1, "zero_stage": 1, "precision": "fp32"}
        (folder / "state.json").write_text(CheckpointState(step=step, positions=100 * step, **facts).to_json())
        if step < 12:
            seal(folder)
    return tmp_path / "run"


def test_the_command_writes_table_json_and_pictures(run, book, tmp_path, capsys):
    sinks(str(run), [book], num_sequences=4, seq_length=20, checkpoints=True, output=tmp_path / "results")

    report = json.loads((tmp_path / "results" / "sinks.json").read_text())
    assert report["positions"] == {"sink token": 0, "first text token": 1, "no token": -1}
    assert [(c["step"], c["tokens"]) for c in report["checkpoints"]] == [(0, 0), (4, 400), (8, 800)]
    newest = report["checkpoints"][-1]
    assert (newest["sink_rate"], newest["mass"]) == (report["sink_rate"], report["mass"])
    assert len({json.dumps(c["mass"]) for c in report["checkpoints"]}) == 3
    for name, k in report["positions"].items():
        heads = report["heads"][name]["mass"]
        assert torch.tensor(heads).mean() == pytest.approx(report["mass"][name], abs=1e-5)
        assert k == -1 or report["by_position"]["mass"][k] == pytest.approx(report["mass"][name], abs=1e-5)
    for name in ("heads", "maps", "layers", "checkpoints"):
        assert (tmp_path / "results" / f"sinks-{name}.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "sink token" in shown
    assert "no token" not in shown
    assert f"{100 * report['mass']['sink token']:.2f}" in shown
    sinks(str(run), [book], num_sequences=4, seq_length=20, output=tmp_path / "results")
    assert not (tmp_path / "results" / "sinks-checkpoints.png").exists()  # of the evaluation before


def test_the_pictures_show_the_report(checkpoints, book):
    report = report_of(checkpoints[1], book)
    history = [(0, 0.1), (1, 0.2), (2, 0.4)]
    report["checkpoints"] = [
        {"step": step, "tokens": 64 * step} | dict.fromkeys(("sink_rate", "mass"), dict.fromkeys(report["mass"], share))
        for step, share in history
    ]

    rates, masses, *_ = heads_figure(report, "title").axes
    assert rates.images[0].get_array().T.tolist() == report["heads"]["sink token"]["sink_rate"]
    assert masses.images[0].get_array().T.tolist() == report["heads"]["sink token"]["mass"]

    panels = maps_figure(report).axes[:-1]
    assert len(panels) == len(report["maps"]) == 4  # two layers: over heads, and the strongest
    assert all(panel.images[0].get_array().shape == (16, 16) for panel in panels)

    hidden, *_ = layers_figure(report).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in hidden.lines}
    assert list(lines) == ["other positions", "sink token", "first text token"]
    assert lines["sink token"] == [positions[0] for positions in report["layers"]["hidden_norm"]]

    rates, masses = checkpoints_figure(report).axes
    assert [line.get_label() for line in rates.lines] == ["sink token", "first text token"]
    assert list(masses.lines[0].get_xdata()) == [0, 1, 2]
    assert list(masses.lines[0].get_ydata()) == [10, 20, 40]
    assert rates.get_xlabel() == "Step (log scale; 64 tokens per step)"
    assert not any(line.get_clip_on() for line in rates.lines)


def test_checkpoints_close_to_each_other_have_ticks(checkpoints, book):
    report = report_of(checkpoints[1], book)
    shares = {key: dict.fromkeys(report["mass"], 0.0) for key in ("sink_rate", "mass")}
    report["checkpoints"] = [{"step": step, "tokens": 64 * step, **shares} for step in (100, 109, 200)]
    rates, _ = checkpoints_figure(report).axes
    low, high = rates.get_xlim()
    assert sum(low <= tick <= high for tick in rates.get_xticks()) > 2
    assert rates.get_xlabel() == "Step (64 tokens per step)"


def test_mistakes_are_named(run, book, tmp_path, checkpoints):
    model = str(checkpoints[1])
    with pytest.raises(ValueError, match="pass exactly one of --text and --store"):
        sinks(model)
    with pytest.raises(ValueError, match="pass exactly one of --text and --store"):
        sinks(model, [book], store=tmp_path)
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        sinks(model, [book], checkpoints=True)
    with pytest.raises(OSError, match=r"--text nobook\.txt cannot be read: No such file"):
        sinks(model, [Path("nobook.txt")])
    with pytest.raises(ValueError, match="--seq-length 129 is more than the model's 128 positions"):
        sinks(model, [book], num_sequences=1, seq_length=129, output=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        sinks(model, [book], num_sequences=1, seq_length=12, output=tmp_path / "file")
