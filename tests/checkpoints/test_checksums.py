"""A damaged model folder is an error of one line, in evaluation, export and as initial weights."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.checkpoints.warm_start import check_tokenizer, load_weights

from ..eval.checkpoints import small_model, small_tokenizer, write_checkpoint
from .seal import seal


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of a run, as far as evaluation reads it."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    write_checkpoint(checkpoint / "model", small_model(1, torch.float32))
    (checkpoint / "deepspeed").mkdir()
    (checkpoint / "deepspeed" / "optimizer.pt").touch()  # not a file of the model
    seal(checkpoint)
    return checkpoint


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_is_verified_before_it_is_evaluated(saved, name):
    load_model(saved)
    load_tokenizer(saved)
    flip_bit(saved / "model" / name)
    for folder in (saved, saved / "model", saved.parents[1]):
        with pytest.raises(ValueError, match=rf"step-4/model is damaged: {name} has another sha256.*: copy it again"):
            load_model(folder)
    if name == "model.safetensors":
        load_tokenizer(saved)  # does not read the weights
        return
    with pytest.raises(ValueError, match=rf"step-4/model is damaged: {name}"):
        load_tokenizer(saved)


def test_a_damaged_manifest_is_an_error(saved):
    flip_bit(saved / "COMPLETE")
    with pytest.raises(ValueError, match="step-4 is damaged: COMPLETE is damaged"):
        load_model(saved)


def test_a_checkpoint_without_hashes_is_evaluated(saved):
    (saved / "COMPLETE").write_bytes(b"")
    load_model(saved)


def test_an_export_has_checksums_that_standard_tools_read(saved, tmp_path):
    folder = export_model(saved, tmp_path / "export")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {"README.md", "SHA256SUMS"}
    load_model(folder)
    load_tokenizer(folder)
    (folder / "README.md").write_text("an edited model card")
    load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_damaged_export_is_an_error(saved, tmp_path, name):
    folder = export_model(saved, tmp_path / "export")
    flip_bit(folder / name)
    with pytest.raises(ValueError, match=rf"export is damaged: {name} has another sha256.*delete SHA256SUMS"):
        load_model(folder)
    if name != "config.json":  # without it, the folder is no model
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"export is damaged: {name} is missing"):
            load_model(folder)


def test_damaged_checksums_are_an_error(saved, tmp_path):
    folder = export_model(saved, tmp_path / "export")
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text("".join(sums.splitlines(keepends=True)[:1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is not listed"):
        load_model(folder)
    (folder / "SHA256SUMS").write_text(sums[5:])
    with pytest.raises(ValueError, match="SHA256SUMS is damaged"):
        load_model(folder)


# -- initial weights -------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def drop_shard(path: Path) -> None:
    small_model(1, torch.float32).save_pretrained(path.parent, max_shard_size="20KB")
    path.unlink(missing_ok=True)
    sorted(path.parent.glob("model-0*.safetensors"))[1].unlink()


def break_index(path: Path) -> None:
    drop_shard(path)
    (path.parent / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "incomplete metadata"),
        (drop_shard, r"model-00002-of"),
        (break_index, "Expecting property name"),
        (Path.unlink, "no file named model.safetensors"),
        (lambda path: path.write_bytes(b""), "header of model.safetensors"),
    ],
)
def test_damaged_initial_weights_are_an_error_of_one_line(tmp_path, damage, reason):
    folder = write_checkpoint(tmp_path / "model", small_model(1, torch.float32))
    config = load_model(folder).config
    damage(folder / "model.safetensors")
    with pytest.raises((ValueError, OSError), match=rf"model\.init_from=.*model: .*{reason}") as raised:
        load_weights(folder, config)
    assert len(str(raised.value).splitlines()) == 1


def test_initial_weights_are_complete(tmp_path):
    folder = write_checkpoint(tmp_path / "model", small_model(1, torch.float32))
    config = load_model(folder).config
    assert load_weights(folder, config)
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.final_layer_norm.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack gpt_neox\.final_layer_norm\.bias, which its config\.json requires"):
        load_weights(folder, config)


def test_initial_weights_with_hashes_are_verified(saved, tmp_path):
    config = load_model(saved).config
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name in ("model.safetensors", "tokenizer.json"):
        flip_bit(saved / "model" / name)
    with pytest.raises(ValueError, match=r"model is damaged: model\.safetensors has another sha256"):
        load_weights(saved, config)
    with pytest.raises(ValueError, match=r"model is damaged: tokenizer\.json has another sha256"):
        check_tokenizer(saved, tmp_path / "tokenizer.json")


def test_a_damaged_tokenizer_of_the_initial_weights_is_an_error(tmp_path):
    folder = write_checkpoint(tmp_path / "model", small_model(1, torch.float32))
    Tokenizer.from_file(str(folder / "tokenizer.json")).save(str(tmp_path / "tokenizer.json"))
    check_tokenizer(folder, tmp_path / "tokenizer.json")
    truncate(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"model\.init_from=.*tokenizer\.json is not a tokenizer\.json \(.*\): copy"):
        check_tokenizer(folder, tmp_path / "tokenizer.json")
