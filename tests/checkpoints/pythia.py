"""Folders with the same files and names as Pythia's on the Hub, and tiny models in them."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ..eval.checkpoints import END_OF_TEXT, small_tokenizer
from ..models.tiny import sharpen

NUM_SPACES = 23  # tokens of 2 to 24 spaces follow the vocabulary, as in Pythia's tokenizer
FORMS = ("safetensors", "sharded safetensors", "pickle", "sharded pickle")
# `config.json` of EleutherAI/pythia-160m, except the sizes.
CONFIG: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 32,
    "model_type": "gpt_neox",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
}


@cache
def pythia_tokenizer() -> Tokenizer:
    """A small tokenizer whose last ids are runs of spaces, as in GPT-NeoX-20B's."""
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(NUM_SPACES + 1, 1, -1)])
    return tokenizer


def num_tokens() -> int:
    return pythia_tokenizer().get_vocab_size(with_added_tokens=True)


def padded(size: int) -> int:
    """The next multiple of 128, as in Pythia's 50304."""
    return -(-size // 128) * 128


def write_pythia(
    folder: Path,
    form: str = "safetensors",
    dtype: torch.dtype = torch.float16,
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> Path:
    """Write a model of random weights. ``config`` overrides keys of `CONFIG`."""
    folder.mkdir(parents=True)
    values = CONFIG | {"vocab_size": padded(num_tokens()), "torch_dtype": str(dtype).removeprefix("torch.")} | config
    (folder / "config.json").write_text(json.dumps(values))
    model = GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(values))
    sharpen(model)
    _write_weights(folder, model.to(dtype), form)
    (tokenizer or pythia_tokenizer()).save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = special | {"add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def _write_weights(folder: Path, model: GPTNeoXForCausalLM, form: str) -> None:
    tensors = {name.replace("lm_head", "embed_out"): tensor for name, tensor in model.state_dict().items()}
    for i in range(model.config.num_hidden_layers):  # buffers that Pythia's files have
        prefix = f"gpt_neox.layers.{i}.attention."
        length = model.config.max_position_embeddings
        tensors[f"{prefix}bias"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        tensors[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(2)
    is_pickle = form.endswith("pickle")
    suffix, name = (".bin", "pytorch_model") if is_pickle else (".safetensors", "model")
    save = (lambda part, path: torch.save(part, path)) if is_pickle else (lambda part, path: save_file(part, path))
    if not form.startswith("sharded"):
        save(tensors, folder / f"{name}{suffix}")
        return
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{name}-{i:05}-of-00002{suffix}"
        save({key: tensors[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{name}{suffix}.index.json").write_text(json.dumps(index))


def put_in_cache(folder: Path, cache: Path, name: str, revision: str, commit: str) -> None:
    """Put a model into a folder of the form of the Hub's cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    (root / "blobs").mkdir(exist_ok=True)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = root / "blobs" / f"{commit}-{path.name}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")


def put_pythia_in_cache(cache: Path) -> None:
    """Put tiny models under the names and revisions of the examples into a cache of the Hub."""
    pythia = write_pythia(cache / "pythia")
    put_in_cache(pythia, cache, "EleutherAI/pythia-160m", "step3000", "a" * 40)
    put_in_cache(pythia, cache, "EleutherAI/pythia-160m-seed3", "main", "b" * 40)
