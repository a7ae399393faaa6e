"""Export a trained checkpoint as a GGUF file, which llama.cpp and the programs built on it read.

The file has the tensors of llama.cpp's architecture ``gptneox``, in the layout of its converter:
the rows of ``query_key_value`` are sorted by query, key and value instead of by head, and vectors
are float32. A sink is llama.cpp's BOS token, which it puts before each text itself.

``gguf`` is imported in the functions that use it: it is an extra.
"""

import json
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

from ..extras import require_extra
from ..files import check_new, partial_name, sync_file
from ..models.config import sink_config, trained_windows
from ..special_tokens import byte_level_tokens
from .export import EXPORTABLE_KINDS, ExportedTokenizer, exported_tokenizer
from .full_attention import check_windows, measured_cost
from .loading import load_model
from .weight_types import DTYPES, cast, check_dtype

if TYPE_CHECKING:
    from gguf import GGUFWriter

ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # llama.cpp has only the tanh approximation
UNUSED_DTYPE = torch.empty(0).numpy().dtype  # of numpy; `gguf` uses it only without `raw_dtype`
VERSION_KEY, SINK_KEY, WINDOWS_KEY = "sinklm.version", "sinklm.sink", "sinklm.trained_windows"


def export_gguf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    full_attention: bool = False,
    text: str | None = None,
) -> Path:
    """Write a checkpoint as a GGUF file.

    Args:
        checkpoint: a run, a checkpoint, the folder of a sinklm model, or an export.
        output: the file to write, with the suffix ``.gguf``, or a folder, in which it is
            ``model.gguf``. It replaces nothing.
        dtype: of the matrices: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``, which is
            that of the checkpoint. Vectors (biases and norms) are always float32.
        full_attention: as for `export_model`.
        text: the same.

    Returns:
        The path of the file.

    Raises:
        MissingExtraError: ``gguf`` is not installed.
        ValueError: llama.cpp cannot compute the model or tokenize as its tokenizer does, or a value
            is too large for float16.
        FileExistsError: the file exists.
        OSError: writing failed. No partial file remains.

    Warns:
        UserWarning: the tokenizer normalizes, which llama.cpp does not do; or as `export_model`.
    """
    require_extra("gguf")
    check_dtype(dtype)
    output = Path(output)
    path = output if output.suffix == ".gguf" else output / "model.gguf"
    target = check_new(path, "file")
    model = load_model(checkpoint, device="cpu", dtype="auto")
    _check_model(model, checkpoint)
    check_windows(model.config, checkpoint, full_attention)
    tokenizer = exported_tokenizer(checkpoint, model.config)
    check_tokenizer_form(tokenizer.backend, tokenizer.path)
    if tokenizer.backend.normalizer is not None:
        warnings.warn(
            "the tokenizer composes characters (NFC) and llama.cpp does not: a text with decomposed characters, such "
            "as an e and a combining accent, has other tokens there",
            stacklevel=2,
        )
    measured_cost(checkpoint, full_attention, text)
    matrix_dtype = model.dtype if dtype == "auto" else DTYPES[dtype]
    partial = target.with_name(partial_name(target.name))
    name = output.absolute().stem if output.suffix == ".gguf" else output.absolute().name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, model, tokenizer, matrix_dtype, name)
        sync_file(partial)
        os.replace(partial, target)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _check_model(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Refuse what llama.cpp's ``gptneox`` does not compute.

    Raises:
        ValueError: names the setting.
    """
    config = model.config
    if config.model_type not in ("gpt_neox", "sink_gpt_neox") or not hasattr(config, "sink"):
        raise ValueError(
            f"{checkpoint} is a {type(model).__name__}, not a model trained by sinklm: convert it with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    sink = sink_config(config)
    if sink.sink_kind not in EXPORTABLE_KINDS:
        raise ValueError(
            f"{checkpoint} has sink.kind {sink.sink_kind!r}, which llama.cpp cannot compute: only the kinds "
            f"{' and '.join(EXPORTABLE_KINDS)} can be exported as GGUF"
        )
    if sink.num_sinks > 1:
        raise ValueError(
            f"{checkpoint} has {sink.num_sinks} sink tokens, and llama.cpp puts only one token before a text: export "
            "it with --to hf"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f"{checkpoint} has rope_type {rope_type!r}: only the type 'default' can be exported as GGUF")
    if num_rotary(config) % 2:
        raise ValueError(
            f"{checkpoint} rotates {num_rotary(config)} of the dimensions of a head (rotary_pct): "
            "llama.cpp rotates an odd number differently, so it cannot be exported as GGUF"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{checkpoint} has hidden_act {config.hidden_act!r}: llama.cpp's gptneox has only GELU "
            f"({', '.join(ACTIVATIONS)})"
        )


def num_rotary(config: PreTrainedConfig) -> int:
    """Return how many dimensions of a head have rotary positions."""
    head_size = config.hidden_size // config.num_attention_heads
    return int(head_size * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


def check_tokenizer_form(backend: Tokenizer, path: Path) -> None:
    """Check that llama.cpp's tokenizer ``gpt2`` with the pre-tokenizer ``gpt-2`` does the same.

    Pythia's tokenizer and those of `sinklm tokenizer train` pass. One difference is accepted:
    llama.cpp does not normalize, so for Pythia's tokenizer (NFC) it tokenizes decomposed characters
    in another way.

    Raises:
        ValueError: names the part that differs.
    """
    state = json.loads(backend.to_str())
    model = state["model"]
    differences = {
        f"the model {model['type']}": model["type"] != "BPE",
        f"the normalizer {_name(state['normalizer'])}": _name(state["normalizer"]) not in ("none", "NFC"),
        f"the pre-tokenizer {_name(state['pre_tokenizer'])}": not _is_gpt2(state["pre_tokenizer"]),
        f"the decoder {_name(state['decoder'])}": _name(state["decoder"]) != "ByteLevel",
    }
    options = ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    differences |= {f"{key} in its BPE": bool(model.get(key)) for key in options}
    missing = byte_level_tokens() - set(model.get("vocab", ()))
    differences[f"a vocabulary without {len(missing)} of the bytes of UTF-8"] = bool(missing)
    for token in state["added_tokens"]:
        strips = any(token[key] for key in ("lstrip", "rstrip", "single_word"))
        differences[f"the added token {token['content']!r} with lstrip, rstrip or single_word"] = strips
    for name, differs in differences.items():
        if differs:
            raise ValueError(
                f"{path} has {name}, which llama.cpp's pre-tokenizer gpt-2 does not do: only a byte-level BPE of "
                "GPT-2's form, such as Pythia's or that of sinklm tokenizer train, can be exported as GGUF"
            )


def _name(part: dict[str, Any] | None) -> str:
    return part["type"] if part else "none"


def _is_gpt2(part: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer splits with the regular expression of GPT-2 and does nothing else."""
    return _name(part) == "ByteLevel" and part["use_regex"] and not part["add_prefix_space"]  # type: ignore[index]


def _write(path: Path, model: PreTrainedModel, tokenizer: ExportedTokenizer, dtype: torch.dtype, name: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    types = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    writer = GGUFWriter(path, "gptneox")
    try:
        _add_description(writer, model, dtype, name)
        _add_tokenizer(writer, tokenizer, model.config)
        weights = _named_weights(model)
        for key, weight in weights.items():  # the header, with all sizes, comes before the data
            stored = _stored_dtype(weight, dtype)
            num_bytes = weight.numel() * stored.itemsize
            writer.add_tensor_info(key, weight.shape, UNUSED_DTYPE, num_bytes, raw_dtype=types[stored])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, weight in weights.items():
            writer.write_tensor_data(_stored(weight, key, model.config, dtype).view(torch.uint8).numpy())
    finally:
        writer.close()


def _add_description(writer: "GGUFWriter", model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    from gguf import LlamaFileType

    config = model.config
    file_types = {
        torch.float32: LlamaFileType.ALL_F32,
        torch.float16: LlamaFileType.MOSTLY_F16,
        torch.bfloat16: LlamaFileType.MOSTLY_BF16,
    }
    writer.add_type("model")
    writer.add_string(VERSION_KEY, metadata.version("sinklm"))
    writer.add_string(SINK_KEY, json.dumps(config.sink, sort_keys=True))
    if windows := trained_windows(config):
        writer.add_string(WINDOWS_KEY, json.dumps(windows, sort_keys=True))
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_dimension_count(num_rotary(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_parallel_residual(config.use_parallel_residual)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: ExportedTokenizer, config: PreTrainedConfig) -> None:
    from gguf import TokenType

    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    if (highest := max(backend.get_vocab(with_added_tokens=True).values())) >= config.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has the id {highest}, but the model has only {config.vocab_size} rows: use the "
            "tokenizer of this model"
        )
    tokens, types = [], []
    for id_ in range(config.vocab_size):
        token = backend.id_to_token(id_)
        if token is None:
            tokens.append(f"[PAD{id_}]")  # the names of llama.cpp's converter for rows without a token
            types.append(TokenType.UNUSED)
        else:
            tokens.append(token)
            is_special = id_ in added and added[id_].special
            types.append(
                TokenType.CONTROL if is_special else TokenType.USER_DEFINED if id_ in added else TokenType.NORMAL
            )
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = sink_config(config).sink_token_ids
    writer.add_bos_token_id(ids[0] if ids else config.eos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if tokenizer.padding is not None and (padding := backend.token_to_id(tokenizer.padding)) is not None:
        writer.add_pad_token_id(padding)
    writer.add_add_bos_token(bool(ids))
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _named_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights by their names in llama.cpp, which needs biases: without, zeros."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.GPTNEOX, model.config.num_hidden_layers)
    weights = {}
    for name, weight in model.state_dict().items():
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if key is None:
            raise ValueError(f"the model has the tensor {name}, which llama.cpp's gptneox does not have")
        weights[key] = weight
    for layer in range(model.config.num_hidden_layers):
        for part in ("attn_qkv", "attn_output"):
            matrix = weights[f"blk.{layer}.{part}.weight"]
            weights.setdefault(f"blk.{layer}.{part}.bias", matrix.new_zeros(matrix.shape[0]))
    return weights


def _stored_dtype(weight: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if weight.dim() == 1 else dtype


def _stored(weight: torch.Tensor, key: str, config: PreTrainedConfig, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as it is in the file.

    Raises:
        ValueError: a value is too large for the data type.
    """
    if ".attn_qkv." in key:
        weight = sorted_by_part(weight, config.num_attention_heads)
    return cast(weight, key, _stored_dtype(weight, dtype)).contiguous()


def sorted_by_part(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Sort the rows of ``query_key_value``: all queries, all keys, all values.

    GPT-NeoX has query, key and value of the first head, then those of the second, and so on.

    Args:
        weight: the matrix ``(3·D, D)`` or the bias ``(3·D,)``.
    """
    by_head = weight.reshape(num_heads, 3, -1, *weight.shape[1:])
    return by_head.transpose(0, 1).reshape(weight.shape)
