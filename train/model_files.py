"""The model folder with weights, configuration and tokenizer, read by evaluation and export."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

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

    Args:
        copy: copies a weight to the host.
    """
    return {name: copy(weight) for name, weight, _ in whole_weights(engine.module) if world.is_main}


def whole_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield the name of each weight, the whole weight, and whether ZeRO-3 has partitioned it.

    Partitioned weights are gathered one at a time, so each is valid until the next one. Small ones,
    which DeepSpeed keeps on every rank, are not gathered: that would partition them afterwards, and
    the next forward pass would fail.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for name, parameter in model.named_parameters():
        is_partitioned = getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned):
            yield name, parameter.detach(), is_partitioned
