"""`train.precision=fp8`: bf16 training in which the layers' products are in float8.

On a CPU, `torch._scaled_mm` computes the same products slowly.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.float8 import PRODUCTS, Float8Linear
from sinklm.train import config as config_module
from sinklm.train import engine as engine_module
from sinklm.train import run as run_module
from sinklm.train import universal
from sinklm.train.engine import check_float8
from sinklm.train.launch import connected
from sinklm.train.run import train

from .test_engine import plan_of
from .tiny import assert_same_weights, copy_checkpoint, losses, metrics, weights

SHORT = ["train.compile=false", "train.num_steps=4", "checkpoint.every_steps=2"]
SHORT += ["train.batch_size_tokens=128", "train.micro_batch_size=2"]
FP8 = "train.precision=fp8"


@pytest.fixture(scope="module", autouse=True)
def any_size_and_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "FLOAT8_WIDTH", 0)
        if not torch.cuda.is_available():
            patch.setattr(engine_module, "check_float8", lambda device: None)
        yield


@pytest.fixture(scope="module")
def runs(recipe: str, any_size_and_device: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four steps in each precision, saved at 2 and 4."""
    folder = tmp_path_factory.mktemp("float8")
    for precision in ("bf16", "fp8"):
        train(recipe, [*SHORT, f"train.precision={precision}", f"train.run_dir={folder / precision}"])
    return {precision: folder / precision for precision in ("bf16", "fp8")}


def test_the_loss_is_almost_that_of_bf16(runs):
    bf16, fp8 = (list(losses(run).values()) for run in runs.values())
    assert fp8 != bf16
    assert fp8 == pytest.approx(bf16, abs=0.03)


def test_saved_weights_have_the_names_and_dtypes_of_bf16(runs):
    bf16, fp8 = (weights(run, 4) for run in runs.values())
    assert {name: weight.dtype for name, weight in fp8.items()} == {name: weight.dtype for name, weight in bf16.items()}


def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(recipe, runs, tmp_path):
    copy_checkpoint(runs["fp8"], 2, tmp_path)
    train(recipe, [*SHORT, FP8, f"train.run_dir={tmp_path}"])
    assert losses(tmp_path) == losses(runs["fp8"])
    assert_same_weights(weights(tmp_path, 4), weights(runs["fp8"], 4))


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp8"), ("fp8", "bf16")])
def test_a_run_changes_between_bf16_and_fp8_without_conversion(recipe, runs, tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(universal, "convert_to_universal", None)
    copy_checkpoint(runs[before], 2, tmp_path)
    train(recipe, [*SHORT, f"train.precision={after}", f"train.run_dir={tmp_path}"])
    resumed, expected = losses(tmp_path), losses(runs[before])
    assert resumed != expected
    assert list(resumed.values()) == pytest.approx(list(expected.values()), abs=0.03)


def test_validation_is_in_bf16(recipe, runs, tmp_path):
    """The validation loss of a run is the one that evaluation of its checkpoint computes."""
    copy_checkpoint(runs["fp8"], 4, tmp_path)
    more = ["train.num_steps=5", "validation.every_steps=1", "optimizer.lr=1e-30", f"train.run_dir={tmp_path}"]
    train(recipe, [*SHORT, "train.precision=bf16", *more])
    found = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert found[-1] == found[-2]


@pytest.mark.parametrize(
    "setting",
    [
        "deepspeed.zero_stage=2",
        pytest.param("train.activation_checkpointing=true", marks=pytest.mark.long),
        pytest.param("deepspeed.patches=false", marks=pytest.mark.long),
    ],
)
def test_settings_that_change_only_memory_and_speed(recipe, runs, tmp_path, setting):
    rest = ["validation.every_steps=null", "checkpoint.every_steps=null", f"train.run_dir={tmp_path}"]
    train(recipe, [*SHORT, FP8, setting, *rest])
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(runs["fp8"]).values()), abs=5e-3)


def test_only_the_products_of_the_layers_are_converted(recipe):
    plan = plan_of(recipe, *SHORT, FP8, "model.sink.kind=gate")
    with connected() as world:
        made = engine_module.make_engine(SinkGPTNeoXForCausalLM(plan.model_config), plan, world.device)
        found = [name for name, module in made.module.named_modules() if isinstance(module, Float8Linear)]
    assert len(found) == len(PRODUCTS) * plan.model_config.num_hidden_layers
    assert {name.rpartition(".")[2] for name in found} == set(PRODUCTS)
    assert all(".layers." in name for name in found)


def test_a_device_without_float8_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"train\.precision=fp8 needs a GPU, but this device is a CPU: set bf16 or fp32"
    ):
        check_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"not supported on NVIDIA A100 \(compute capability 8\.0; 8\.9 or higher"):
        check_float8(torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_run_is_refused_before_its_model_is_made_and_a_dry_run_says_so(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "_build_model", None)
    monkeypatch.setattr(engine_module, "check_float8", check_float8)
    train(recipe, [FP8], only_describe=True)
    assert "Not on this machine: train.precision=fp8 needs a GPU" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="fp8 needs a GPU, but this device is a CPU"):
        train(recipe, [FP8, f"train.run_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_repeats_itself(recipe, runs, tmp_path):
    for name in ("first", "second"):
        settings = [*SHORT, "train.compile=true", "train.deterministic=true", f"train.run_dir={tmp_path / name}"]
        train(recipe, [FP8, *settings])
    first, second, eager = (losses(run) for run in (tmp_path / "first", tmp_path / "second", runs["fp8"]))
    assert first == second
    assert_same_weights(weights(tmp_path / "first", 4), weights(tmp_path / "second", 4))
    assert list(first.values()) == pytest.approx(list(eager.values()), abs=0.02)
