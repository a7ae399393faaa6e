"""A plain model that shares the weights of the one in training, for evaluation between steps."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models import SinkGPTNeoXForCausalLM
from .plan import Plan

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def evaluation_twin(engine: "DeepSpeedEngine", plan: Plan) -> SinkGPTNeoXForCausalLM:
    """Return a model with the engine's current weights. Every rank calls it.

    It is a module of its own. So a pass through it, also with another attention or a cache, is
    neither compiled nor seen by DeepSpeed, and changes nothing in training. It uses no memory for
    weights, except with ZeRO-3, where every rank gathers all weights until the twin is deleted. It
    is valid until the next update.
    """
    with torch.device("meta"):
        twin = SinkGPTNeoXForCausalLM(copy.deepcopy(plan.model_config))
    twin.load_state_dict(_whole_weights(engine.module), assign=True)
    for name, buffer in engine.module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, buffer.clone(), persistent=False)
    return twin.eval().requires_grad_(False)


def _whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights by name; those that ZeRO-3 partitioned are gathered into copies.

    Small ones, which ZeRO-3 keeps on every rank, are not gathered: see `model_files`.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    weights = {}
    for name, parameter in model.named_parameters():
        is_partitioned = getattr(parameter, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned):
            weights[name] = parameter.detach().clone() if is_partitioned else parameter.detach()
    return weights
