"""The model folder with weights, configuration and tokenizer, read by evaluation and export."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints.model_tokenizer import write_tokenizer
from ..models import SinkGPTNeoXForCausalLM
from .launch import World
from .plan import Plan

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def write_model(folder: Path, weights: dict[str, torch.Tensor], plan: Plan, tokenizer_path: Path) -> None:
    """Write a transformers folder with the weights in their training dtype."""
    with torch.device("meta"):  # not the model that trains, which another thread may be using
        model = SinkGPTNeoXForCausalLM(plan.model_config)
    model.to(next(iter(weights.values())).dtype).save_pretrained(folder, state_dict=weights)
    write_tokenizer(folder, plan.model_config, tokenizer_path)


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
