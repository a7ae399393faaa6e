"""Turn a trained checkpoint into a plain ``GPTNeoXForCausalLM`` folder that needs no code of ours.

A sink token is an ordinary vocabulary id, so the weights stay as they are. What changes is the configuration, and the
tokenizer, which puts the sinks in front of every text where our model did so by itself.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel
from transformers.utils import cached_file

from ..files import replace_folder, write_json
from ..models.config import SinkGPTNeoXConfig
from .folders import resolve_model_folder
from .loading import load_model, load_tokenizer, no_progress_bars
from .model_card import model_card

EXPORTABLE_KINDS = ("none", "token")


def export_model(checkpoint: str | Path, output: str | Path) -> Path:
    """Write ``checkpoint`` as a plain GPT-NeoX folder: weights, configuration, tokenizer, model card.

    The folder appears under its name only when it is complete. An older export of that name is replaced.

    Args:
        checkpoint: what `load_model` takes: a run, a checkpoint or a folder of a sinklm model.
        output: the folder to make.

    Returns:
        ``output`` as a path.

    Raises:
        ValueError: if the model cannot be expressed as plain GPT-NeoX, or its tokenizer does not fit its sinks.
        FileExistsError: if ``output`` holds something that is not an export.
        OSError: if writing fails; nothing half-written is left and an older export stays.
    """
    output = Path(output)
    _check_replaceable(output)
    model = load_model(checkpoint, device="cpu", dtype="auto")
    config = _exportable_config(model, checkpoint)
    partial = output.absolute().with_name(f".{output.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_model(model, config, partial)
        _write_tokenizer(checkpoint, config, partial)
        card = model_card(
            model, Path(resolve_model_folder(checkpoint)), output.absolute().name, sink_names(config.num_sinks)
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        replace_folder(partial, output)
    except FileNotFoundError:  # the checkpoint has no tokenizer
        raise
    except (SafetensorError, OSError) as error:
        raise OSError(f"the export cannot be written below {output.absolute().parent}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def sink_names(num_sinks: int) -> list[str]:
    """``<|sink|>``, ``<|sink2|>``, …: what the tokenizer of an export calls the sinks."""
    return ["<|sink|>", *(f"<|sink{i}|>" for i in range(2, num_sinks + 1))][:num_sinks]


def is_export(folder: Path) -> bool:
    """Whether `export_model` wrote this folder: plain GPT-NeoX whose configuration tells of its sinks."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") == "gpt_neox" and "sink" in config


def _check_replaceable(output: Path) -> None:
    if not output.exists() or is_export(output):
        return
    if not output.is_dir() or any(output.iterdir()):
        raise FileExistsError(f"{output} exists and is not an export of sinklm: name another folder, or remove it")


def _exportable_config(model: PreTrainedModel, checkpoint: str | Path) -> SinkGPTNeoXConfig:
    if not isinstance(model.config, SinkGPTNeoXConfig):
        raise ValueError(
            f"{checkpoint} is a {type(model).__name__}, not a model trained by sinklm: there is nothing to convert"
        )
    if model.config.sink_kind not in EXPORTABLE_KINDS:
        raise ValueError(
            f"{checkpoint} has sink.kind {model.config.sink_kind!r}, which plain GPT-NeoX cannot compute: only the "
            f"kinds {' and '.join(EXPORTABLE_KINDS)} can be exported"
        )
    return model.config


def _write_model(model: PreTrainedModel, config: SinkGPTNeoXConfig, folder: Path) -> None:
    """Weights in safetensors under their usual names, ``config.json`` and ``generation_config.json``."""
    plain_config = _plain_config(config)
    with torch.device("meta"):
        plain = GPTNeoXForCausalLM(plain_config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.generation_config = GenerationConfig(
        bos_token_id=plain_config.bos_token_id,
        eos_token_id=plain_config.eos_token_id,
        suppress_tokens=config.sink_token_ids or None,
    )
    with no_progress_bars():
        plain.save_pretrained(folder)

    path = folder / "config.json"
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner alone
        shutil.copymode(path, weights)
    written = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, written | _older_keys(plain_config) | {"sink": config.sink}, sort_keys=True)


def _plain_config(config: SinkGPTNeoXConfig) -> GPTNeoXConfig:
    """The same architecture for ``GPTNeoXForCausalLM``; its begin-of-text token is the first sink."""
    ours = {"sink", "model_type", "architectures", "transformers_version"}
    fields = {key: value for key, value in config.to_dict().items() if key not in ours}
    if config.num_sinks:
        fields["bos_token_id"] = config.sink_token_ids[0]
    return GPTNeoXConfig(**(fields | {"use_cache": True}))


def _older_keys(config: GPTNeoXConfig) -> dict[str, Any]:
    """The rotary settings under the names that transformers 4 and llama.cpp read."""
    rope = dict(config.rope_parameters or {})
    keys = {
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": rope.pop("partial_rotary_factor", 1.0),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    return keys if rope.get("rope_type") == "default" else keys | {"rope_scaling": rope}


def _write_tokenizer(checkpoint: str | Path, config: SinkGPTNeoXConfig, folder: Path) -> None:
    """``tokenizer.json`` whose template puts the sinks first, and a ``tokenizer_config.json`` all transformers read.

    Both are written by hand: ``save_pretrained`` of transformers 5 names a class that transformers 4 does not know, and
    its ``GPTNeoXTokenizer`` drops the template.
    """
    trained = load_tokenizer(checkpoint)
    backend = Tokenizer.from_file(str(cached_file(resolve_model_folder(checkpoint), "tokenizer.json")))
    end_of_text = backend.id_to_token(config.eos_token_id)  # type: ignore[arg-type]
    names = name_sinks(backend, config.sink_token_ids)
    if names:
        _put_sinks_first(backend, names, config.sink_token_ids)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")  # `save` hides OSErrors
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0] if names else end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
        "pad_token": trained.pad_token or end_of_text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
    }
    if len(names) == 1:  # with more, transformers 5 would take it as leave to replace the template by one token
        settings["add_bos_token"] = True
    write_json(folder / "tokenizer_config.json", settings, sort_keys=True)


def name_sinks(backend: Tokenizer, token_ids: list[int]) -> list[str]:
    """Give the sinks their names in a tokenizer, so that their ids are taken. Returns the names.

    Raises:
        ValueError: the tokenizer's next ids are not ``token_ids``.
    """
    names = sink_names(len(token_ids))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    given = [backend.token_to_id(name) for name in names]
    if given != token_ids:
        raise ValueError(
            f"the tokenizer numbers its next tokens {given} but the model's sinks are {token_ids}: this is not the "
            f"tokenizer that the model was trained with"
        )
    return names


def _put_sinks_first(backend: Tokenizer, names: list[str], token_ids: list[int]) -> None:
    prefix = " ".join(names)
    template = TemplateProcessing(
        single=f"{prefix} $A", pair=f"{prefix} $A $B:1", special_tokens=list(zip(names, token_ids, strict=True))
    )
    backend.post_processor = Sequence([backend.post_processor, template]) if backend.post_processor else template
