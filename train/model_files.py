"""The model folder with weights, configuration and tokenizer, read by evaluation and export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from ..checkpoints.export import BATCH_SETTINGS, name_sinks
from ..models import SinkGPTNeoXForCausalLM
from ..special_tokens import padding_token, without_template
from .launch import World
from .plan import Plan

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def write_model(folder: Path, weights: dict[str, torch.Tensor], plan: Plan, tokenizer_path: Path) -> None:
    """Write a transformers folder with the weights in their training dtype."""
    with torch.device("meta"):  # not the model that trains, which another thread may be using
        model = SinkGPTNeoXForCausalLM(plan.model_config)
    model.to(next(iter(weights.values())).dtype).save_pretrained(folder, state_dict=weights)
    write_tokenizer(folder, plan, tokenizer_path)


def gather_weights(
    engine: "DeepSpeedEngine", world: World, copy: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return copies of all weights on rank 0, and an empty dictionary on the others.

    With ZeRO-3 they are gathered one at a time. Small ones, which DeepSpeed keeps on every rank,
    are not: gathering would partition them afterwards, and the next forward pass would fail.

    Args:
        copy: copies a weight to the host.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    weights = {}
    for name, parameter in engine.module.named_parameters():
        is_partitioned = getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned):
            if world.is_main:
                weights[name] = copy(parameter.detach())
    return weights


def write_tokenizer(folder: Path, plan: Plan, tokenizer_path: Path) -> None:
    """Write the training tokenizer to the model folder.

    It defines the sink tokens, so that tokens added later do not get their ids. It does not prepend
    them to a text: the model does. Like that of the store, it adds no other tokens either.
    """
    tokenizer = without_template(Tokenizer.from_file(str(tokenizer_path)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    name_sinks(tokenizer, plan.model_config.sink_token_ids)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    end_of_document = tokenizer.id_to_token(plan.eod_id)
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_document,
        "eos_token": end_of_document,
        "unk_token": end_of_document,
        "add_bos_token": False,
        "model_max_length": plan.model_config.max_position_embeddings - plan.num_sinks,
        "clean_up_tokenization_spaces": False,
        **BATCH_SETTINGS,
    }
    if (padding := padding_token(tokenizer)) is not None:
        description["pad_token"] = padding
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
