"""Recipes: bases, overrides, and error messages for wrong keys and values."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sinklm.train.config import OF_STAGE_3
from sinklm.train.keys import key_sections
from sinklm.train.recipe import config_yaml, load_config

WINDOW = ["model.attention.pattern=window", "model.attention.window=9"]
WIDE = ["train.precision=fp8", "model.hidden_size=2048"]


def test_all_keys_of_zero_3_need_its_stage():
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    names = {name for name, field in zero.model_fields.items() if str(field.alias).startswith("stage3_")}
    assert len(names) > 5
    assert names <= set(OF_STAGE_3)


def test_a_resolved_config_is_a_recipe_of_the_same_run(tmp_path):
    config = load_config("pythia-410m", ["deepspeed.zero_optimization.overlap_comm=true", "optimizer.betas=[0.8, 0.9]"])
    path = tmp_path / "again.yaml"
    path.write_text(config_yaml(config))
    assert load_config(str(path)) == config


def test_later_values_win(tmp_path):
    (tmp_path / "base.yaml").write_text("base: pythia-14m\ntrain: {num_steps: 1, micro_batch_size: 4}")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ntrain: {num_steps: 2}")
    config = load_config(str(tmp_path / "top.yaml"), ["train.seed=1", "train.seed=2"])
    assert (config.train.num_steps, config.train.micro_batch_size, config.train.seed) == (2, 4, 2)
    assert config.model.hidden_size == 128
    assert config.train.run_dir == "runs/top"


def test_weights_of_sets_are_replaced_as_a_whole(tmp_path):
    (tmp_path / "base.yaml").write_text("base: pythia-14m\ndata: {weights: {wiki: 1, web: 3}}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\ndata: {weights: {books: 1, code: 2}}\n")
    assert load_config(str(tmp_path / "base.yaml")).data.weights == {"wiki": 1.0, "web": 3.0}
    child = str(tmp_path / "child.yaml")
    assert load_config(child).data.weights == {"books": 1.0, "code": 2.0}
    assert load_config(child, ["data.weights={books: 5}"]).data.weights == {"books": 5.0}
    assert load_config(child, ["data.weights=null"]).data.weights is None
    with pytest.raises(ValueError, match=r"data\.weights\.code: name all sets in one value"):
        load_config(child, ["data.weights.code=3"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch=3"], "unknown key train.micro_batch: did you mean train.micro_batch_size?"),
        (["trian.seed=3"], "unknown key trian: did you mean train?"),
        (["lr=3"], "unknown key lr: did you mean optimizer.lr?"),
        (
            ["model.sink.number=3"],
            "unknown key model.sink.number: did you mean model.sink.num_tokens or model.sink.kind?",
        ),
        (["train.xyz=3"], "unknown key train.xyz: valid keys are train.run_dir, train.seed"),
        (["train.precision=int8"], "train.precision is 'int8': it should be 'bf16', 'fp16', 'fp32' or 'fp8'"),
        (["train.precision=fp8", "deepspeed.zero_stage=3"], "fp8 does not work with deepspeed.zero_stage=3: set 1"),
        (["train.precision=fp8", "deepspeed.zero_stage=0"], "fp8 does not work with deepspeed.zero_stage=0: set 1"),
        (
            ["train.precision=fp8"],
            "fp8 requires model.hidden_size of at least 768, but it is 128: set train.precision",
        ),
        (
            [*WIDE, *WINDOW, "train.segment_length=512"],
            "fp8 does not support segments: set train.precision=bf16 or train.segment_length=null",
        ),
        ([*WIDE, "train.segment_length=2048", "model.intermediate_size=8200"], "model.intermediate_size is 8200"),
        ([*WIDE, "model.intermediate_size=8200"], "multiples of 16, but model.intermediate_size is 8200"),
        (
            [*WIDE, "train.micro_batch_size=1", "train.seq_length=8"],
            "multiples of 16, but train.micro_batch_size × train.seq_length is 8",
        ),
        (["train.num_steps=0"], "train.num_steps is 0: it should be greater than or equal to 1"),
        (["train.num_steps=2.5"], "train.num_steps is 2.5: it should be a valid integer"),
        (["train.num_steps=true"], "train.num_steps is True"),
        (["optimizer.lr=-1"], "optimizer.lr is -1: it should be greater than 0"),
        (
            ["optimizer.betas=[0.9, 1.0]"],
            "optimizer.betas is [0.9, 1.0]: each value must be at least 0 and less than 1",
        ),
        (["model.attention.pattern=windw"], "model.attention.pattern is 'windw': it must be full, window, a ratio"),
        (["model.attention.pattern=[full,none]"], "model.attention.pattern is ['full', 'none']: it must be full,"),
        (["model.attention.pattern=4"], "model.attention.pattern is 4: it must be full, window"),
        (["model.attention.pattern=1:0:1"], "model.attention.pattern is '1:0:1': it must be full, window"),
        (["train.seed=010"], "train.seed is '010': it should be a valid integer"),
        (["train.num_steps=1:30"], "train.num_steps is '1:30': it should be a valid integer"),
        (
            ["wandb.mode=off"],
            "wandb.mode is False: it should be 'auto', 'online', 'offline' or 'disabled'; quote it if",
        ),
        (["model.attention.pattern=0:1"], "model.attention.pattern is '0:1': it must be full, window"),
        (["model.attention.pattern=1:0"], "list of full and window; both numbers of a ratio are at least 1"),
        (["model.attention.pattern=window"], "pattern is window, but window is null: set window"),
        (
            ["model.attention.pattern=[full,window]", "model.attention.window=9"],
            "attention.pattern is ['full', 'window']: it has 2 entries, but num_hidden_layers is",
        ),
        (["model.attention.window=9"], "model.attention: window is 9, but no layer has a window: set pattern"),
        (["model.attention.num_kept=4"], "model.attention: num_kept is 4, but no layer has a window: set pattern"),
        ([*WINDOW, "model.attention.window=0"], "model.attention.window is 0: it must be a number of tokens"),
        ([*WINDOW, "model.attention.window=2.5"], "model.attention.window is 2.5: it must be a number of tokens"),
        ([*WINDOW, "model.attention.window=[9]"], "model.attention.window is [9]: a range must be [low, high]"),
        ([*WINDOW, "model.attention.window=[9,9]"], "model.attention.window is [9, 9]: a range must be [low, high]"),
        ([*WINDOW, "model.attention.num_kept=0"], "attention.num_kept is 0, but the first 1 tokens are sink tokens"),
        ([*WINDOW, "model.attention.num_kep=0"], "unknown key model.attention.num_kep: did you mean model.attention."),
        (["model.atention.window=9"], "unknown key model.atention: did you mean model.attention"),
        (["train.segment_length=100"], "seq_length 2048 is not a multiple of segment_length 100"),
        (["train.segment_length=512"], "but a layer with full attention needs all keys of the sample"),
        (
            ["model.attention.pattern=3:1", "model.attention.window=9", "train.segment_length=512"],
            "but a layer with full attention needs all keys of the sample: set model.attention.pattern=window",
        ),
        (
            [*WINDOW, "model.attention.num_kept=4", "train.segment_length=512"],
            "but the windows keep 4 tokens, and only the sink tokens (1) are in every segment: set model.attention",
        ),
        ([*WINDOW, "train.segment_length=1"], "model.sink.num_tokens 1 leaves no room for text in train.segment_len"),
        (["model.sink.kind=magic"], "model.sink.kind is 'magic': it must be one of none, token"),
        (["model.num_attention_heads=5"], "128 is not a multiple of num_attention_heads 5: change one of them"),
        (["model.rotary_pct=0.1"], "rotary_pct 0.1 rotates 3 dimensions"),
        (
            ["train.seq_length=4096", "model.max_position_embeddings=2048"],
            "train.seq_length 4096 is longer than model.max_position_embeddings 2048",
        ),
        (["train.batch_size_tokens=1000"], "1000 is not a multiple of seq_length 2048: set it to 2048"),
        (["train.compile=true", "deepspeed.zero_stage=3"], "train.compile=true does not work with deepspeed"),
        (
            ["model.sink.kind=zero", "model.sink.num_tokens=2"],
            "but kind zero has no sink tokens: set it to 1",
        ),
        (["model.sink.num_tokens=3000"], "model.sink.num_tokens 3000 leaves no room"),
        (["deepspeed.gradient_clipping=1"], "gradient_clipping is derived: set optimizer.clip"),
        (["deepspeed.zero_optimization.stage=2"], "zero_optimization.stage is derived: set deepspeed.zero_stage"),
        (["deepspeed.zero_optimisation.overlap_comm=true"], "zero_optimisation: did you mean zero_optimization?"),
        (["deepspeed.foo=1"], "unknown key foo: DeepSpeed has none of this name that a run of sinklm uses; remove it"),
        (["deepspeed.nebula.enabled=true"], "nebula is not supported (DeepSpeed has removed it): remove this key"),
        (["deepspeed.elasticity.enabled=true"], "elasticity is not supported (DeepSpeed has removed it): remove"),
        (
            ["deepspeed.sequence_parallel_size=2"],
            "not supported (sinklm has data parallelism only): remove this key",
        ),
        (
            ["deepspeed.data_efficiency.enabled=true"],
            "data_efficiency is not supported (sinklm reads the data itself",
        ),
        (["deepspeed.zero_stages=2"], "unknown key zero_stages: did you mean zero_stage?"),
        (
            ["deepspeed.offload_optimizer={device: cpu}"],
            "offload_optimizer has no effect here: set deepspeed.zero_optimization.offload_optimizer",
        ),
        (["deepspeed.stage=2"], "stage has no effect here: set deepspeed.zero_stage"),
        (["deepspeed.round_robin_gradients=true"], "round_robin_gradients has no effect here: remove this key; with"),
        (
            ["deepspeed.stage3_max_live_parameters=9"],
            "has no effect here: set deepspeed.zero_optimization.stage3_max_live_parameters",
        ),
        (
            ["deepspeed.zero_stage=2", "deepspeed.zero_optimization.cpu_offload_param=true"],
            "zero_optimization.cpu_offload_param has no effect with deepspeed.zero_stage=2: set 3 or more",
        ),
        (
            ["deepspeed.activation_checkpointing={partition_activations: true}"],
            "activation_checkpointing is derived: remove this key, and set train.activation_checkpointing",
        ),
        (
            ["deepspeed.zero_stage=0", "deepspeed.zero_optimization.offload_optimizer={device: cpu}"],
            "zero_optimization.offload_optimizer has no effect with deepspeed.zero_stage=0: set 1 or more",
        ),
        (
            ["deepspeed.zero_stage=2", "deepspeed.zero_optimization.offload_param={device: cpu}"],
            "zero_optimization.offload_param has no effect with deepspeed.zero_stage=2: set 3 or more",
        ),
        (
            ["deepspeed.zero_stage=2", "deepspeed.zero_optimization.stage3_max_live_parameters=1000"],
            "zero_optimization.stage3_max_live_parameters has no effect with deepspeed.zero_stage=2: set 3 or more",
        ),
        (
            ["deepspeed.zero_optimization.sub_group_size=1000"],
            "zero_optimization.sub_group_size has no effect with deepspeed.zero_stage=1: set 3 or more",
        ),
        (
            ["deepspeed.zero_optimization.round_robin_gradients=true"],
            "round_robin_gradients is derived: remove this key",
        ),
        (["deepspeed.zero_optimization={1: 2}"], "zero_optimization.1: no key of DeepSpeed has such a name"),
        (["data.weights={a:0}"], "data.weights.a:0 has no value: write a space after the colon"),
        (["optimizer={lr:1}"], "optimizer.lr:1 has no value: write a space after the colon"),
        (["deepspeed.bf16.enabled=false"], "bf16.enabled is derived: set train.precision"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage is 4: it should be 0, 1, 2 or 3"),
        (["train.num_steps"], "'train.num_steps' is not an override: write section.key=value"),
        (["--num_steps=3"], "'--num_steps=3' is not an override"),
        (["train.seed=[1"], "train.seed: the value is not valid YAML"),
        (["train.seed=!!int ''"], "train.seed: the value is not valid YAML"),
        (["train.seed=" + "[" * 100_000], "train.seed: the value is not valid YAML (it is nested too deeply)"),
    ],
)
def test_a_mistake_is_named(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config("pythia-14m", overrides)


def test_texts_that_older_yaml_reads_as_numbers_of_another_base_stay_texts(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: pythia-14m\nwandb: {name: 12:30, tags: [&a 010, *a, 1:2:3]}\ndata: {weights: {3:1: 0.5}}")
    config = load_config(str(path), ["train.run_dir=007", "optimizer.lr=1e-3", "train.num_steps=1_000"])
    assert (config.wandb.name, config.wandb.tags) == ("12:30", ["010", "010", "1:2:3"])
    assert (config.data.weights, config.train.run_dir) == ({"3:1": 0.5}, "007")
    assert (config.optimizer.lr, config.train.num_steps) == (1e-3, 1000)
    again = tmp_path / "again.yaml"
    again.write_text(config_yaml(config))
    assert load_config(str(again)) == config


def test_every_mistake_is_named_at_once():
    with pytest.raises(ValueError, match=r"train\.seed is(.|\n)*unknown key train\.sed"):
        load_config("pythia-14m", ["train.seed=-1", "train.sed=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", "is not valid YAML"),
        ("model: !!int ''", "is not valid YAML"),
        ("- 1", "must consist of sections"),
        ("model: {hidden_size: 8}", "model.num_hidden_layers is not set"),
        ("base: bad.yaml", "is its own base"),
        ("base: 3", "base is 3, but it must be the name or path of a recipe"),
        ("base: pythia-15m", "did you mean pythia-"),
        ("train: {seed: '${nothing}'}", "nothing"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load_config(str(path))


def test_a_recipe_that_does_not_exist_is_named():
    with pytest.raises(
        FileNotFoundError,
        match=r"there is no recipe 'pythia-160': did you mean pythia-160m, continue/pythia-160m, "
        r"retrofit/pythia-160m, retrofit/pythia-160m-frozen or windows/pythia-160m\?",
    ):
        load_config("pythia-160")
    with pytest.raises(FileNotFoundError, match=r"recipe runs/mine\.yaml: no such file"):
        load_config("runs/mine.yaml")


def test_the_folder_of_a_run_is_its_recipe(tmp_path):
    config = load_config("pythia-14m", ["train.num_steps=7", "train.run_dir=elsewhere"])
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/step-4"
    checkpoint.mkdir(parents=True)
    for folder in (run, checkpoint):
        (folder / "config.yaml").write_text(config_yaml(config))
    (checkpoint / "state.json").touch()
    train = load_config(str(run), ["train.seed=3"]).train
    assert (train.num_steps, train.seed, train.run_dir) == (7, 3, str(run))
    with pytest.raises(ValueError, match=f"is a checkpoint: to resume its run, pass {run};"):
        load_config(str(checkpoint))
    for path, hint in ((tmp_path, "this folder has no config.yaml"), (tmp_path / "runn", f"did you mean {run}")):
        with pytest.raises(FileNotFoundError, match=f"there is no recipe '{path}': {hint}"):
            load_config(str(path))


def test_every_key_is_documented_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    documented = {}
    table = page.partition("\n## Keys\n")[2].partition("\n### ")[0]
    for cell, default in re.findall(r"^\| (`[^…|]*) \|([^|]*)\|", table, re.MULTILINE):
        names = re.findall(r"`([\w.]+)`", cell)
        defaults = default.split(", ") if len(names) > 1 else [default]
        documented |= dict(zip(names, defaults, strict=True))
    keys = {key.name: key.default or "" for section in key_sections() for key in section.keys}
    assert documented.keys() == keys.keys()
    for name, default in keys.items():
        assert value_of(documented[name]) == value_of(default), name


def value_of(text: str) -> Any:
    """Return the value of YAML, with numbers such as 1e-8, which YAML takes for text."""
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)
