"""`sinklm bench decode` on a small model."""

import json
import time
from functools import partial

import pytest
import torch

from sinklm.cli.bench import _random_model, decode
from sinklm.eval.decode_speed import CroppedCache, bytes_read, measure_decoding, results_table, step_times
from sinklm.eval.plots import decoding_figure
from sinklm.streaming.testing import random_model

from ..eval.checkpoints import small_model, write_checkpoint
from ..streaming import small_families, tiny


def test_the_command_writes_table_json_and_picture(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "model", small_model(1))
    decode(str(checkpoint), caches="1+15,1+31", batch_sizes="1,2", num_steps=3, output=tmp_path)

    report = json.loads((tmp_path / "decode.json").read_text())
    rows = [(row["batch_size"], row["cache_size"], row["method"]) for row in report["results"]]
    methods = ("streaming", "cropped cache", "re-computation", "floor")
    assert rows == [(b, c, method) for b in (1, 2) for c in (16, 32) for method in methods]
    assert all(row["milliseconds"] > 0 and row["num_kept"] == 1 for row in report["results"])
    floors = {
        (r["batch_size"], r["cache_size"]): r["milliseconds"] for r in report["results"] if r["method"] == "floor"
    }
    assert floors[1, 16] < floors[1, 32] < floors[2, 32]
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "re-computation" in capsys.readouterr().out

    (axes,) = decoding_figure(report).axes  # no memory is measured on a CPU
    assert len(axes.lines) == len(methods) * 2
    for row in report["results"]:
        row["peak_bytes"] = None if row["method"] == "floor" else 10**9
    _, memory = decoding_figure(report).axes
    assert len(memory.lines) == (len(methods) - 1) * 2
    assert len(memory.get_legend().get_texts()) == len(methods) * 2


def test_the_floor_includes_an_embedding_that_is_also_the_head():
    apart, tied = (tiny.build(tiny.config("llama", tie_word_embeddings=tie)) for tie in (False, True))
    assert bytes_read(apart) == bytes_read(tied) == sum(p.nbytes for p in tied.parameters())


def test_the_table_has_the_speedup_over_re_computation():
    times = {"streaming": 2.0, "cropped cache": 3.0, "re-computation": 30.0, "floor": 1.0}
    results = [
        {"method": m, "milliseconds": t, "stdev": None if m == "floor" else t / 10, "is_eager": m.startswith("re-")}
        | {"num_kept": 4, "window": 60, "batch_size": 1}
        for m, t in times.items()
    ]
    table = results_table(results, "")
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["4+60", "1", "2.00 ± 0.20", "3.00 ± 0.30", "30.00 ± 3.00", "1.00", "15.0×"]
    assert table.caption.endswith("eager: re-computation")


def test_each_step_has_its_time_and_re_computation_has_a_fifth_of_the_steps():
    model = small_model(1)
    rows = {row["method"]: row for row in measure_decoding(model, 1, 15, 1, num_steps=20, bandwidth=1e9)}
    assert {method: row["num_steps"] for method, row in rows.items()} == {
        "streaming": 20, "cropped cache": 20, "re-computation": 4, "floor": None
    }  # fmt: skip
    assert all(row["stdev"] > 0 and row["is_eager"] for method, row in rows.items() if method != "floor")
    times = step_times(partial(time.sleep, 0.002), 0, 5)
    assert len(times) == 5
    assert min(times) >= 2


@pytest.mark.parametrize("num_sinks", [0, 1])
def test_the_cropped_cache_keeps_its_size(num_sinks):
    model = small_model(num_sinks)
    with torch.no_grad():
        cropped = CroppedCache(model, torch.randint(1, 300, (2, 12)), num_kept=4)
        first = cropped.cache.layers[0].keys.clone()
        for _ in range(5):
            cropped.step(torch.ones(2, 1, dtype=torch.long))
    keys = cropped.cache.layers[0].keys
    assert keys.shape == first.shape
    assert torch.equal(keys[:, :, :4], first[:, :, :4])
    assert torch.equal(keys[:, :, 4:-5], first[:, :, 9:])


def test_layers_that_use_the_keys_of_another_layer_are_measured():
    model = random_model(small_families.config("gemma3n_text"))
    rows = measure_decoding(model, 1, 6, 1, num_steps=2, bandwidth=1e9)
    assert {row["method"] for row in rows} == {"streaming", "cropped cache", "re-computation", "floor"}


def test_a_recipe_is_measured_with_its_sink():
    gate, token = (_random_model(recipe) for recipe in ("arms/gate", "pythia-14m"))
    assert gate.config.sink_kind == "gate"
    assert token.config.num_sinks == 1


def test_counts_are_checked(tmp_path):
    checkpoint = str(write_checkpoint(tmp_path / "model", small_model(0)))
    with pytest.raises(ValueError, match="--caches: 'x' is not a cache"):
        decode(checkpoint, caches="x", output=tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        decode(checkpoint, batch_sizes="0", output=tmp_path)
