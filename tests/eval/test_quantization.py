"""`sinklm eval quantization`, compared with models whose numbers are rounded one by one."""

import copy
import csv
import json
import math
from importlib import metadata
from statistics import mean, stdev

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from sinklm.checkpoints.export import export_model
from sinklm.cli import quantization as command
from sinklm.cli.main import app
from sinklm.models.arms import ARMS
from sinklm.models.cache_argument import CACHE
from sinklm.streaming.quantized import KV_DTYPES, NUM_RECENT

from .checkpoints import small_model, write_checkpoint

kernel = pytest.importorskip("torchao.kernel", reason="install the extra quantization")

from sinklm.eval import quantization  # noqa: E402
from sinklm.eval.quantization import quantized, quantized_layers  # noqa: E402
from sinklm.eval.quantization_formats import FORMATS  # noqa: E402
from sinklm.eval.quantization_losses import (  # noqa: E402
    activations,
    cached_losses,
    check_kv,
    measure_increase,
    sample_losses,
)
from sinklm.eval.quantization_output import quantization_figure, results_table  # noqa: E402
from sinklm.eval.sinks import Sequences  # noqa: E402

NUM_TOKENS = 40
KINDS = ("none", "token", *ARMS)


def model_of(kind: str, **overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, **overrides}
    return small_model(1, **sizes) if kind == "token" else small_model(0, sink={"kind": kind}, **sizes)


@pytest.fixture(scope="module")
def samples() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    return Sequences(torch.randint(1, 400, (3, NUM_TOKENS), generator=generator), 0, {})


# -- a slow twin: explicit rounding, products in float64 -------------------------------------------


