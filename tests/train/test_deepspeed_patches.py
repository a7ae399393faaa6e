"""The patches of DeepSpeed: which are disabled automatically, and which raise an error."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime import torch_autocast

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import deepspeed_patches
from sinklm.train.engine import deepspeed_config, make_engine
from sinklm.train.launch import connected
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.run import train
from sinklm.versions import TESTED

from .tiny import losses

BF16 = "train.precision=bf16"


@pytest.fixture(scope="module", autouse=True)
def _connected() -> None:
    """Process groups with all patches, without which DeepSpeed may compile its all-reduce."""
    with connected():
        pass


@pytest.fixture
def untested(monkeypatch) -> None:
    """A version of DeepSpeed that the patches were not tested with."""
    monkeypatch.setitem(TESTED, "deepspeed", ("0.1.2", "0.1.2"))


def fused_update_of(recipe: str, *overrides: str):
    plan = Plan(load_config(recipe, [BF16, *overrides]), 1, 300)
    with connected(patches=plan.config.deepspeed.patches) as world:
        return make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device).fused_update


def test_an_untested_version_is_named_and_trains_without_the_optional_patches(recipe, untested, tmp_path):
    with pytest.warns(RuntimeWarning, match=f"DeepSpeed {deepspeed.__version__} was not tested") as caught:
        train(recipe, [BF16, f"train.run_dir={tmp_path}"])
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 3
    assert "all-reduce" in messages[0]
    assert "1 to 2 s longer" in messages[1]
    assert "5 to 10 % longer" in messages[2]
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_deepspeed_reduces_gradients_itself_if_a_key_says_how(recipe):
    assert fused_update_of(recipe) is not None
    assert fused_update_of(recipe, "deepspeed.communication_data_type=fp32") is None


def test_a_section_that_deepspeed_cannot_use_is_one_error(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"DeepSpeed cannot use the section deepspeed \(.*tensorboard.*\): correct or"):
        fused_update_of(recipe, "deepspeed.tensorboard.enabled=true")


def test_another_rank_does_not_repeat_the_warning(untested):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepspeed_patches.skip_op_build(is_main=False)


@pytest.mark.usefixtures("untested")
def test_the_recipe_turns_the_optional_patches_off_and_silences_the_warning(recipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert fused_update_of(recipe, "deepspeed.patches=false") is None


def test_the_key_is_not_passed_to_deepspeed(recipe):
    for value in ("true", "false"):
        plan = Plan(load_config(recipe, [f"deepspeed.patches={value}"]), 1, 300)
        assert "patches" not in deepspeed_config(plan)


def test_a_process_whose_state_cannot_be_reset_makes_one_engine(monkeypatch):
    monkeypatch.delattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED")
    monkeypatch.setattr(deepspeed_patches, "_has_made_engine", False)
    deepspeed_patches.reset_process()
    with pytest.raises(ValueError, match=r"has no torch_autocast\.\w+: run each training in its own process"):
        deepspeed_patches.reset_process()


def test_an_optimizer_whose_clip_cannot_be_set_is_not_resumed(recipe):
    engine = SimpleNamespace(
        basic_optimizer=torch.optim.AdamW([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}]),
        optimizer=SimpleNamespace(),
    )
    settings = load_config(recipe).optimizer
    deepspeed_patches.restore_settings(engine, settings, zero_stage=0)
    with pytest.raises(ValueError, match=r"SimpleNamespace\.clip_grad, which resuming needs: install deepspeed=="):
        deepspeed_patches.restore_settings(engine, settings, zero_stage=1)


def test_the_files_of_a_checkpoint_are_collected_and_not_written(tmp_path):
    class Files:
        def save(self, state_dict: dict, path: str) -> None:
            raise AssertionError("written")

    class Engine:
        def __init__(self) -> None:
            self.checkpoint_engine = Files()

        def _copy_recovery_script(self, path: str) -> None:
            raise AssertionError("written")

        def save_checkpoint(self, folder: Path, *, tag: str, client_state: dict, save_latest: bool) -> None:
            self.checkpoint_engine.save(state_dict=client_state, path=f"{folder}/{tag}/a.pt")
            self.checkpoint_engine.save({"b": 2}, f"{folder}/{tag}/b.pt")
            self._copy_recovery_script(str(folder))

    engine = Engine()
    files = deepspeed_patches.collect_files(engine, tmp_path, "deepspeed", {"a": 1})
    assert files == [(tmp_path / "deepspeed/a.pt", {"a": 1}), (tmp_path / "deepspeed/b.pt", {"b": 2})]
    assert not {"save", "_copy_recovery_script"} & {*vars(engine.checkpoint_engine), *vars(engine)}
    del engine.checkpoint_engine
    with pytest.raises(ValueError, match=r"has no checkpoint_engine\.save, which saving needs: install deepspeed=="):
        deepspeed_patches.collect_files(engine, tmp_path, "deepspeed", {})
