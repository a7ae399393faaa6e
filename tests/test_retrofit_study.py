"""The studies of retrofits and of quantization: what their tables and answers are made of."""

import argparse
import importlib
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from sinklm.checkpoints.folders import list_checkpoints
from sinklm.checkpoints.warm_start import load_weights
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train.plan import Plan
from sinklm.train.recipe import config_yaml, load_config

from .checkpoints.pythia import write_pythia
from .train.tiny import make_store

VANILLA = 20.0  # perplexity of the untouched vanilla model with 4+124


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def checkpoint(tokens: int, perplexity: float, loss: float = 3.0) -> dict:
    """Measured with 1+124; 0+124 is twice as high, and 4+124 is the same."""
    caches = {"0+124": 2 * perplexity, "1+124": perplexity, "4+124": perplexity}
    rates = {"sink token 1": 0.5, "first text token": 0.1}
    return {"tokens": tokens, "perplexity": caches, "loss": loss, "sinks": {"sink_rate": rates}}


def result(row: str, seed: int, perplexities: list[float], is_frozen: bool = False, lr: str = "1e-3", **facts) -> dict:
    checkpoints = {str(n): checkpoint(100_000 * n, value, 3 + n / 100) for n, value in enumerate(perplexities)}
    known = {"data_fingerprint": "d", "text": {"sha256": ["t"], "length": 9}, "checkpoints": checkpoints}
    return {"row": row, "is_frozen": is_frozen, "lr": lr, "seed": str(seed)} | known | facts


def plain(seed: int, *perplexities: float, lr: str = "1e-3") -> dict:
    return result("plain", seed, [VANILLA, *perplexities], lr=lr)


def compared(load, *runs: dict):
    return load("retrofit_report").configurations({"settings": {"window": 124}, "runs": list(runs)})


def answered(load, *runs: dict) -> str:
    return load("retrofit_report").tables({"settings": {"window": 124}, "runs": list(runs)})["answer"]


def test_tokens_are_those_after_which_the_mean_stays_within_one_percent(load):
    continued = [VANILLA] * 4
    runs = [result("mean", 1, [30.0, 20.2, 20.5, 20.3, 20.1]), result("mean", 2, [40.0, 20.0, 20.0, 20.0, 20.2])]
    (found,) = compared(load, plain(1, *continued), plain(2, *continued), *runs)
    assert found.excess["untouched"][1] == pytest.approx([1.0, 0.0])
    assert found.excess["untouched"][2] == pytest.approx([2.5, 0.0])
    assert found.tokens_until("untouched") == 300_000  # after 200,000 the mean is 1.25 %
    assert found.tokens_until_both == 300_000
    assert found.sink_rate == pytest.approx([50.0, 50.0])
    assert found.without == pytest.approx([100.0, 100.0])


def test_the_continued_model_is_that_of_the_same_seed_and_rate(load):
    runs = [result("mean", 1, [30.0, 18.0]), result("mean", 2, [30.0, 18.0])]
    others = [plain(1, 17.9), plain(2, 17.0), plain(1, 1.0, lr="5e-3")]
    (found,) = compared(load, *others, *runs)
    assert found.excess["continued"][1] == pytest.approx([100 * (18 / 17.9 - 1), 100 * (18 / 17 - 1)])
    assert found.excess["untouched"][1] == pytest.approx([-10.0, -10.0])
    assert (found.tokens_until("untouched"), found.tokens_until("continued")) == (100_000, None)
    assert found.tokens_until_both is None
    assert found.cost["continued"][1] == pytest.approx([0.0, 0.0])
    assert found.cost["untouched"][1] == pytest.approx([0.01, 0.01])
    (alone,) = compared(load, plain(1, 17.9), *runs)  # one seed's model is missing
    assert list(alone.excess) == ["untouched"]


def test_frozen_weights_are_compared_with_the_untouched_model_alone(load):
    runs = [plain(1, 10.0), result("mean", 1, [30.0, 20.1], is_frozen=True)]
    (found,) = compared(load, *runs)
    assert list(found.excess) == ["untouched"]
    assert found.tokens_until_both == 100_000


def test_checkpoints_that_not_all_seeds_have_are_left_out(load):
    (found,) = compared(load, plain(1, 20.0), result("mean", 1, [30.0, 20.0]), result("mean", 2, [30.0]))
    assert found.tokens == [0]


