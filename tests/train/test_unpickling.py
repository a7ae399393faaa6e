"""Checkpoints cannot run code: pickles that would are refused, with and without conversion."""

import copyreg
import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from sinklm.train.run import train
from sinklm.train.unpickling import (
    DEEPSPEED_CLASSES,
    deepspeed_classes,
    pickle_enums_by_value,
    refused_names,
    restricted_unpickling,
)

from ..checkpoints.seal import seal
from .tiny import copy_checkpoint, losses


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


def poison(path: Path, mark: Path) -> None:
    """Add a payload to a file of torch.save, which creates ``mark`` when it is read."""
    content = torch.load(path, weights_only=False)
    torch.save({**content, "payload": Payload(mark)}, path)


@pytest.fixture(
    scope="module", params=[(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")], ids=lambda param: str(param)
)
def run(request, recipe, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run for each ZeRO stage, stopped at step 4, and its settings."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    stage, precision = request.param
    settings = [f"deepspeed.zero_stage={stage}", f"train.precision={precision}", "validation.every_steps=null"]
    train(recipe, [f"train.run_dir={run_dir}", *settings, "train.num_steps=4"])
    return run_dir, settings


def test_enums_are_written_as_their_value(tmp_path, monkeypatch):
    """Python 3.11.2 writes a call of getattr, which is refused in a file."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    monkeypatch.delitem(copyreg.dispatch_table, ZeroStageEnum, raising=False)
    torch.save(ZeroStageEnum.gradients, tmp_path / "stage.pt")
    assert refused_names(tmp_path / "stage.pt") == ["builtins.getattr"]
    pickle_enums_by_value()
    torch.save(ZeroStageEnum.gradients, tmp_path / "stage.pt")
    assert refused_names(tmp_path / "stage.pt") == []
    with restricted_unpickling():
        assert torch.load(tmp_path / "stage.pt") is ZeroStageEnum.gradients


def test_a_payload_is_refused_in_every_file(recipe, run, tmp_path):
    whole, settings = run
    names = [path.relative_to(whole) for path in whole.rglob("*.pt")]
    assert len(names) == (2 if "deepspeed.zero_stage=0" in settings else 3)
    for number, name in enumerate(names):
        copy, mark = tmp_path / str(number), tmp_path / "mark"
        copy_checkpoint(whole, 4, copy)
        poison(copy / name, mark)
        seal(copy / "checkpoints" / "step-4")  # an attacker who can write the file can write its checksum
        with pytest.raises(ValueError, match=rf"{name} contains (posix|nt)\.system, which could.*--trust-chec"):
            train(recipe, [*settings, f"train.run_dir={copy}"])
        assert not mark.exists()


def test_a_payload_is_refused_in_a_conversion(recipe, run, tmp_path):
    """In the optimizer's file of stages 1 and 3, and in the model's of the others."""
    whole, settings = run
    stage = int(settings[0][-1])
    kind = "model_states" if stage in (0, 2) else "optim_states"
    (name,) = (path.name for path in (whole / "checkpoints" / "step-4" / "deepspeed").glob(f"*{kind}*"))
    copy, mark = tmp_path / "copy", tmp_path / "mark"
    copy_checkpoint(whole, 4, copy)
    poison(copy / "checkpoints" / "step-4" / "deepspeed" / name, mark)
    seal(copy / "checkpoints" / "step-4")
    with pytest.raises(ValueError, match=rf"{name} contains (posix|nt)\.system, which could run code"):
        train(recipe, [*settings, f"train.run_dir={copy}", f"deepspeed.zero_stage={1 if stage == 0 else 0}"])
    assert not mark.exists()


@pytest.mark.parametrize("other_stage", [None, 0])
def test_a_payload_in_the_old_format_is_not_run(recipe, run, tmp_path, other_stage):
    """The search for classes does not read it; loading and conversion refuse it nevertheless."""
    whole, settings = run
    copy, mark = tmp_path / "copy", tmp_path / "mark"
    if other_stage is not None and "deepspeed.zero_stage=3" not in settings:
        pytest.skip("one conversion is enough")
    copy_checkpoint(whole, 4, copy)
    for path in (copy / "checkpoints" / "step-4" / "deepspeed").iterdir():
        content = torch.load(path, weights_only=False)
        torch.save({**content, "payload": Payload(mark)}, path, _use_new_zipfile_serialization=False)
    seal(copy / "checkpoints" / "step-4")
    converted = [] if other_stage is None else [f"deepspeed.zero_stage={other_stage}"]
    with pytest.raises(ValueError, match=r"cannot load|could not convert"):
        train(recipe, [*settings, f"train.run_dir={copy}", *converted])
    assert not mark.exists()


def test_a_trusted_checkpoint_may_contain_anything(recipe, run, tmp_path):
    whole, settings = run
    copy, mark = tmp_path / "copy", tmp_path / "mark"
    copy_checkpoint(whole, 4, copy)
    poison(copy / "checkpoints/step-4/deepspeed" / next((whole / "checkpoints/step-4/deepspeed").iterdir()).name, mark)
    seal(copy / "checkpoints" / "step-4")
    train(recipe, [*settings, f"train.run_dir={copy}", "train.num_steps=5"], trust_checkpoint=True)
    assert mark.exists()
    assert max(losses(copy)) == 5


def test_initial_weights_run_no_code(recipe, run, tmp_path):
    whole, settings = run
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(whole / "checkpoints" / "step-4" / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"payload": Payload(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.init_from=.*has its weights only as a pickle"):
        train(recipe, [*settings, f"train.run_dir={tmp_path / 'new'}", f"model.init_from={folder}"])
    assert not mark.exists()


def test_every_class_is_known_and_can_be_read():
    """Among them the loss scaler of fp16, which is not supported on CPUs."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    assert len(deepspeed_classes()) == len(DEEPSPEED_CLASSES)
    scaler = DynamicLossScaler(2.0**12, 1000, 1.0, 2, False)
    for new_format in (False, True):
        file = io.BytesIO()
        torch.save({"loss_scaler": scaler}, file, _use_new_zipfile_serialization=new_format)
        file.seek(0)
        with restricted_unpickling():
            assert torch.load(file, weights_only=False)["loss_scaler"].__dict__ == scaler.__dict__


def test_the_restriction_ends_with_its_context(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Payload(tmp_path / "mark"), tmp_path / "file.pt")
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not (tmp_path / "mark").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").exists()
