"""Stopped runs resume bit for bit; checkpoints are not mixed up or lost."""

import errno
import json
import os
import re
import resource
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.folders import list_checkpoints
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import engine
from sinklm.train.run import locked_run, train

from ..checkpoints.seal import seal
from .tiny import assert_same_weights, copy_checkpoint, edit_state, losses, make_store, metrics, weights


@pytest.fixture
def stopped_run(whole_run, tmp_path) -> Path:
    """The same run as it was after step 4."""
    copy_checkpoint(whole_run, 4, tmp_path / "run")
    return tmp_path / "run"


def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(recipe, whole_run, stopped_run):
    train(recipe, [f"train.run_dir={stopped_run}"])
    assert losses(stopped_run) == losses(whole_run)
    assert list(losses(stopped_run)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert_same_weights(weights(stopped_run, 8), weights(whole_run, 8))
    timeless = [
        {k: v for k, v in line.items() if k in ("step", "loss", "grad_norm", "lr", "validation_loss")}
        for run in (stopped_run, whole_run)
        for line in metrics(run)
    ]
    assert timeless[: len(timeless) // 2] == timeless[len(timeless) // 2 :]


def test_another_micro_batch_size_is_the_same_run_to_rounding(recipe, whole_run, stopped_run):
    train(recipe, [f"train.run_dir={stopped_run}", "train.micro_batch_size=8"])
    assert list(losses(stopped_run).values()) == pytest.approx(list(losses(whole_run).values()), abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "precision", "is_recorded"),
    [
        (0, "fp32", True),
        pytest.param(1, "bf16", True, marks=pytest.mark.long),
        (1, "fp32", False),
        (3, "fp32", True),
    ],
)
def test_an_optimizer_in_another_order_is_loaded_by_name(
    recipe, tmp_path, capsys, monkeypatch, stage, precision, is_recorded
):
    """`EVEN_SIZE` puts `sink_logit` after the biases; with 1 it stays among them."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = ["model.sink.kind=logit", f"deepspeed.zero_stage={stage}", f"train.precision={precision}"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "EVEN_SIZE", 1)
        train(recipe, [*settings, f"train.run_dir={whole}"])
    copy_checkpoint(whole, 4, resumed)
    if not is_recorded:
        edit_state(resumed / "checkpoints" / "step-4", optimizer_layout=None)
    train(recipe, [*settings, f"train.run_dir={resumed}"])
    assert list(losses(resumed).values()) == pytest.approx(list(losses(whole).values()), abs=1e-5)
    assert "parameter order" in capsys.readouterr().out


def test_zero_3_goes_on_in_sub_groups_of_another_size(recipe, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = ["deepspeed.zero_stage=3", "train.precision=fp32"]
    train(recipe, [*settings, f"train.run_dir={whole}", "deepspeed.zero_optimization.sub_group_size=3000"])
    copy_checkpoint(whole, 4, resumed)
    train(recipe, [*settings, f"train.run_dir={resumed}"])
    assert list(losses(resumed).values()) == pytest.approx(list(losses(whole).values()), abs=1e-5)


def test_the_longest_sequence_is_the_same_whether_it_is_named_or_not(recipe, whole_run, stopped_run):
    train(recipe, [f"train.run_dir={stopped_run}", "model.max_position_embeddings=null"])
    assert losses(stopped_run) == losses(whole_run)


def test_a_longer_longest_sequence_changes_no_weight(recipe, whole_run, stopped_run, capsys):
    train(recipe, [f"train.run_dir={stopped_run}", "model.max_position_embeddings=64"])
    assert losses(stopped_run) == losses(whole_run)
    assert "model.max_position_embeddings: 32 → 64" in capsys.readouterr().out


def test_a_finished_run_stays_finished(recipe, whole_run, tmp_path, capsys):
    copy_checkpoint(whole_run, 8, tmp_path)
    train(recipe, [f"train.run_dir={tmp_path}"])
    assert losses(tmp_path) == losses(whole_run)
    assert "all 8 steps are done" in capsys.readouterr().out


def test_a_run_leaves_no_trace_of_its_ranks(whole_run):
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)


def test_the_saved_model_is_an_ordinary_folder(whole_run, store):
    model = load_model(whole_run)
    assert isinstance(model, SinkGPTNeoXForCausalLM)
    assert model.config.num_sinks == 1
    assert load_tokenizer(whole_run).decode(load_tokenizer(whole_run)("on a").input_ids) == "on a"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert torch.isfinite(loss)
    folder = whole_run / "checkpoints" / "step-8" / "model"
    tokenizer = load_tokenizer(folder)
    assert tokenizer("on a").input_ids == Tokenizer.from_file(str(store / "tokenizer.json")).encode("on a").ids
    assert tokenizer.convert_tokens_to_ids("<|sink|>") == model.config.sink_token_ids[0]
    tokenizer.add_special_tokens({"pad_token": "<|fine-tuning pad|>"})
    assert tokenizer.pad_token_id == model.config.sink_token_ids[0] + 1
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_the_run_folder_describes_the_run(whole_run):
    assert "hidden_size: 32" in (whole_run / "config.yaml").read_text()
    environment = json.loads((whole_run / "environment.json").read_text())
    assert environment["torch"] == version("torch")
    assert {line["step"] for line in metrics(whole_run) if "validation_loss" in line} == {4, 8}
    state = json.loads((whole_run / "checkpoints" / "step-4" / "state.json").read_text())
    assert (state["step"], state["positions"], state["world_size"]) == (4, 4 * 256, 1)


# -- incomplete and damaged checkpoints ------------------------------------------------------------


def test_an_interrupted_checkpoint_is_passed_over(recipe, whole_run, stopped_run, capsys):
    interrupted = stopped_run / "checkpoints" / "step-6"
    shutil.copytree(whole_run / "checkpoints" / "step-8", interrupted)
    (interrupted / "COMPLETE").unlink()
    train(recipe, [f"train.run_dir={stopped_run}"])
    output, notes = capsys.readouterr()
    assert "resuming from" in output
    assert "initial weights" not in output
    assert "loading DeepSpeed …" in notes
    assert "step-4 (step 4)" in output
    assert "step-6, which was interrupted" in output
    assert losses(stopped_run) == losses(whole_run)


def test_an_interrupted_checkpoint_cannot_be_named(recipe, whole_run, tmp_path):
    interrupted = tmp_path / "step-4"
    shutil.copytree(whole_run / "checkpoints" / "step-4", interrupted)
    (interrupted / "COMPLETE").unlink()
    with pytest.raises(ValueError, match="interrupted checkpoint"):
        train(recipe, [f"train.run_dir={tmp_path / 'new'}", f"checkpoint.resume={interrupted}"])


def test_a_checkpoint_of_a_later_format_is_refused(recipe, stopped_run):
    edit_state(stopped_run / "checkpoints" / "step-4", format_version=3)
    with pytest.raises(ValueError, match=r"state\.json has format_version 3, this sinklm reads up to 2"):
        train(recipe, [f"train.run_dir={stopped_run}"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"train: [", "while parsing"), (b"[" * 100_000, "nested too deeply"), (b"\xff", "can't decode")],
)
def test_a_damaged_recipe_of_a_checkpoint_is_named(recipe, stopped_run, text, reason):
    checkpoint = stopped_run / "checkpoints" / "step-4"
    (checkpoint / "config.yaml").write_bytes(text)
    seal(checkpoint)
    with pytest.raises(ValueError, match=rf"step-4/config\.yaml is not a valid recipe \(.*{reason}.*\): restore it"):
        train(recipe, [f"train.run_dir={stopped_run}"])


def test_init_from_may_change_only_after_step_0(recipe, whole_run, tmp_path):
    began = [f"train.run_dir={tmp_path}", "checkpoint.pythia_steps=true", "train.num_steps=2"]
    train(recipe, [*began, f"model.init_from={whole_run}"])
    for step in list_checkpoints(tmp_path):
        if step:
            shutil.rmtree(tmp_path / "checkpoints" / f"step-{step}")
    with pytest.raises(ValueError, match=r"model\.init_from is None, but .*step-0 was trained with .*: restore that"):
        train(recipe, began)


def test_a_full_disk_leaves_the_older_checkpoint(recipe, whole_run, tmp_path):
    """A limit on file sizes simulates a full disk: the weights do not fit, smaller files do."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    copy_checkpoint(whole_run, 4, tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(
            ValueError, match=rf"cannot save {tmp_path}/checkpoints/step-8 \(earlier checkpoints are intact\)"
        ):
            train(recipe, [f"train.run_dir={tmp_path}", "checkpoint.keep=1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(list_checkpoints(tmp_path)) == [4]
    train(recipe, [f"train.run_dir={tmp_path}"])
    assert_same_weights(weights(tmp_path, 8), weights(whole_run, 8))


# -- kept checkpoints ------------------------------------------------------------------------------


def test_of_a_linked_checkpoint_only_the_link_is_deleted(recipe, whole_run, tmp_path):
    archive, run = tmp_path / "archive", tmp_path / "run"
    copy_checkpoint(whole_run, 4, archive)
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-4").symlink_to(archive / "checkpoints" / "step-4")
    train(recipe, [f"train.run_dir={run}", "checkpoint.keep=1"])
    assert list(list_checkpoints(run)) == [8]
    assert list(list_checkpoints(archive)) == [4]
    assert not (run / "checkpoints" / "step-4").is_symlink()


def test_the_newest_checkpoints_are_kept_and_pythias_always(recipe, tmp_path):
    often = ["checkpoint.every_steps=1", "checkpoint.keep=2", "validation.every_steps=null", "train.num_steps=6"]
    train(recipe, [f"train.run_dir={tmp_path / 'a'}", *often])
    assert list(list_checkpoints(tmp_path / "a")) == [5, 6]
    assert not list((tmp_path / "a" / "checkpoints").glob("step-1*"))
    train(recipe, [f"train.run_dir={tmp_path / 'b'}", *often, "checkpoint.pythia_steps=true"])
    assert list(list_checkpoints(tmp_path / "b")) == [0, 1, 2, 4, 5, 6]


def test_a_run_can_go_on_from_step_0_and_from_another_folder(recipe, whole_run, tmp_path):
    settings = ["checkpoint.pythia_steps=true", "checkpoint.keep=null"]
    train(recipe, [f"train.run_dir={tmp_path / 'a'}", *settings, "train.num_steps=8"])
    start = tmp_path / "a" / "checkpoints" / "step-0"
    train(recipe, [f"train.run_dir={tmp_path / 'b'}", f"checkpoint.resume={start}"])
    assert losses(tmp_path / "b") == losses(whole_run)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.seed=8", "train.seed is 8"),
        ("train.batch_size_tokens=512", "train.batch_size_tokens is 512"),
        ("train.seq_length=16", "train.seq_length is 16"),
        ("model.num_hidden_layers=3", "model.num_hidden_layers is 3"),
        ("model.sink.num_tokens=2", "model.sink.num_tokens is 2"),
    ],
)
def test_another_run_is_not_resumed(recipe, stopped_run, override, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        train(recipe, [f"train.run_dir={stopped_run}", override])


def test_all_settings_of_another_run_are_named(recipe, stopped_run):
    other = ["model.num_hidden_layers=3", "train.seed=8", "model.sink.kind=none", "optimizer.lr=0.5"]
    said = (  # not model.attention.…, which follow from them
        f"model.num_hidden_layers is 3, but {stopped_run}/checkpoints/step-4 was trained with 2; model.sink.kind is "
        "'none', but was 'token'; train.seed is 8, but was 7: restore these values, or start a new run with another "
        "train.run_dir"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        train(recipe, [f"train.run_dir={stopped_run}", *other])


def test_a_named_checkpoint_of_another_run_can_be_begun_from(recipe, whole_run, tmp_path):
    path = whole_run / "checkpoints" / "step-8"
    remedy = (
        rf"restore that value, or set checkpoint\.resume=auto and model\.init_from={path} to begin with its weights$"
    )
    with pytest.raises(ValueError, match=rf"^train\.seed is 8, but {path} was trained with 7: {remedy}"):
        train(recipe, [f"train.run_dir={tmp_path}", f"checkpoint.resume={whole_run}", "train.seed=8"])


def test_a_resumed_run_does_not_read_the_model_that_it_started_from(recipe, whole_run, tmp_path):
    copy_checkpoint(whole_run, 4, tmp_path)
    train(recipe, [f"train.run_dir={tmp_path}", "model.init_from=/nowhere"])
    assert_same_weights(weights(tmp_path, 8), weights(whole_run, 8))


def test_other_data_is_refused(recipe, stopped_run, tmp_path):
    other = make_store(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"data\.path .* contains different data"):
        train(recipe, [f"train.run_dir={stopped_run}", f"data.path={other}"])


def test_a_change_that_is_allowed_is_reported(recipe, stopped_run, capsys):
    train(recipe, [f"train.run_dir={stopped_run}", "optimizer.lr=0.02"])
    assert "changed since the checkpoint: optimizer.lr: 0.01 → 0.02" in capsys.readouterr().out
    assert metrics(stopped_run)[-1]["step"] == 8


def test_never_resuming_does_not_mix_two_runs(recipe, stopped_run):
    with pytest.raises(ValueError, match=r"already contains checkpoints up to step 4: set checkpoint\.resume=auto"):
        train(recipe, [f"train.run_dir={stopped_run}", "checkpoint.resume=never"])


def test_going_back_in_time_does_not_mix_two_runs(recipe, whole_run):
    old = whole_run / "checkpoints" / "step-4"
    with pytest.raises(ValueError, match="contains a checkpoint at step 8, which is later than the one to resume from"):
        train(recipe, [f"train.run_dir={whole_run}", f"checkpoint.resume={old}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=null"], "data.path is not set"),
        (["data.path=/nowhere"], "/nowhere: no such folder"),
        (["checkpoint.resume=/nowhere"], "checkpoint.resume=/nowhere: no such folder"),
        (["model.vocab_size=200"], "model.vocab_size 200 is too small for a tokenizer"),
        (["model.init_from=/nowhere"], "/nowhere: no such folder"),
        (
            [
                "validation.every_steps=1",
                "train.seq_length=5000",
                "model.max_position_embeddings=null",
                "train.batch_size_tokens=20000",
            ],
            "(to disable validation: validation.every_steps=null)",
        ),
    ],
)
def test_a_run_that_cannot_start_says_why(recipe, tmp_path, overrides, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        train(recipe, [f"train.run_dir={tmp_path / 'run'}", *overrides])


def test_a_dry_run_reports_a_missing_split(recipe, store, tmp_path):
    without = tmp_path / "store"
    shutil.copytree(store, without)
    manifest = json.loads((without / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    (without / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"no split 'validation'.*to disable validation: validation\.every_steps=null"):
        train(recipe, [f"data.path={without}"], only_describe=True)


def test_two_trainings_do_not_share_a_folder(recipe, stopped_run):
    before = metrics(stopped_run)
    with locked_run(stopped_run), pytest.raises(ValueError, match=rf"train.run_dir={stopped_run} is in use by another"):
        train(recipe, [f"train.run_dir={stopped_run}"])
    assert metrics(stopped_run) == before
    train(recipe, [f"train.run_dir={stopped_run}"])


def test_a_file_system_without_locks_locks_no_folder(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked_run(tmp_path), locked_run(tmp_path):
        pass


def test_a_damaged_store_is_refused(recipe, store, tmp_path):
    broken = tmp_path / "store"
    shutil.copytree(store, broken)
    path = next((broken / "train").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        train(recipe, [f"train.run_dir={tmp_path / 'run'}", f"data.path={broken}"])


# -- warm start ------------------------------------------------------------------------------------


def test_a_warm_start_begins_where_the_other_run_ended(recipe, whole_run, tmp_path):
    train(recipe, [f"train.run_dir={tmp_path}", f"model.init_from={whole_run}", "train.seed=99", "optimizer.lr=1e-9"])
    for name, weight in weights(tmp_path, 8).items():
        torch.testing.assert_close(weight, weights(whole_run, 8)[name], atol=1e-6, rtol=0)


def test_a_warm_start_from_another_size_is_refused(recipe, whole_run, tmp_path):
    with pytest.raises(ValueError, match=r"model\.num_hidden_layers is 1, but model\.init_from=.* has 2"):
        train(recipe, [f"train.run_dir={tmp_path}", f"model.init_from={whole_run}", "model.num_hidden_layers=1"])


def test_a_warm_start_from_another_tokenizer_is_refused(recipe, whole_run, tmp_path):
    store = make_store(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"model\.init_from=.* was trained with another tokenizer: its token \d+ is '"):
        train(recipe, [f"train.run_dir={tmp_path / 'run'}", f"model.init_from={whole_run}", f"data.path={store}"])


def test_an_arm_starts_from_a_model_without_one_and_resumes(recipe, whole_run, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    arm = ["model.sink.kind=kv_bias", f"model.init_from={whole_run}"]
    train(recipe, [*arm, f"train.run_dir={whole}"])
    copy_checkpoint(whole, 4, resumed)
    train(recipe, [*arm, f"train.run_dir={resumed}"])
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed, 8), weights(whole, 8))
    assert weights(whole, 8)["gpt_neox.layers.0.attention.sink_value"].any()
    with pytest.raises(
        ValueError, match=r"sink\.kind is gate, but model\.init_from=.* was trained with kv_bias: set mod"
    ):
        train(recipe, ["model.sink.kind=gate", f"model.init_from={whole}", f"train.run_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.rotary_pct=0.5", r"model\.rotary_pct is 0\.5, but model\.init_from=.* has 0\.25"),
        ("model.rope_theta=500.0", r"model\.rope_theta is 500\.0, but"),
        ("model.parallel_residual=false", r"model\.parallel_residual is False, but"),
    ],
)
def test_weights_that_would_load_but_compute_otherwise_are_refused(recipe, whole_run, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(recipe, [f"train.run_dir={tmp_path}", f"model.init_from={whole_run}", override])
