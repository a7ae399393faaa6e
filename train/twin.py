"""A plain model that shares the weights of the one in training, for evaluation between steps."""

import copy
from typing import TYPE_CHECKING

import torch

from ..models import SinkGPTNeoXForCausalLM
from .model_files import whole_weights
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
    whole = {name: w.clone() if is_partitioned else w for name, w, is_partitioned in whole_weights(engine.module)}
    twin.load_state_dict(whole, assign=True)
    for name, buffer in engine.module.named_buffers():
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, buffer.clone(), persistent=False)
    return twin.eval().requires_grad_(False)
