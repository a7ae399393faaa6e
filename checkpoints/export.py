"""Export a trained checkpoint as a plain ``GPTNeoXForCausalLM`` folder that works without sinklm.

A sink token is an ordinary vocabulary id, so the weights do not change. Only the configuration and
the tokenizer change: the exported tokenizer prepends the sinks, which the sinklm model does itself.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..chat_templates import template_with_sinks
from ..files import check_new, write_json
from ..models.config import TRAINED_WINDOWS, WINDOW_FIELDS, SinkGPTNeoXConfig, sink_config, trained_windows
from ..parsing import parse_json
from ..special_tokens import padding_token, sink_names, without_template
from .checks import read_tokenizer
from .checksums import write_sums
from .folders import resolve_model_folder
from .full_attention import check_windows, measured_cost
from .loading import let_everyone_read, load_model, load_tokenizer
from .model_card import model_card
from .weight_types import DTYPES, cast, check_dtype, name_of

EXPORTABLE_KINDS = ("none", "token")
# GPT-NeoX refuses `token_type_ids`, a default of transformers 4; generation needs left padding.
BATCH_SETTINGS = {"model_input_names": ["input_ids", "attention_mask"], "padding_side": "left"}
HEAD = "embed_out.weight"  # in the files of every Pythia; in memory its name depends on the version of transformers
LARGEST_SHARD = "50GB"  # of a file of weights, as transformers 5 writes them


def export_model(
    checkpoint: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    dtype: str = "auto",
    full_attention: bool = False,
    text: str | None = None,
) -> Path:
    """Write a checkpoint as a plain GPT-NeoX folder: weights, configuration, tokenizer, model card.

    The file ``SHA256SUMS`` has the checksums of the others, except the model card.

    The folder gets its final name only when it is complete. It replaces nothing.

    Args:
        checkpoint: a run, a checkpoint or the folder of a sinklm model, as for `load_model`.
        output: the folder to create. It may exist if it is empty.
        name: of the model in its card; default: that of the folder.
        dtype: of the weights: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``, which is
            that of the checkpoint.
        full_attention: export a model with windowed layers, which plain GPT-NeoX does not have,
            with full attention in all layers. What that changes is measured by
            `full_attention_cost`, and stated in the card.
        text: for the measurement.

    Returns:
        ``output`` as a path.

    Raises:
        ValueError: plain GPT-NeoX does not support the model, its tokenizer does not match its
            sinks, ``checkpoint`` is an export, ``dtype`` is unknown, or a value is too large for
            float16.
        FileExistsError: ``output`` exists and is not empty.
        OSError: writing failed. No partial files remain.

    Warns:
        UserWarning: says the cost of full attention; or the chat template does not begin with the
            sinks.
    """
    check_dtype(dtype)
    output = Path(output)
    folder = check_new(output, "folder")
    if is_export(Path(resolve_model_folder(checkpoint))):
        raise ValueError(f"{checkpoint} is already an export: use or copy it as it is")
    model = load_model(checkpoint, device="cpu", dtype="auto")
    config = _exportable_config(model, checkpoint)
    check_windows(config, checkpoint, full_attention)
    tokenizer = exported_tokenizer(checkpoint, config)
    cost = measured_cost(checkpoint, full_attention, text)
    if dtype != "auto":
        _cast(model, DTYPES[dtype])
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_model(model, config, partial)
        _write_tokenizer(tokenizer, config, partial)
        card = model_card(
            model,
            Path(resolve_model_folder(checkpoint)),
            name or output.absolute().name,
            tokenizer.sink_names,
            cost,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_sums(partial)
        os.rename(partial, folder)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write the export to {output.absolute().parent}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def is_export(folder: Path) -> bool:
    """Whether `export_model` wrote this folder: a GPT-NeoX configuration with the key ``sink``."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "gpt_neox" and "sink" in config


