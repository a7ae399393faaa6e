"""The forward hooks by which a streaming cache steers its model, and nobody else's calls.

A cache alone cannot stream: a layer hands it keys that already carry a phase, the model chose that phase, and the
queries never pass by. So the cache hooks its model's decoder. When, and only when, a forward pass brings that cache,
the hook gives positions and routes the attention of this one pass to `streaming_attention`; afterwards the model is as
it was. A pass longer than the cache's chunk is run in chunks.
"""

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

if TYPE_CHECKING:
    from .cache import StreamingCache

ATTENTION = "sinklm_streaming"


def streaming_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    streaming_cache: "StreamingCache | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: the new tokens' states ``(B, H, T, D)`` in, ``(B, T, H, D)`` out."""
    out = streaming_cache.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, streaming_attention)


class StreamingHook:
    """A pair of forward hooks on the decoder of one cache's model."""

    def __init__(self, cache: "StreamingCache", decoder: PreTrainedModel):
        self.cache = weakref.ref(cache)
        self.parameters = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self.earlier: list[list] = []  # outputs of the chunks already run, one list for each pass under way
        before = decoder.register_forward_pre_hook(self.before, with_kwargs=True)
        after = decoder.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        weakref.finalize(cache, _remove, before, after)

    def is_mine(self, kwargs: dict) -> bool:
        cache = self.cache()
        return cache is not None and kwargs.get("past_key_values") is cache

    def before(self, decoder: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        if not self.is_mine(kwargs):
            return None
        cache = self.cache()
        self.earlier.append([])
        is_token = cache.check_inputs(kwargs) if len(self.earlier) == 1 else kwargs["attention_mask"]
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        inputs, size = kwargs[name], cache.chunk_size
        last = (inputs.shape[1] - 1) // size * size  # where the last chunk starts
        for start in range(0, last, size):
            part = slice(start, start + size)
            mask = None if is_token is None else is_token[:, part]
            self.earlier[-1].append(decoder(**kwargs | {name: inputs[:, part], "attention_mask": mask}))
        inputs, is_token = inputs[:, last:], None if is_token is None else is_token[:, last:]
        position_ids = cache.begin_forward(inputs.shape[0], inputs.shape[1], is_token, inputs.device)
        return (), kwargs | {
            name: inputs,
            "attention_mask": None,
            "position_ids": position_ids,
            "streaming_cache": cache,
        }

    def after(self, decoder: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> Any:
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        if not self.is_mine(kwargs) or not self.earlier:
            return None
        self.cache().end_forward(succeeded=output is not None)
        earlier = self.earlier.pop()
        return _join([*earlier, output]) if earlier and output is not None else None


def _remove(*handles) -> None:
    for handle in handles:
        handle.remove()


def _join(outputs: list) -> Any:
    """One output for several chunks: what has a time axis is put end to end, the rest is the last chunk's."""
    if isinstance(outputs[-1], tuple):
        return (torch.cat([output[0] for output in outputs], dim=1), *outputs[-1][1:])
    joined = outputs[-1]
    joined.last_hidden_state = torch.cat([output.last_hidden_state for output in outputs], dim=1)
    if joined.hidden_states is not None:
        layers = zip(*(output.hidden_states for output in outputs), strict=True)
        joined.hidden_states = tuple(torch.cat(parts, dim=1) for parts in layers)
    return joined
