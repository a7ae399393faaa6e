"""`sinklm import` runs its examples and says what it has written."""

import shlex

import pytest
from typer.testing import CliRunner

from sinklm.checkpoints import load_model
from sinklm.checkpoints.warm_start import load_weights
from sinklm.cli.importing import import_, recipe_of
from sinklm.cli.main import app
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config

from ..checkpoints.pythia import num_tokens, put_pythia_in_cache, write_pythia


@pytest.mark.parametrize(
    ("line", "folder"),
    list(zip(import_.examples, ["imported/pythia-160m-step3000-token", "imported/seed3"], strict=True)),
)
def test_the_examples_run_and_name_the_folder(line, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    put_pythia_in_cache(tmp_path / "cache")
    result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert result.stdout.startswith(f"{folder}: ")
    assert f"parameters, sink token {num_tokens()}" in result.stdout
    (said,) = (line for line in result.stderr.splitlines() if line.startswith("to train on: "))
    program, command, recipe, *settings = shlex.split(said.removeprefix("to train on: "))
    assert (program, command, settings[-2:]) == ("sinklm", "train", [f"model.init_from={folder}", "data.path=STORE"])
    plan = Plan(load_config(recipe, settings), 1, num_tokens())
    assert set(load_weights(folder, plan.model_config).state_dict()) == set(load_model(folder).state_dict())
    assert load_model(folder).config.sink_token_ids == [num_tokens()]


def test_a_larger_embedding_and_another_type_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pythia(tmp_path / "pythia", vocab_size=num_tokens())
    arguments = ["import", "./pythia", "--dtype", "bfloat16", "-q"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "set model.vocab_size=" in result.stderr
    assert "to train on:" not in result.stderr
    assert str(load_model("imported/pythia-token", dtype="auto").dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("base", "recipe"), [("pythia-160m", "continue/pythia-160m"), ("pythia-6.9b", "pythia-6.9b"), ("quickstart", None)]
)
def test_the_recipe_for_training_on_has_the_sizes_of_the_model(base, recipe):
    model = load_config(base).model
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    found, is_released = recipe_of({key: getattr(model, key) for key in keys})
    assert (found, is_released) == (recipe or "continue/pythia-160m", recipe is not None)