def symmetric(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Round to 8 bits with one scale over ``dims``; scales are float32, as in torchao."""
    scale = x.float().abs().amax(dims, keepdim=True) / 127.5
    return ((x.float() * (1 / scale)).round().clamp(-128, 127) * scale).to(x.dtype)


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    rounded = weight.clone()
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 32):
            group = weight[row, start : start + 32].float()
            low, high = group.min().clamp(max=0), group.max().clamp(min=0)
            scale = (high - low) / 15
            zero = (-8 - (low / scale).round()).clamp(-8, 7)
            codes = ((group * (1 / scale)).round() + zero).clamp(-8, 7)
            rounded[row, start : start + 32] = (codes - zero) * scale
    return rounded


def slow_twin(model, name: str):
    twin = copy.deepcopy(model).double()
    for path, layer in twin.named_modules():
        if not isinstance(layer, nn.Linear) or "lm_head" in path:
            continue
        with torch.no_grad():
            layer.weight.copy_(four_bits(layer.weight) if name == "w4" else symmetric(layer.weight, (1,)))
        if "a8" in name:
            dims = (0, 1, 2) if "tensor" in name else (2,)
            layer.register_forward_pre_hook(lambda module, inputs, dims=dims: (symmetric(inputs[0], dims),))
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["w8", "w4"])
def test_losses_are_those_of_weights_rounded_one_by_one(kind, name, samples):
    model = model_of(kind)
    found, expected = (sample_losses(twin, samples) for twin in (quantized(model, name), slow_twin(model, name)))
    assert (expected - sample_losses(model, samples)).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["w8a8-token", "w8a8-tensor"])
@torch.inference_mode()
def test_each_layer_multiplies_numbers_rounded_one_by_one(kind, name, samples):
    """Compared layer by layer: the largest input is halfway between two codes.

    So its rounding depends on the last bit of what the layers before it computed.
    """
    model = model_of(kind)
    twin, slow = quantized(model, name), dict(slow_twin(model, name).named_modules())
    seen = {}
    for path, layer in quantized_layers(twin).items():
        layer.register_forward_hook(lambda layer, inputs, output, path=path: seen.update({path: (inputs[0], output)}))
    found = sample_losses(twin, samples)
    assert set(seen) == set(quantized_layers(model))
    for path, (states, output) in seen.items():
        assert states.shape[:2] == (1, NUM_TOKENS + model.config.num_sinks)  # sinks are quantized too
        expected = slow[path](states.double())
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
        plain = model.get_submodule(path)(states)
        assert (output - plain).norm() > 1e-3 * plain.norm()
    assert (found - sample_losses(model, samples)).abs().max() > 1e-4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["w8", "w4", "w8a8-token", "w8a8-tensor"])
@torch.inference_mode()
def test_each_layer_multiplies_rounded_numbers_on_any_device(name, device, samples):
    """Numbers halfway between two codes, as the largest are, may get the other one on a GPU."""
    model = model_of("token").to(device)
    twin, slow = quantized(model, name), dict(slow_twin(model, name).named_modules())
    seen = {}
    for path, layer in quantized_layers(twin).items():
        layer.register_forward_hook(lambda layer, inputs, output, path=path: seen.update({path: (inputs[0], output)}))
    sample_losses(twin, samples)
    assert set(seen) == set(quantized_layers(model))
    assert quantization.has_exact_products(model.device)
    for path, (states, output) in seen.items():
        plain, layer = model.get_submodule(path).weight.double(), twin.get_submodule(path)
        weight, bias = layer.weight.dequantize().double(), layer.bias.double()
        assert (weight - slow[path].weight).norm() < 0.6 * (slow[path].weight - plain).norm()
        unrounded = nn.functional.linear(states.double(), weight, bias)
        if "a8" in name:
            inputs = symmetric(states, (0, 1, 2) if "tensor" in name else (2,)).double()
            expected = nn.functional.linear(inputs, weight, bias)
            assert (output - expected).norm() < 0.6 * (expected - unrounded).norm()
        else:
            assert (output - unrounded).abs().max() < 1e-5 * unrounded.abs().max()


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_a_cpu_with_quantized_keys_and_values(samples):
    model = model_of("token")
    expected = measure_increase(model, samples, "kv8", sample_losses(model, samples)).increase
    model = model.to("cuda")
    found = measure_increase(model, samples, "kv8", sample_losses(model, samples)).increase
    assert found == pytest.approx(expected, rel=0.05, abs=1e-5)


@pytest.mark.parametrize("name", ["w8a8-token", "w8a8-tensor"])
def test_simulated_activations_give_the_losses_of_the_int8_products(name, samples, monkeypatch):
    model = model_of("token")
    assert quantization.has_exact_products(model.device)
    products = sample_losses(quantized(model, name), samples)
    assert "int8 products" in quantization.arithmetic(name, model.device)
    monkeypatch.setattr(quantization, "has_exact_products", lambda device: False)
    assert "simulated" in quantization.arithmetic(name, model.device)
    simulated = sample_losses(quantized(model, name), samples)
    effect = (products - sample_losses(model, samples)).norm()
    assert (simulated - products).norm() < 0.5 * effect


def test_products_that_saturate_are_noticed(monkeypatch):
    def saturating(left, right, scales):
        return (left.float() @ right.float()).clamp(-(2**15), 2**15) * scales

    monkeypatch.setattr(kernel, "int_scaled_matmul", saturating)
    assert not quantization.has_exact_products(torch.device("cpu"))


def test_a_sink_is_quantized_like_every_token(samples):
    """If its activations are large, one scale for all tokens is too coarse for the others."""
    model = model_of("token")
    first_sink = model.config.sink_token_ids[0]

    def effect(name: str) -> float:
        return (sample_losses(quantized(model, name), samples) - sample_losses(model, samples)).norm().item()

    with torch.no_grad():  # only the sink has a value in dimension 3, which the first layer amplifies
        model.gpt_neox.embed_in.weight[:, 3] = model.gpt_neox.embed_in.weight[:, :3].sum(1) / -60
        model.gpt_neox.embed_in.weight[first_sink] = 0
        model.gpt_neox.embed_in.weight[first_sink, 3] = 1
        model.gpt_neox.layers[0].input_layernorm.weight[3] = 100
    by_tensor, by_token = effect("w8a8-tensor"), effect("w8a8-token")
    assert by_tensor > 3 * by_token


@pytest.mark.parametrize("kind", ["none", "token", "logit"])
def test_keys_and_values_are_rounded_when_they_are_not_recent(kind, samples):
    model = model_of(kind)
    found, plain = cached_losses(model, samples, "int8"), sample_losses(model, samples)
    expected = torch.stack([slow_cached_loss(model, row) for row in samples.ids])
    assert (expected - plain).abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


WINDOWED = {
    "windows": lambda: model_of("token", layer_windows=[20, None], num_kept=2),
    "only windows": lambda: model_of("kv_bias", layer_windows=[36, 8], num_kept=1),
    "only windows, sinks": lambda: model_of("token", layer_windows=[34, 34], num_kept=1),
    "stock windows": lambda: MistralForCausalLM(
        MistralConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=400,
            sliding_window=35,
            pad_token_id=None,
        )
    ).eval(),
}


@pytest.mark.parametrize("make", [lambda: model_of("token"), lambda: model_of("gate"), *WINDOWED.values()])
def test_a_cache_that_is_not_quantized_changes_no_loss(make, samples):
    model = make()
    plain = sample_losses(model, samples)
    torch.testing.assert_close(cached_losses(model, samples, None), plain, rtol=0, atol=2e-6)
    assert (cached_losses(model, samples, "int8") - plain).abs().max() > 1e-7
    assert (cached_losses(model, samples, "int8") - plain).abs().max() < 0.05


@pytest.mark.parametrize(
    ("make", "num_positions"),
    [(lambda: model_of("token"), 35), (WINDOWED["windows"], 37), (WINDOWED["only windows"], 36)],
)
def test_samples_of_which_nothing_is_quantized_are_refused(make, num_positions):
    """In the shortest samples that are accepted, quantization changes a loss."""
    model = make()
    check_kv(model.config, num_positions)
    with pytest.raises(ValueError, match=rf"nothing: the last 32 .* of {num_positions - 1} .*at most 32 before its"):
        check_kv(model.config, num_positions - 1)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 400, (2, num_positions - model.config.num_sinks), generator=chance)
    changes = [
        cached_losses(model, Sequences(rows, 0, {}), "int8") - sample_losses(model, Sequences(rows, 0, {}))
        for rows in (ids, ids[:, :-1])
    ]
    assert changes[0].abs().max() > 3 * changes[1].abs().max()


def test_a_window_of_which_nothing_is_quantized_is_refused():
    with pytest.raises(ValueError, match="the windows of this model have at most 32 tokens: leave kv8 out"):
        check_kv(model_of("token", layer_windows=[32, 8], num_kept=1).config, 100)


@torch.inference_mode()
def slow_cached_loss(model, row):
    """Token by token: before each, all keys and values but the last 32 are rounded."""
    cache, losses = DynamicCache(config=model.config), []
    exact = None
    for t in range(len(row) - 1):
        logits = model(row[None, t : t + 1], use_cache=True, **{CACHE: cache}).logits[0, -1]
        losses.append(nn.functional.cross_entropy(logits, row[t + 1]).double())
        news = [(layer.keys, layer.values) for layer in cache.layers]
        if exact is None:
            exact = [[states.clone() for states in layer] for layer in news]
        else:
            exact = [
                [torch.cat((old, new[:, :, -1:]), dim=2) for old, new in zip(olds, layer, strict=True)]
                for olds, layer in zip(exact, news, strict=True)
            ]
        for layer, (keys, values) in zip(cache.layers, exact, strict=True):
            layer.keys, layer.values = rounded(keys), rounded(values)
    return torch.stack(losses).mean()


def rounded(states):
    old = states[:, :, : max(states.shape[2] - NUM_RECENT, 0)]
    codes, scales = KV_DTYPES["int8"].quantize(old)
    return torch.cat((KV_DTYPES["int8"].dequantize(codes, scales, states.dtype), states[:, :, old.shape[2] :]), dim=2)


# -- what is measured ------------------------------------------------------------------------------


def test_models_with_and_without_sinks_score_the_same_tokens(samples):
    for kind in ("none", "token"):
        model = model_of(kind)
        logits = model(samples.ids).logits[:, :-1].flatten(0, 1)
        each = nn.functional.cross_entropy(logits, samples.ids[:, 1:].flatten(), reduction="none")
        expected = each.view(3, -1).mean(1).double()
        torch.testing.assert_close(sample_losses(model, samples), expected, rtol=0, atol=1e-6)


def test_the_model_itself_is_not_changed_and_the_error_is_paired(samples):
    model = model_of("gate")
    before = copy.deepcopy(model.state_dict())
    plain = sample_losses(model, samples)
    for name in FORMATS:
        found = measure_increase(model, samples, name, plain)
        losses = (
            cached_losses(model, samples, "int8") if name == "kv8" else sample_losses(quantized(model, name), samples)
        )
        differences = (losses - plain).tolist()
        assert found.increase == pytest.approx(mean(differences), abs=1e-9)
        assert found.stderr == pytest.approx(stdev(differences) / math.sqrt(3), abs=1e-9)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert torch.equal(plain, sample_losses(model, samples))


def test_the_head_and_the_embedding_are_not_quantized():
    model = model_of("head_gate")
    layers = quantized_layers(model)
    assert not [name for name in layers if "lm_head" in name]
    assert {name.split(".", 3)[3] for name in layers} == {
        *("attention.query_key_value", "attention.dense", "attention.head_gate"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    }


def test_activations_are_those_of_the_residual_stream(samples):
    model = model_of("none")
    with torch.no_grad():
        model.gpt_neox.layers[0].attention.dense.bias[7] = 1e5
    found = activations(model, samples)
    states = model(samples.ids, output_hidden_states=True).hidden_states[:2]
    expected = torch.stack([state.abs().amax((1, 2)) for state in states]).amax(0)
    assert found["largest_activation"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert {(a["layer"], a["dimension"], a["share"]) for a in found["massive_activations"]} == {(1, 7, 1.0)}
    assert len(found["massive_activations"]) == NUM_TOKENS


def test_a_model_that_would_stay_in_full_precision_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(
        ValueError, match=r"c_attn\.weight is not the weight of a linear layer.*'gpt2' are not supported"
    ):
        quantized(model, "w8")


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("none", "token"):
        write_checkpoint(folder / kind, model_of(kind))
    export_model(folder / "token", folder / "export")
    (folder / "book.txt").write_text("".join(f"{i}. In the morning the sea was calm.\n" for i in range(60)))
    return folder


def run(*arguments) -> str:
    result = CliRunner().invoke(app, ["eval", "quantization", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_writes_tables_and_a_picture(runs, tmp_path):
    names = [runs / name for name in ("none", "token", "export")]
    said = run(*names, "--data", runs / "book.txt", "--num-sequences", 4, "--seq-length", 36, "-o", tmp_path)
    report = json.loads((tmp_path / "quantization.json").read_text())
    assert [entry["name"] for entry in report["runs"]] == ["none", "token", "export"]
    assert report["versions"]["torchao"] == metadata.version("torchao")
    _, token, export = report["runs"]
    assert export["loss"] == pytest.approx(token["loss"], abs=1e-5)  # its tokenizer puts the sink in front
    for ours, theirs in zip(token["formats"], export["formats"], strict=True):
        assert theirs["increase"] == pytest.approx(ours["increase"], abs=1e-3)
    assert len({entry["samples"]["ids_sha256"] for entry in report["runs"]}) == 1
    assert not report["notes"]
    rows = list(csv.DictReader((tmp_path / "quantization.csv").read_text().splitlines()))
    assert [(row["run"], row["format"]) for row in rows] == [
        (entry["name"], name) for entry in report["runs"] for name in FORMATS
    ]
    assert float(rows[0]["increase"]) == report["runs"][0]["formats"][0]["increase"]
    increase = token["formats"][3]
    shown = f"{'+' if increase['increase'] >= 0 else '−'}{abs(increase['increase']):.4f} ± {increase['stderr']:.4f}"
    assert shown in (tmp_path / "quantization.md").read_text()
    assert (tmp_path / "quantization.png").read_bytes().startswith(b"\x89PNG")
    assert "paired over samples" in said
    assert shown in said  # in a table for 80 columns
    wide = Console(width=200)
    with wide.capture() as captured:
        wide.print(results_table(report, "title", 200))
    assert shown in captured.get()
    assert len(captured.get().splitlines()) < 10

    increases, largest = quantization_figure(report).axes
    assert list(largest.lines[0].get_xdata()) == [entry["largest_ratio"] for entry in report["runs"]]
    points = [container[0].get_xdata().tolist() for container in increases.containers]
    assert points == [[entry["formats"][i]["increase"] for entry in report["runs"]] for i in range(len(FORMATS))]


def test_the_formats_of_the_command_are_all():
    assert tuple(FORMATS) == command.FORMATS


def test_mistakes_are_named(runs, tmp_path):
    def refused(*arguments, error=ValueError, match):
        with pytest.raises(error, match=match):
            run(*arguments, "-o", tmp_path / "results")
        assert not (tmp_path / "results").exists()

    model, book = runs / "none", ("--data", runs / "book.txt")
    narrow = write_checkpoint(tmp_path / "narrow", small_model(0))
    refused(model, *book, "--formats", "", match="--formats has an empty name: use only w8, w4")
    refused(model, *book, "--formats", "w9", match="--formats contains 'w9'")
    refused(model, "--data", "nobook.txt", error=OSError, match=r"--data nobook\.txt cannot be read")
    refused(model, narrow, *book, match=r"narrow: w4 requires .* multiples of 32, but .*query_key_value has 48 inputs")
    refused(model, *book, "--seq-length", 129, match="none: --seq-length 129 is more than the 128 tokens that fit")
    refused(
        model,
        *book,
        "--formats",
        "kv8",
        "--seq-length",
        34,
        match="none: kv8 would quantize nothing: .* in a sample of 34 positions",
    )
    refused(model, *book, "--seq-length", 100, match="sequences of 100 are needed: use more text")


def test_by_default_a_cache_that_quantizes_nothing_is_left_out_and_a_named_format_is_refused(runs):
    models, wanted, place = [str(runs / "none")], ["w8", "kv8"], {"device": "cpu"}
    num_tokens, formats, notes = command._check_runs(models, wanted, place, 34, is_default=True)
    assert (num_tokens, formats, wanted) == (34, ["w8"], ["w8", "kv8"])
    assert notes[0].startswith(f"kv8 was left out. {models[0]}: kv8 would quantize nothing")
    with pytest.raises(ValueError, match="kv8 would quantize nothing"):
        command._check_runs(models, wanted, place, 34, is_default=False)


def test_a_check_loads_each_run_once_and_names_the_one_that_is_too_short(runs, tmp_path, monkeypatch):
    """With samples of the shorter length, nothing of the other run would be quantized either."""
    short = write_checkpoint(tmp_path / "short", small_model(0, max_position_embeddings=34))
    loaded, load = [], command._load
    monkeypatch.setattr(command, "_load", lambda run, place: (loaded.append(run), load(run, place))[1])
    names = [str(runs / "none"), str(short)]
    num_tokens, formats, notes = command._check_runs(names, ["w8", "kv8"], {"device": "cpu"}, None, is_default=True)
    assert (num_tokens, formats, loaded) == (34, ["w8"], names)
    (note,) = notes
    assert note.startswith(f"kv8 was left out. {short}: ")


def test_a_folder_that_is_no_store_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("sinklm.cli.quantization._load", None)  # no model is loaded
    with pytest.raises(FileNotFoundError, match=r"manifest|store"):
        run(runs / "none", "--data", tmp_path, "-o", tmp_path / "results")
