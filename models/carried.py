"""Segments of a long sample: keys and values that one forward pass hands to the next.

A sample is processed in segments, each of which sees the last keys of the segments before it
(Dai et al. 2019, Transformer-XL). If every layer is windowed and keeps the sink tokens only, the
outputs equal those of one pass over the whole sample. Gradients differ: none flows into carried
keys. Sink tokens are computed in every segment, since they depend on themselves only.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .config import SinkGPTNeoXConfig


class CarriedKeys(NamedTuple):
    """Keys and values of the tokens before a segment; ``CarriedKeys()`` for the first segment.

    Attributes:
        num_tokens: number of tokens in the segments before, without sinks: a 0-dimensional int64
            tensor on the CPU, so that a new value does not recompile; None for the first segment.
        layers: rotated keys and values of each layer, ``(B, C, H, D)``. C is the layer's window, or
            ``num_tokens`` if fewer.
    """

    num_tokens: Tensor | None = None
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the next segment is the first one."""
        return len(self.layers) == 0  # torch.compile does not trace `not` of a tuple

    def after(self, num_tokens: int, layers: list[tuple[Tensor, Tensor]]) -> "CarriedKeys":
        """Return what a segment of ``num_tokens`` tokens hands to the next one."""
        return CarriedKeys(_count(self.num_tokens, num_tokens), tuple(layers))


@custom_op("sinklm::count_tokens", mutates_args=())
def _count(before: Tensor | None, num_tokens: int) -> Tensor:
    """Return the sum, on the CPU; in an operator, torch.compile needs no compiler for the CPU."""
    return torch.tensor((0 if before is None else int(before)) + num_tokens, dtype=torch.int64, device="cpu")


@_count.register_fake
def _(before, num_tokens):
    return torch.empty((), dtype=torch.int64, device="cpu")


@dataclass
class CarriedModelOutput(BaseModelOutputWithPast):
    """Output of the decoder with ``carried``, the keys for the next segment."""

    carried: CarriedKeys | None = None


@dataclass
class CarriedCausalLMOutput(CausalLMOutputWithPast):
    """Output of the model with ``carried``, the keys for the next segment."""

    carried: CarriedKeys | None = None


def check_segments(config: SinkGPTNeoXConfig, carried: CarriedKeys, batch_size: int, others: dict[str, Any]) -> None:
    """Check that a pass with carried keys computes what one pass over the whole sample would.

    Args:
        others: the further arguments of the pass.

    Raises:
        ValueError: a layer has full attention or keeps tokens that are no sinks, the carried keys
            are of another number of samples, or there is an argument that is not supported.
    """
    if None in config.windows:
        layer = config.windows.index(None)
        raise ValueError(
            f"carried keys require that all layers have windows, but layer {layer} has full attention: process whole "
            "samples, or set layer_windows"
        )
    if config.num_kept != config.num_sinks:
        raise ValueError(
            f"carried keys require that windowed layers keep the sink tokens only, but num_kept is {config.num_kept} "
            f"and the model has {config.num_sinks} sink tokens: process whole samples, or change num_kept"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} does not support carried keys: use 'sdpa' or 'eager'"
        )
    held = batch_size if carried.is_empty else carried.layers[0][0].shape[0]
    if held != batch_size:
        raise ValueError(
            f"carried has {held} samples, but the batch has {batch_size}: pass the carried keys of these samples, "
            "or CarriedKeys() for the first segment"
        )
    if unsupported := sorted(name for name, value in others.items() if value is not None):
        raise ValueError(f"carried keys do not support the argument {unsupported[0]}: leave it out")
