"""Training on sets with given weights."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sinklm.checkpoints import load_model
from sinklm.checkpoints.export import export_model
from sinklm.cli.store_summary import print_summary
from sinklm.console import Console
from sinklm.data import SampleOrder, SetWindows, TokenStore, TokenWindows, WeightedOrder
from sinklm.train.batches import open_windows, sample_order
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.train.summary import epochs
from sinklm.train.validation import set_windows, sets_left_out

from .tiny import copy_checkpoint, losses, metrics, prepare_here


@pytest.fixture(scope="module")
def sets(tmp_path_factory, store) -> Path:
    """A store of the sets "code" and "web (en)"."""
    folder = tmp_path_factory.mktemp("sets")
    chance = random.Random(5)
    rows = []
    for _ in range(200):
        name = chance.choice(["code", "web (en)"])
        text = " ".join(chance.choices(["sink", "token", "window", "cache"], k=40))
        rows.append(json.dumps({"text": text, "meta": {"pile_set_name": name}}) + "\n")
    (folder / "corpus.jsonl").write_text("".join(rows))
    return prepare_here(folder / "corpus.jsonl", folder / "store", tokenizer=store, split_sets=True)


def plan_of(recipe: str, sets: Path, *overrides: str) -> Plan:
    return Plan(load_config(recipe, [f"data.path={sets}", *overrides]), 1, TokenStore(sets).tokenizer_size)


def test_a_recipe_with_weights_reads_sets_in_their_order(recipe, sets):
    plan = plan_of(recipe, sets, "data.weights={code: 3, web (en): 1}")
    windows, _ = open_windows(TokenStore(sets), plan)
    order = sample_order(TokenStore(sets), windows, plan)
    assert isinstance(windows, SetWindows)
    assert isinstance(order, WeightedOrder)
    names = [windows.place_of(i)[0] for i in order(np.arange(4096)).tolist()]
    assert names.count("code") == 3072
    num_code = windows.num_windows["code"]
    assert epochs(plan, windows).startswith(
        f"0.75 of the samples from code ({64 * 0.75 / num_code:.3g} epochs), 0.25 of the"
    )
    plain = plan_of(recipe, sets)
    windows, _ = open_windows(TokenStore(sets), plain)
    assert isinstance(windows, TokenWindows)
    assert isinstance(sample_order(TokenStore(sets), windows, plain), SampleOrder)


def test_a_set_of_weight_0_is_left_out(recipe, sets):
    plan = plan_of(recipe, sets, "data.weights={code: 0, web (en): 0.1}")
    windows, _ = open_windows(TokenStore(sets), plan)
    assert list(windows.num_windows) == ["web (en)"]
    order = sample_order(TokenStore(sets), windows, plan)
    assert sorted(order(np.arange(len(windows))).tolist()) != list(range(len(windows)))  # blocks end elsewhere
    assert set(order(np.arange(1024 * len(windows))).tolist()) == set(range(len(windows)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{code: 1}", r"data\.weights has no weight of web \(en\), which .* contains: set it, to 0"),
        ("{code: 1, web (en): 1, law: 1}", r"data\.weights: .*has no set 'law' in the train split, only code, web"),
        ("{code: 0, web (en): 0}", r"data\.weights.*at least one weight must be greater than 0"),
        ("{code: -1, web (en): 1}", r"data\.weights\.code is -1: it should be greater than or equal to 0"),
        ("{code: .inf, web (en): 1}", r"data\.weights\.code is inf: it should be a finite number"),
        ("{code: many, web (en): 1}", r"data\.weights\.code is 'many'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(recipe, sets, weights, message):
    with pytest.raises(ValueError, match=message):
        open_windows(TokenStore(sets), plan_of(recipe, sets, f"data.weights={weights}"))


def test_a_run_with_weights_resumes_exactly_and_only_with_them(recipe, sets, tmp_path):
    data = [f"data.path={sets}", "data.weights={web (en): 0.3, code: 0.7}"]
    train(recipe, [*data, f"train.run_dir={tmp_path / 'whole'}"])
    copy_checkpoint(tmp_path / "whole", 4, tmp_path / "resumed")
    data[1] = "data.weights={code: 0.7, web (en): 0.3}"
    train(recipe, [*data, f"train.run_dir={tmp_path / 'resumed'}"])
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    for other in ("data.weights={web (en): 0.4, code: 0.6}", "data.weights=null"):
        with pytest.raises(
            ValueError, match=r"data\.weights\.code is .*, but .* was trained with 0\.7; .*: restore these values"
        ):
            train(recipe, [data[0], other, f"train.run_dir={tmp_path / 'resumed'}", "train.num_steps=9"])


def test_the_validation_loss_of_each_set_is_that_of_its_documents(recipe, store, sets, tmp_path, capsys):
    settings = [f"data.path={sets}", f"train.run_dir={tmp_path}", "validation.by_set=true", "validation.num_samples=50"]
    train(recipe, settings)
    last = metrics(tmp_path)[-1]
    by_set = last["validation_loss_by_set"]
    model, opened = load_model(tmp_path), TokenStore(sets)
    for name, loss in by_set.items():
        windows = TokenWindows(opened, "validation", tokens_per_sample=32, stride=32, set_name=name)
        num_samples = min(50, len(windows))  # evenly spaced, also after the first input file
        ids = torch.from_numpy(np.stack([windows[i * len(windows) // num_samples] for i in range(num_samples)]))
        with torch.no_grad():
            assert model(ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-5)
    assert sorted(by_set) == ["code", "web (en)"]
    assert by_set["code"] != by_set["web (en)"]
    assert f"(code {by_set['code']:.4f}, web (en) {by_set['web (en)']:.4f})" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"prepare it with --split-sets \(or remove validation\.by_set\)"):
        train(recipe, [f"data.path={mixed(sets, tmp_path)}", *settings[1:], f"train.run_dir={tmp_path / 'other'}"])


def test_sets_without_held_out_text_are_named(recipe, store, tmp_path, capsys):
    rows = [{"text": f"{i} sink token", "meta": {"pile_set_name": "code"}} for i in range(100)]
    rows.append({"text": "one law", "meta": {"pile_set_name": "law"}})
    (tmp_path / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sets = prepare_here(tmp_path / "corpus.jsonl", tmp_path / "store", tokenizer=store, split_sets=True)
    print_summary(Console(), TokenStore(sets).manifest, sets)
    assert "No document was held out of law, so validation.by_set" in capsys.readouterr().out
    assert sets_left_out(TokenStore(sets), plan_of(recipe, sets, "validation.by_set=true")) == ["law"]
    assert sets_left_out(TokenStore(sets), plan_of(recipe, sets)) == []


def mixed(sets: Path, folder: Path) -> Path:
    """A store of the same documents whose sets are not held apart."""
    return prepare_here(sets.parent / "corpus.jsonl", folder / "mixed", tokenizer=str(sets / "tokenizer.json"))


def test_the_model_card_states_the_weights_and_no_other_data(recipe, sets, store, tmp_path):
    data = Path(shutil.copytree(sets, tmp_path / "store"))
    weights = "data.weights={code: 3, web (en): 1}"
    train(recipe, [f"data.path={data}", weights, f"train.run_dir={tmp_path / 'run'}", "train.num_steps=1"])
    card = (export_model(tmp_path / "run", tmp_path / "export") / "README.md").read_text()
    assert "tokens, read by weight: code 75.0%, web (en) 25.0% |" in card
    shutil.rmtree(data)
    shutil.copytree(store, data)  # another store in its place
    assert "Training data" not in (export_model(tmp_path / "run", tmp_path / "again") / "README.md").read_text()


def test_sets_of_at_least_one_sample_are_validated_in_the_same_order_on_all_ranks(store, tmp_path):
    """Ranks compute the loss of a set together; the order of a Python set differs by process."""
    names = [f"set {letter}" for letter in "hgfedcba"]
    rows = [
        {"text": f"{j} sink token" * (1 + i), "meta": {"pile_set_name": name}}
        for i, name in enumerate(names)
        for j in range(9)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = prepare_here(
        tmp_path / "corpus.jsonl", tmp_path / "store", tokenizer=store, split_sets=True, validation_fraction=0.7
    )
    opened = TokenStore(folder)
    sizes = {name: counts.tokens for name, counts in opened.manifest.splits["validation"].sets.items()}
    assert sorted(sizes) == sorted(names)
    config = SimpleNamespace(validation=SimpleNamespace(by_set=True))
    for size in sorted(set(sizes.values())):
        plan = SimpleNamespace(config=config, tokens_per_sample=size, stride=size)
        large = sorted(name for name in names if sizes[name] >= size)
        assert list(set_windows(opened, plan)) == large
        assert sets_left_out(opened, plan) == sorted(set(names) - set(large))
    plan = SimpleNamespace(config=config, tokens_per_sample=max(sizes.values()) + 1, stride=1)
    with pytest.raises(
        ValueError, match=r"no set has a sample of \d+ tokens for validation \(or remove validation\.by"
    ):
        set_windows(opened, plan)