def test_the_answer_names_the_fewest_tokens_and_then_the_least_loss(load):
    module = load("retrofit_report")
    fast = result("mean", 1, [30.0, 20.0, 20.0], lr="3e-3", is_frozen=True)
    slow = result("random", 1, [30.0, 25.0, 20.0])
    found = {"settings": {"window": 124}, "runs": [plain(1, 20.0, 20.0), slow, fast]}
    tables = module.tables(found)
    assert tables["answer"] == (
        "After 0.1 M tokens, 1+124 with the sink token is within 1 % of 4+124 of the vanilla model (initial row: mean; "
        "other weights: frozen; learning rate 3e-3). 2 of 2 configurations reach this and keep it."
    )
    row = "| random | trained | 1e-3 | 1 | 0.2 M | 0.2 M | +0.00 | +0.00 | +0.0200 | +0.0000 | 50.0 | +100.0 |"
    assert row in tables["summary"].splitlines()
    assert "| mean, frozen, 3e-3 | +50.00 | +0.00 | +0.00 |" in tables["untouched"].splitlines()
    assert tables["continued"].splitlines()[2:] == ["| random, trained, 1e-3 | +50.00 | +25.00 | +0.00 |"]
    at_once = [result("mean", 1, [20.1, 20.0]), result("random", 1, [20.0, 20.0]), result("endoftext", 1, [25.0, 20.0])]
    assert answered(load, plain(1, 20.0), *at_once) == (
        "Before any training, 1+124 with the sink token is within 1 % of 4+124 of the vanilla model (initial row: mean "
        "or random). 3 of 3 configurations reach this and keep it."
    )
    never = answered(load, plain(1, 20.0), result("mean", 1, [30.0, 25.0]))
    assert never == "After 0.1 M tokens, no configuration has 1+124 within 1 % of 4+124."
    assert answered(load, plain(1, 20.0)) == answered(load) == ""


def test_the_picture_has_a_panel_for_each_reference_and_a_curve_for_each_configuration(load):
    runs = [result("mean", seed, [30.0, 20.0 + seed]) for seed in (1, 2)]
    runs += [result("random", 1, [40.0, 30.0]), result("mean", 1, [30.0, 25.0], is_frozen=True)]
    ready = compared(load, plain(1, 20.0), plain(2, 20.0), *runs)
    panels = {axes.get_title(): axes for axes in load("retrofit_report").picture(ready).axes}
    assert list(panels) == [
        "trained weights, over untouched vanilla",
        "frozen weights, over untouched vanilla",
        "trained weights, over continued vanilla",
    ]
    mean, random, _ = panels["trained weights, over untouched vanilla"].lines
    assert mean.get_xdata().tolist() == [0, 100_000]
    assert mean.get_ydata().tolist() == pytest.approx([50.0, 7.5])
    assert random.get_ydata().tolist() == pytest.approx([100.0, 50.0])
    assert mean.get_color() != random.get_color()


def test_retrofits_are_compared_with_the_vanilla_models_of_their_own_data(load, capsys):
    other = {"data_fingerprint": "other"}
    runs = [plain(1, 16.0), result("mean", 1, [20.0, 18.0]), result("mean", 2, [20.0, 18.0], **other)]
    (alone,) = compared(load, *runs)
    assert capsys.readouterr().err == "left out: 1 runs, of whose data there is no vanilla model\n"
    assert alone.excess["continued"][1] == pytest.approx([12.5])
    second = result("plain", 2, [10.0, 9.0], **other)
    second["checkpoints"]["0"]["loss"] = 2.0
    (found,) = compared(load, *runs, second)
    assert found.excess["untouched"][0] == pytest.approx([0.0, 100.0])
    assert found.excess["continued"][1] == pytest.approx([12.5, 100.0])
    assert found.cost["untouched"][0] == pytest.approx([0.0, 1.0])
    assert capsys.readouterr().err == ""


def test_retrofits_measured_on_other_texts_are_not_compared(load):
    with pytest.raises(ValueError, match="the runs differ in text, so they cannot be compared"):
        compared(load, plain(1, 20.0), result("mean", 1, [30.0], text="other"))


def test_a_mean_has_the_standard_error_over_seeds(load):
    load("retrofit_report")  # puts study/ on the path
    shown = importlib.import_module("seed_tables").mean_and_error
    assert shown([1.0, 2.0, 4.0], 3) == f"2.333 ± {math.sqrt(7 / 3 / 3):.3f}"
    assert shown([-1.0, -2.0], 1, "+") == "−1.5 ± 0.5"
    assert (shown([2.0], 2, "+"), shown([], 2)) == ("+2.00", "")


