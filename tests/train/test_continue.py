"""A released model: import, train on with a re-warmed learning rate, evaluate, export."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.importing import import_model
from sinklm.checkpoints.warm_start import describe_change, load_weights
from sinklm.data import TokenStore
from sinklm.eval.perplexity import configurations, measure, read_text_files
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train

from ..checkpoints.pythia import write_pythia
from .plain import batches_of
from .tiny import losses, metrics

NUM_STEPS = 8
SMALL = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.vocab_size=384",
    f"train.num_steps={NUM_STEPS}",
    "train.seq_length=32",
    "train.batch_size_tokens=256",
    "train.micro_batch_size=8",
    "train.precision=fp32",
    "optimizer.warmup_ratio=0.25",
    "validation.every_steps=null",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def pythia(store, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    return write_pythia(tmp_path_factory.mktemp("hub") / "pythia", vocab_size=384, tokenizer=tokenizer)


def test_the_recipe_rewarms_and_decays_over_its_own_steps():
    config, pretraining = load_config("continue/pythia-160m"), load_config("pythia-160m")
    assert config.optimizer == pretraining.optimizer
    assert config.train.num_steps < pretraining.train.num_steps
    assert config.model.init_from == "EleutherAI/pythia-160m"


def test_an_imported_model_is_trained_evaluated_and_exported(pythia, store, tmp_path):
    imported = import_model(pythia, tmp_path / "imported").folder
    settings = [*SMALL, f"data.path={store}"]
    run, direct = tmp_path / "run", tmp_path / "direct"
    train("continue/pythia-160m", [*settings, f"model.init_from={imported}", f"train.run_dir={run}"])
    train("continue/pythia-160m", [*settings, f"model.init_from={pythia}", f"train.run_dir={direct}"])
    assert losses(direct) == pytest.approx(losses(run), rel=1e-3)  # the import has a row in float16

    rates = [line["lr"] / 6e-4 for line in metrics(run) if "lr" in line]
    assert rates[:2] == pytest.approx([0.5, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert losses(run)[NUM_STEPS] < losses(run)[1] - 0.1

    text = read_text_files([store.parent / "corpus.jsonl"], load_tokenizer(run), 200)
    (cache,) = configurations(("streaming",), [(1, 15)], num_sinks=1)
    before, after = (measure(load_model(model, device="cpu"), text, cache).perplexity for model in (imported, run))
    assert after < before

    exported = export_model(run, tmp_path / "export")
    ids = AutoTokenizer.from_pretrained(exported)("the sea", return_tensors="pt").input_ids
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(exported)(ids).logits[:, 1:]
        torch.testing.assert_close(plain, load_model(run, device="cpu")(ids[:, 1:]).logits, rtol=0, atol=1e-5)


def test_a_plain_model_is_trained_on_with_windows_and_a_sink(pythia, store, tmp_path, capfd):
    settings = [*SMALL, f"data.path={store}", f"model.init_from={pythia}", "model.attention.window=[2,15]"]
    train("windows/continue-160m", [*settings, f"train.run_dir={tmp_path}"])
    drawn, full = (
        "a window of 2 to 15 (drawn for each step) in all layers with 1 kept token",
        "full attention in all layers",
    )
    said = f"init_from was trained with {full}, and this run trains with {drawn}"
    assert said in " ".join(capfd.readouterr().out.split())
    plan = Plan(load_config("windows/continue-160m", settings), 1, TokenStore(store).tokenizer_size)
    samples = next(batches_of(plan))
    start = load_weights(pythia, plan.model_config)
    with torch.no_grad():
        expected = start(samples[:, :-1], labels=samples, window=plan.window(1)).loss
    assert losses(tmp_path)[1] == pytest.approx(expected.item(), abs=1e-5)
    assert losses(tmp_path)[NUM_STEPS] < losses(tmp_path)[1] - 0.1
    saved = load_model(tmp_path, device="cpu").config
    assert (saved.layer_windows, saved.num_kept, saved.window_range, saved.num_sinks) == ([15, 15], 1, [2, 15], 1)

    without = Plan(load_config("continue/pythia-160m", SMALL), 1, TokenStore(store).tokenizer_size).model_config
    with pytest.warns(UserWarning, match="with full attention, the loss"):
        exported = export_model(tmp_path, tmp_path / "export", full_attention=True)
    for trained in (tmp_path, exported):
        assert f"trained with {drawn}, and this run trains with {full}" in describe_change(trained, without)
        assert describe_change(trained, plan.model_config) is None
    assert describe_change(pythia, without) is None
    config = exported / "config.json"
    config.write_text(config.read_text().replace('"layer_windows"', '"layer_window"'))
    with pytest.raises(ValueError, match=r"model.init_from=\S+: the key trained_windows of config.json is damaged"):
        describe_change(exported, without)