def _exportable_config(model: PreTrainedModel, checkpoint: str | Path) -> SinkGPTNeoXConfig:
    if not isinstance(model.config, SinkGPTNeoXConfig):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}, not a model trained by sinklm: it needs no export")
    if model.config.sink_kind not in EXPORTABLE_KINDS:
        raise ValueError(
            f"{checkpoint} has sink.kind {model.config.sink_kind!r}, which plain GPT-NeoX does not support: only the "
            f"kinds {' and '.join(EXPORTABLE_KINDS)} can be exported"
        )
    return model.config


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the data type of all weights, and of the configuration.

    Raises:
        ValueError: a value is too large for it.
    """
    for key, weight in model.named_parameters():
        weight.data = cast(weight, key, dtype)
    model.config.dtype = dtype


def _write_model(model: PreTrainedModel, config: SinkGPTNeoXConfig, folder: Path) -> None:
    """Write the weights (safetensors), ``config.json`` and ``generation_config.json``."""
    plain_config = _plain_config(config)
    with torch.device("meta"):
        plain = GPTNeoXForCausalLM(plain_config)
    plain.load_state_dict(model.state_dict(), assign=True)
    weights = {HEAD if name == "lm_head.weight" else name: weight for name, weight in plain.state_dict().items()}
    if config.tie_word_embeddings:
        del weights[HEAD]  # transformers makes it from the input embeddings
    # `save_pretrained` of a model writes the same, but imports accelerate's deepspeed if installed.
    save_torch_state_dict(weights, folder, max_shard_size=LARGEST_SHARD)
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=plain_config.bos_token_id,
        eos_token_id=plain_config.eos_token_id,
        suppress_tokens=config.sink_token_ids or None,
    ).save_pretrained(folder)

    path = folder / "config.json"
    let_everyone_read(folder)
    written = parse_json(path.read_bytes())
    ours: dict[str, Any] = {"sink": config.sink}
    if config.has_windows:
        ours[TRAINED_WINDOWS] = trained_windows(config)
    write_json(path, written | _older_keys(plain_config) | ours, sort_keys=True)


def _plain_config(config: SinkGPTNeoXConfig) -> GPTNeoXConfig:
    """Return the configuration for ``GPTNeoXForCausalLM``; its BOS token is the first sink."""
    ours = {"sink", "model_type", "architectures", "transformers_version", *WINDOW_FIELDS}
    fields = {key: value for key, value in config.to_dict().items() if key not in ours}
    if config.num_sinks:
        fields["bos_token_id"] = config.sink_token_ids[0]
    return GPTNeoXConfig(**(fields | {"use_cache": True}))


def _older_keys(config: GPTNeoXConfig) -> dict[str, Any]:
    """Return the rotary settings under the names that transformers 4 and llama.cpp use."""
    rope = dict(config.rope_parameters or {})
    keys = {
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": rope.pop("partial_rotary_factor", 1.0),
        "torch_dtype": name_of(config.dtype),
    }
    return keys if rope.get("rope_type") == "default" else keys | {"rope_scaling": rope}


def _write_tokenizer(tokenizer: "ExportedTokenizer", config: SinkGPTNeoXConfig, folder: Path) -> None:
    """Write ``tokenizer.json``, whose template prepends the sinks, and ``tokenizer_config.json``.

    No other token is put before a text. Checkpoints of older versions may have a template that adds
    a begin-of-text token, which the model was never trained on. Without a token for padding, none
    is set.

    ``save_pretrained`` is not used: in transformers 5 it writes a class name that transformers 4
    does not have, and its ``GPTNeoXTokenizer`` drops the template.
    """
    backend, names = tokenizer.backend, tokenizer.sink_names
    if names:
        _put_sinks_first(backend, names, config.sink_token_ids)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")  # `save` raises no OSError
    end_of_text = backend.id_to_token(config.eos_token_id)  # type: ignore[arg-type]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0] if names else end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        **BATCH_SETTINGS,
    }
    if tokenizer.padding is not None:
        settings["pad_token"] = tokenizer.padding
    if len(names) == 1:  # with several sinks, transformers 5 would replace the template by a single token
        settings["add_bos_token"] = True
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings, sort_keys=True)


class ExportedTokenizer(NamedTuple):
    """The tokenizer of a model outside of sinklm.

    Attributes:
        backend: the tokenizer, which knows the sinks and adds no token to a text.
        path: its ``tokenizer.json`` in the checkpoint.
        sink_names: the names of the sinks.
        padding: the padding token, None without one.
        chat_template: a template that begins a conversation with the sinks, None without one.
    """

    backend: Tokenizer
    path: Path
    sink_names: list[str]
    padding: str | None
    chat_template: str | None


def exported_tokenizer(checkpoint: str | Path, config: PreTrainedConfig) -> ExportedTokenizer:
    """Return the tokenizer of a checkpoint, or of an export, for use outside of sinklm.

    Raises:
        FileNotFoundError: the checkpoint has no tokenizer.
        ValueError: the tokenizer does not match the model's sinks.

    Warns:
        UserWarning: the chat template does not begin with the sinks. In the result it does.
    """
    trained = load_tokenizer(checkpoint)
    path = cached_file(resolve_model_folder(checkpoint), "tokenizer.json")
    backend = without_template(read_tokenizer(path))
    backend.no_truncation()
    backend.no_padding()
    names = name_sinks(backend, sink_config(config).sink_token_ids, path)
    chosen = trained.pad_token if trained.pad_token_id != config.eos_token_id else None
    template = trained.chat_template if isinstance(trained.chat_template, str) else None
    with_sinks = template_with_sinks(trained, template, names) if template else None
    if with_sinks != template:
        warnings.warn(
            f"the chat template of {checkpoint} does not begin with the sink ({{{{ bos_token }}}}): in the export it "
            "does",
            stacklevel=2,
        )
    return ExportedTokenizer(backend, Path(path), names, chosen or padding_token(backend), with_sinks)


def name_sinks(backend: Tokenizer, token_ids: list[int], path: str | Path) -> list[str]:
    """Add the sinks to a tokenizer as special tokens and return their names.

    Args:
        path: of the tokenizer, for the error.

    Raises:
        ValueError: the tokenizer's next free ids are not ``token_ids``, or it has a token with the
            name of a sink and another id. `tokenizers` gives a new token the number of tokens as
            its id, which is not free if lower ids are unused.
    """
    names = sink_names(len(token_ids))
    for name, token_id in zip(names, token_ids, strict=True):
        if backend.token_to_id(name) not in (None, token_id):
            raise ValueError(
                f"{path} already has the token {name} with the id {backend.token_to_id(name)}, but the model's sink "
                f"has the id {token_id}: use a tokenizer without this token, or prepare the data again with one that "
                "has it as its last token, which `sinklm prepare` leaves out"
            )
    ids = set(backend.get_vocab(with_added_tokens=True).values())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    given = [backend.token_to_id(name) for name in names]
    if given != token_ids and (unused := set(range(token_ids[0])) - ids):
        raise ValueError(
            f"{path} has no token with the id {min(unused)}, but with higher ids, so the library tokenizers would give "
            f"a sink token the id {given[0]}: add tokens for the unused ids to the file, such as <|unused1|>, and "
            "prepare the data again, or train without sink tokens (model.sink.kind)"
        )
    if given != token_ids:
        raise ValueError(
            f"{path}: the tokenizer's next free ids are {given}, but the model's sinks have the ids {token_ids}: this "
            "is not the tokenizer that the model was trained with"
        )
    return names


def _put_sinks_first(backend: Tokenizer, names: list[str], token_ids: list[int]) -> None:
    prefix = " ".join(names)
    template = TemplateProcessing(
        single=f"{prefix} $A", pair=f"{prefix} $A $B:1", special_tokens=list(zip(names, token_ids, strict=True))
    )
    backend.post_processor = Sequence([backend.post_processor, template]) if backend.post_processor else template