def test_an_interrupted_study_starts_nothing_more(load, tmp_path, monkeypatch):
    study_jobs = load("study_jobs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(study_jobs, "visible_gpus", lambda: [""])
    jobs = importlib.import_module("jobs")

    def job(name: str, code: str) -> object:
        return jobs.Job(name, (sys.executable, "-c", code), tmp_path / f"{name}.log")

    stop = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(9)"
    later = tmp_path / "later"
    pairs = [(job("first", "pass"), job("measured", stop)), (job("next", f"open({str(later)!r}, 'w')"), job("n", ""))]
    assert not study_jobs.run_in_parts(pairs, study_jobs.Deadline(float("inf")), per_gpu=1)
    assert (pairs[0][0].is_done, pairs[0][1].is_done, later.exists()) == (True, False, False)
    pairs[0] = (pairs[0][0], job("measured", "pass"))
    assert study_jobs.run_in_parts(pairs, study_jobs.Deadline(float("inf")), per_gpu=1)
    assert later.exists()


def test_a_job_that_fails_does_not_stop_the_others(load, tmp_path, monkeypatch):
    study_jobs = load("study_jobs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs = importlib.import_module("jobs")
    ended = [(jobs.Job(n, (sys.executable, "-c", c), tmp_path / f"{n}.log")) for n, c in {"a": "1/0", "b": ""}.items()]
    pairs = [(ended[0], ended[1]), (ended[1], ended[1])]
    assert not study_jobs.run_in_parts(pairs, study_jobs.Deadline(float("inf")), per_gpu=1)
    assert (ended[0].is_done, ended[1].is_done) == (False, True)


def write_quantized(folder: Path, name: str, increase: float, largest: float, samples: str = "s") -> None:
    formats = [{"format": name, "increase": increase, "stderr": 0.5} for name in ("kv8", "w8")]
    measured = {"name": name, "model": {}, "samples": {"ids_sha256": samples}, "loss": 3.0, "formats": formats}
    measured |= {"largest_activation": largest, "largest_ratio": 10 * largest, "massive_activations": [{}, {}]}
    for part, content in {
        f"results/{name}/quantization.json": {"versions": {}, "notes": [], "num_tokens": 9, "runs": [measured]},
        f"runs/{name}/environment.json": {"torch": "2"},
    }.items():
        path = folder / part
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))


def test_quantization_is_by_depth_and_arm_with_the_error_over_seeds(load, tmp_path):
    module, report = load("quantization_study"), load("quantization_report")
    write_quantized(tmp_path, "gate-8-layers-seed-2", -0.00001, 5.0)
    write_quantized(tmp_path, "none-8-layers-seed-2", 0.3, 100.0)
    write_quantized(tmp_path, "none-8-layers-seed-1234", 0.1, 50.0)
    write_quantized(tmp_path, "kv_bias-24-layers-seed-2", -0.01, 5.0)
    found = {"models": module.collect(tmp_path)}
    tables = report.tables(found)
    assert list(tables) == ["layers_8", "layers_24"]
    headers, _, none, gate = tables["layers_8"].splitlines()
    assert headers == "| arm | seeds | largest activation | × median | massive | loss | w8 | kv8 |"
    increases = "+0.2000 ± 0.1000 | +0.2000 ± 0.1000"
    assert none == f"| none | 2 | 75.0 ± 25.0 | 750 ± 250 | 2.0 ± 0.0 | 3.0000 ± 0.0000 | {increases} |"
    assert gate == "| gate | 1 | 5.0 | 50 | 2.0 | 3.0000 | +0.0000 | +0.0000 |"  # no negative zero
    assert tables["layers_24"].endswith("| kv_bias | 1 | 5.0 | 50 | 2.0 | 3.0000 | −0.0100 | −0.0100 |")
    assert report.tables({"models": []}) == {}
    shown = report.picture(found).axes[0]
    labels = [label.get_text() for label in shown.get_yticklabels()]
    assert labels == ["none, 8 layers", "gate, 8 layers", "kv_bias, 24 layers"]
    assert shown.containers[0][0].get_xdata().tolist() == pytest.approx([0.2, -0.00001, -0.01])
    write_quantized(tmp_path, "gate-24-layers-seed-2", 0.3, 1.0, samples="other")
    with pytest.raises(ValueError, match="were measured on different samples: use another folder"):
        module.collect(tmp_path)


