"""Changes that damage a valid model folder, or make other files beside it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], Any]


def config(**values: Any) -> Damage:
    return lambda model: edit_json(model / "config.json", values)


def edit_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda model: (model / name).write_bytes(data)


def recipe(content: str | bytes) -> Damage:
    return write("../mine.yaml", content)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(model: Path) -> None:
        path = model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def set_first(name: str, value: float) -> Damage:
    return weights(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def with_index(weight_map: Any) -> Damage:
    """Weights in several files, of which only the index is there."""

    def damage(model: Path) -> None:
        (model / "model.safetensors").unlink()
        write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))(model)

    return damage


def as_missing_shards(model: Path) -> None:
    names = load_file(model / "model.safetensors")
    with_index(dict.fromkeys(names, "model-00001-of-00001.safetensors"))(model)


def as_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def with_code(model: Path) -> None:
    """A model whose code writes a file when it is imported."""
    (model / "evil.py").write_text("open('ran', 'w')\n")
    config(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(model)


def with_tokenizer_code(model: Path) -> None:
    """A tokenizer whose code writes a file when it is imported."""
    (model / "evil.py").write_text("open('ran', 'w')\n")
    code = {"AutoTokenizer": ["evil.T", None]}
    edit_json(model / "tokenizer_config.json", {"tokenizer_class": "EvilTokenizer", "auto_map": code})


def regex(pattern: str) -> Damage:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda model: edit_json(model / "tokenizer.json", {"pre_tokenizer": split})


def template(text: str) -> Damage:
    return lambda model: edit_json(model / "tokenizer_config.json", {"chat_template": text})


def edit_tokens(model: Path, ids: dict[str, int]) -> None:
    """Add tokens to a tokenizer, with any ids."""
    path = model / "tokenizer.json"
    values = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["model"]["vocab"] |= ids
    values["added_tokens"] += [{"id": i, "content": token, **flags} for token, i in ids.items()]
    path.write_text(json.dumps(values))
