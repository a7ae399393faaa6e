"""What a run takes from ``model.init_from``: checked and said by a dry run, and at the start."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sinklm.checkpoints import load_tokenizer, warm_start
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.warm_start import Source
from sinklm.models import SinkGPTNeoXConfig
from sinklm.train.recipe import load_config
from sinklm.train.run import train

from ..checkpoints.pythia import write_pythia
from .tiny import copy_checkpoint, prepare_here

MODEL = ["model.hidden_size=64", "model.num_attention_heads=4", "model.vocab_size=384"]
WEIGHTS = "model.safetensors"
NORM = "gpt_neox.final_layer_norm.bias"


@pytest.fixture(scope="module")
def pythia(store, tmp_path_factory) -> Path:
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    return write_pythia(tmp_path_factory.mktemp("hub") / "pythia", vocab_size=384, tokenizer=tokenizer)


@pytest.fixture
def copy(pythia, tmp_path) -> Path:
    return Path(shutil.copytree(pythia, tmp_path / "copy"))


@pytest.fixture
def dry_run(recipe, monkeypatch, capsys):
    """A function that returns what a dry run prints, in one line. It reads no weights."""
    monkeypatch.setattr(warm_start, "from_pretrained", None)

    def run(folder: object, *settings: str) -> str:
        train(recipe, [*MODEL, f"model.init_from={folder}", *settings], only_describe=True)
        return " ".join(capsys.readouterr().out.split())

    return run


def edit_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / WEIGHTS, {"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "no folder": (shutil.rmtree, "no such folder; check the path$"),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        r"contains neither a transformers model .* nor a training checkpoint: check the path$",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), rf"has no file named {WEIGHTS}\); check its files$"),
    "truncated weights": (lambda folder: truncate(folder / WEIGHTS), "are damaged .*incomplete metadata.*: copy them"),
    "a pointer": (
        lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"pointer of Git LFS",
    ),
    "a missing tensor": (lambda folder: edit_weights(folder, NORM, None), f"lack {NORM}, which its config.json"),
    "another shape": (
        lambda folder: edit_weights(folder, NORM, torch.zeros(63)),
        rf"have {NORM} of shape \(63,\), but the model of its config.json needs \(64,\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_found_by_a_dry_run_and_before_the_start(recipe, copy, dry_run, damage, message):
    damage(copy)
    with pytest.raises((ValueError, OSError), match=rf"^model\.init_from={copy}: .*{message}") as error:
        dry_run(copy)
    run = copy.parent / "run"
    with pytest.raises((ValueError, OSError), match=re.escape(str(error.value))):
        train(recipe, [*MODEL, f"model.init_from={copy}", f"train.run_dir={run}"])
    assert not (run / "config.yaml").exists()


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors"])
def test_all_forms_of_a_model_are_read(store, dry_run, tmp_path, form):
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    folder = write_pythia(tmp_path / "model", form, vocab_size=384, tokenizer=tokenizer)
    assert f"start all weights of {folder}, with a new sink token" in dry_run(folder)


def test_all_sizes_to_set_are_named_at_once(pythia, dry_run):
    wrong = ["model.hidden_size=32", "model.num_attention_heads=2", "model.intermediate_size=8"]
    with pytest.raises(ValueError, match=r"^model\.hidden_size is 32, model\.num_attention_heads is 2, ") as error:
        dry_run(pythia, *wrong)
    remedy = str(error.value).partition(": set ")[2].split()
    assert remedy == ["model.hidden_size=64", "model.num_attention_heads=4", "model.intermediate_size=256"]
    assert "start all weights of" in dry_run(pythia, *wrong, *remedy)


@pytest.mark.parametrize(
    ("theirs", "ours", "taken"),
    [
        (0, {"kind": "none"}, ""),
        (2, {"kind": "none"}, ", without its sink tokens"),
        (1, {"kind": "zero"}, ", without its sink token"),
        (0, {"kind": "logit"}, "; the parameters of sink.kind logit are new"),
        (1, {"kind": "kv_bias"}, ", without its sink token; the parameters of sink.kind kv_bias are new"),
        ("gate", {"kind": "gate"}, ""),
        (0, {"num_tokens": 1}, ", with a new sink token, which starts at the mean of the embedding"),
        (
            0,
            {"num_tokens": 3},
            ", with 3 new sink tokens, the first starts at the mean of the embedding, the others at",
        ),
        (1, {"num_tokens": 1}, ", with the row of its sink token"),
        (4, {"num_tokens": 2}, ", with the rows of its sink tokens (2 of 4)"),
        (1, {"num_tokens": 2}, ", with the row of its sink token and a new sink token, which starts at the mean"),
    ],
)
def test_what_is_taken_is_said(theirs, ours, taken):
    num_sinks = 0 if theirs == "gate" else theirs
    sink = {"kind": "gate"} if theirs == "gate" else {"kind": "token", "num_tokens": theirs} if theirs else {}
    source = Source("pythia", SinkGPTNeoXConfig(sink=sink), num_sinks)
    said = source.describe(SinkGPTNeoXConfig(sink={"kind": "token"} | ours))
    assert said.startswith(f"all weights of pythia{taken}")
    assert "random" in said or said.removeprefix(f"all weights of pythia{taken}") in ("", " of the embedding")


def test_training_the_sinks_of_a_model_alone_is_said(whole_run, dry_run):
    frozen = ["train.only_sinks=true", "deepspeed.zero_stage=0", "model.hidden_size=32", "model.num_attention_heads=2"]
    said = dry_run(whole_run, *frozen)
    assert "AdamW for 32 parameters: the row of the sink token " in said
    assert f"all weights of {whole_run}/checkpoints/step-8/model, with the row of its sink token " in said
    assert "train.only_sinks begins with its sink: for a new one, start from a model without a sink" in said


def test_without_data_the_tokenizer_is_that_of_the_model(pythia, whole_run, dry_run):
    derived = ["data.path=null", "model.vocab_size=null"]
    assert "assuming the tokenizer of model.init_from, 300 ids" in dry_run(pythia, *derived)
    sizes = ["model.hidden_size=32", "model.num_attention_heads=2"]
    assert "assuming the tokenizer of model.init_from, 300 ids" in dry_run(whole_run, *derived, *sizes)


def test_without_a_tokenizer_the_embedding_leaves_room_for_the_sinks(copy, dry_run):
    (copy / "tokenizer.json").unlink()
    said = dry_run(copy, "data.path=null", "model.vocab_size=null", "model.sink.num_tokens=2")
    assert "assuming the tokenizer of model.init_from, 382 ids" in said


def test_a_model_that_is_not_on_this_machine_is_no_error_of_a_dry_run(dry_run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = dry_run("owner/no-such-model")
    assert "Not on this machine: model.init_from=owner/no-such-model: no such folder, and the cache of the" in said


def test_a_dry_run_says_what_a_run_in_its_folder_goes_on_from(whole_run, dry_run, copy):
    sizes = [
        "model.hidden_size=32",
        "model.num_attention_heads=2",
        "model.vocab_size=null",
        f"train.run_dir={whole_run}",
        "train.num_steps=16",
    ]
    shutil.rmtree(copy)  # not read any more
    said = dry_run(copy, *sizes, "optimizer.lr=0.5")
    assert f"run {whole_run}, resumes from step-8 changed: model.init_from: None → {copy} (not read: " in said
    assert "changed: optimizer.lr: 0.01 → 0.5" in said
    other = ["train.run_dir=${oc.env:HOME}/none", f"checkpoint.resume={whole_run}"]
    said = dry_run(copy, *sizes, *other)
    assert f"run ${{oc.env:HOME}}/none, resumes from step-8 of {whole_run} changed:" in said
    with pytest.raises(ValueError, match=r"^model\.num_hidden_layers is 3, but .*step-8 was trained with 2: restore"):
        dry_run(copy, *sizes, "model.num_hidden_layers=3")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("optimizer.lr=0.5", r"8, trained with other settings \(optimizer\.lr: 0\.01 → 0\.5\): raise train\.num_steps"),
        ("train.num_steps=6", r"6: raise train\.num_steps to train further"),
    ],
)
def test_a_finished_run_does_not_pass_for_one_with_other_settings(recipe, whole_run, tmp_path, capsys, setting, reason):
    """A sweep without a folder for each run would seem to succeed."""
    run, other = tmp_path / "run", tmp_path / "other"
    copy_checkpoint(whole_run, 8, run)
    train(recipe, [f"train.run_dir={run}", "train.max_minutes=5"])
    assert "all 8 steps are done: raise train.num_steps to train further" in capsys.readouterr().out
    before = (run / "config.yaml").read_bytes()
    message = rf"step-8 has 8 steps, and train\.num_steps is {reason}"
    for only_describe in (True, False):
        with pytest.raises(ValueError, match=rf"{message}.*or start a new run with another train\.run_dir$"):
            train(recipe, [f"train.run_dir={run}", setting], only_describe=only_describe)
        resume = [f"train.run_dir={other}", f"checkpoint.resume={run}"]
        with pytest.raises(ValueError, match=rf"{message}.*or set checkpoint\.resume=auto and model\.init_from="):
            train(recipe, [*resume, setting], only_describe=only_describe)
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("only_describe", [True, False])
def test_folders_that_deepspeed_takes_for_patterns_are_refused(recipe, whole_run, tmp_path, only_describe):
    """DeepSpeed would save there, and not find what it has saved."""
    inner = Path(shutil.copytree(whole_run, tmp_path / "lr[1e-3]" / "run"))
    message = r"=.*lr\[1e-3\].* has one of the characters \* \? \[ in its absolute path, .*: rename the folder, or"
    for setting in ("train.run_dir", "checkpoint.resume"):
        with pytest.raises(ValueError, match=setting + message):
            train(recipe, [f"{setting}={inner}"], only_describe=only_describe)
    spaced = Path(shutil.copytree(whole_run, tmp_path / "größe 1" / "run"))
    train(recipe, [f"train.run_dir={spaced}"], only_describe=only_describe)


def test_the_home_folder_of_a_path_is_found(recipe, whole_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = [f"{key}=~/x" for key in ("train.run_dir", "data.path", "model.init_from", "checkpoint.resume")]
    config = load_config(recipe, overrides)
    found = {config.train.run_dir, config.data.path, config.model.init_from, config.checkpoint.resume}
    assert found == {str(tmp_path / "x")}
    assert load_config(recipe, ["wandb.name=~/x"]).wandb.name == "~/x"


@pytest.mark.parametrize("only_describe", [True, False])
def test_a_tokenizer_that_cannot_have_the_sinks_is_refused_before_training(recipe, store, tmp_path, only_describe):
    """Otherwise the first save fails."""
    tokenizer = Tokenizer.from_file(str(store / "tokenizer.json"))
    state = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    state["model"]["vocab"]["unreachable"] = size + 4
    (tmp_path / "gap.json").write_text(json.dumps(state))
    gap = prepare_here(store.parent / "corpus.jsonl", tmp_path / "gap", tokenizer=str(tmp_path / "gap.json"))
    message = rf"no token with the id {size}, but with higher ids, .* a sink token the id {size + 1}: add tokens for"
    with pytest.raises(ValueError, match=message):
        train(recipe, [f"data.path={gap}", f"train.run_dir={tmp_path / 'run'}"], only_describe=only_describe)
    plain = [f"data.path={gap}", f"train.run_dir={tmp_path / 'plain'}", "model.sink.kind=none", "train.num_steps=2"]
    train(recipe, plain, only_describe=only_describe)
    tokenizer.add_special_tokens(["<|sink|>", "<|new|>"])
    tokenizer.save(str(tmp_path / "other.json"))
    other = prepare_here(store.parent / "corpus.jsonl", tmp_path / "other", tokenizer=str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match=rf"already has the token <\|sink\|> with the id {size}, but the model's sink"):
        train(recipe, [f"data.path={other}", f"train.run_dir={tmp_path / 'run'}"], only_describe=only_describe)


def test_a_run_goes_on_with_data_prepared_with_the_tokenizer_of_a_run_or_export(recipe, whole_run, store, tmp_path):
    export = export_model(whole_run, tmp_path / "exported")
    model = next((whole_run / "checkpoints").glob("step-8")) / "model"
    for source in (export, model):
        name = source.name
        data = prepare_here(store.parent / "corpus.jsonl", tmp_path / f"store-{name}", tokenizer=str(source))
        assert Tokenizer.from_file(str(data / "tokenizer.json")).token_to_id("<|sink|>") is None
        run = [f"data.path={data}", f"model.init_from={source}", f"train.run_dir={tmp_path / f'run-{name}'}"]
        train(recipe, [*run, "train.num_steps=2"])
        assert load_tokenizer(tmp_path / f"run-{name}")("a")["input_ids"] == load_tokenizer(whole_run)("a")["input_ids"]


def test_a_run_is_not_written_into_the_folder_of_a_model(recipe, copy, dry_run):
    """Commands read a model in such a folder, and would not find that of the run."""
    before = sorted(copy.iterdir())
    message = rf"train\.run_dir={copy} is the folder of a model \(it has a config\.json\): set another train\.run_dir"
    with pytest.raises(ValueError, match=message):
        dry_run(copy, f"train.run_dir={copy}")
    with pytest.raises(ValueError, match=message):
        train(recipe, [*MODEL, f"model.init_from={copy}", f"train.run_dir={copy}"])
    assert sorted(copy.iterdir()) == before


def test_the_path_of_a_model_from_an_interpolation_is_not_printed(pythia, dry_run, monkeypatch):
    monkeypatch.setenv("MY_MODEL", str(pythia))
    said = dry_run("${oc.env:MY_MODEL}")
    assert "start all weights of ${oc.env:MY_MODEL}, with a new sink token" in said
    assert str(pythia) not in said