def test_all_arms_are_measured_on_the_same_tokens(load, tmp_path):
    module = load("quantization_study")
    arguments = argparse.Namespace(folder=tmp_path, settings=["data.path=s"], num_sequences=9)
    commands = [module.measuring(module.Model(arm, 8, 1), arguments).command for arm in module.ARMS]
    assert {each[each.index("--seq-length") + 1] for each in commands} == {"255"}  # of 256 positions


@pytest.mark.parametrize("num_rows", [384, 300], ids=["room for a sink", "no unused row"])
def test_runs_start_from_a_folder_of_pythias_form(load, tmp_path, num_rows):
    module = load("retrofit_study")
    store = make_store(tmp_path)
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    vanilla = write_pythia(tmp_path / "pythia", vocab_size=num_rows, tokenizer=tokenizer)
    settings = [f"data.path={store}", "train.seq_length=32", "train.batch_size_tokens=64", "train.micro_batch_size=2"]
    arguments = argparse.Namespace(recipe="retrofit/pythia-160m", folder=tmp_path, settings=settings, million_tokens=1)

    def started(*run: str | bool) -> SinkGPTNeoXForCausalLM:
        recipe, *overrides = module.training(module.Run(*run), str(vanilla), arguments).command[4:]
        config = load_config(recipe, overrides)
        assert (config.train.only_sinks, config.optimizer.lr, config.train.num_steps) == (run[1], 1e-3, 15_625)
        return load_weights(config.model.init_from, Plan(config, 1, 300).model_config)

    plain = started("plain", False, "1e-3", "1")
    assert (plain.config.num_sinks, plain.config.vocab_size) == (0, num_rows)
    rows = {}
    for row, is_frozen in (("mean", False), ("endoftext", True), ("random", False)):
        model = started(row, is_frozen, "1e-3", "1")
        assert model.config.sink_token_ids == [300]
        for name, weight in model.gpt_neox.layers.state_dict().items():
            assert torch.equal(weight, plain.gpt_neox.layers.state_dict()[name])
        rows[row] = model.gpt_neox.embed_in.weight[300]
    embedding = plain.gpt_neox.embed_in.weight[:300]
    assert torch.equal(rows["endoftext"], embedding[0])
    torch.testing.assert_close(rows["mean"], embedding.mean(0))
    assert not torch.equal(started("random", False, "1e-3", "2").gpt_neox.embed_in.weight[300], rows["random"])


def test_a_measured_checkpoint_that_is_half_deleted_counts_as_incomplete(load, tmp_path, monkeypatch):
    module, run = load("retrofit_measure"), tmp_path / "run"
    facts = {"data_fingerprint": "d", "world_size": 1, "zero_stage": 1, "precision": "fp32", "format_version": 1}
    for step in (1, 2):
        folder = run / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "positions": 8 * step, **facts}))
        (folder / "COMPLETE").touch()
    (run / "environment.json").write_text("{}")
    (run / "config.yaml").write_text(config_yaml(load_config("study/vanilla", ["train.num_steps=2"])))

    def interrupted(*arguments, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measured", lambda *arguments: {})
    monkeypatch.setattr("shutil.rmtree", interrupted)
    arguments = f"{run} --store s --text a.txt --window 4 -o {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", ["retrofit_measure", *arguments.split()])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert list(list_checkpoints(run)) == [2]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("retrofit_study", ["F", "--text", "a.txt", "--rows", "zero"], "--rows has zero: choose from mean, endoftext"),
        ("retrofit_study", ["F", "--text", "b.txt"], "--text b.txt: no such file"),
        ("retrofit_study", ["F", "--text", "a.txt"], "no token store: add data.path=STORE"),
        ("quantization_study", ["F", "--arms", "token,gates"], "--arms has gates: choose from none, token"),
        ("quantization_study", ["F"], "no token store: add data.path=STORE"),
    ],
)
def test_a_wrong_call_is_refused_before_any_training(load, tmp_path, monkeypatch, capsys, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").touch()
    module = load(script)
    monkeypatch.setattr(module, "require_extra", lambda name: None, raising=False)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises((SystemExit, ValueError)) as ended:
        module.main()
    assert message in f"{ended.value}{capsys.readouterr().err}"
    assert not Path("F", "runs").exists()


def test_the_name_of_a_retrofit_has_all_that_it_differs_by(load):
    module = load("retrofit_study")
    for run in (module.Run("mean", True, "5e-4", "2"), module.Run("plain", False, "1.6e-3", "1")):
        row, frozen, lr, seed = module.NAME.fullmatch(run.name).groups()
        assert module.Run(row, bool(frozen), lr, seed) == run
