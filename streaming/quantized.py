"""Buffers with 8 or 4 bit keys and values; kept tokens and the most recent ones are not quantized.

Each key and value of a head is quantized in groups of dimensions. A group has a scale and, with 4
bits, a smallest value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .buffers import StreamingLayer, gather_columns, static_zeros, zeros_like_heads
from .rule import StreamShape

if TYPE_CHECKING:
    from .steps import ChunkStep, DecodeStep, Step

NUM_RECENT = 32  # recent tokens that are also stored in full precision


@dataclass(frozen=True)
class Int8:
    """Symmetric, with one scale for each key and value of a head."""

    def codes_shape(self, head_dim: int) -> tuple[torch.dtype, int, int]:
        """Return dtype and number of the codes of a head, and the number of its parameters."""
        return torch.int8, head_dim, 1

    def quantize(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes ``(…, D)`` and parameters ``(…, 1)`` of keys or values ``(…, D)``."""
        states = states.float()
        scale = (states.abs().amax(-1, keepdim=True) * (1 / 127)).bfloat16()  # GPUs divide by numbers like this
        codes = (states / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
        return codes.to(torch.int8), scale

    def dequantize(self, codes: Tensor, parameters: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype) * parameters.to(dtype)


@dataclass(frozen=True)
class Int4:
    """Asymmetric, in groups of 32 dimensions, or of all if 32 does not divide them."""

    def group(self, head_dim: int) -> int:
        return 32 if head_dim % 32 == 0 else head_dim

    def codes_shape(self, head_dim: int) -> tuple[torch.dtype, int, int]:
        if head_dim % 2:
            raise ValueError(f"kv_dtype 'int4' requires an even head size, the model has {head_dim}: use 'int8'")
        return torch.uint8, head_dim // 2, 2 * (head_dim // self.group(head_dim))

    def quantize(self, states: Tensor) -> tuple[Tensor, Tensor]:
        head_dim = states.shape[-1]
        groups = states.float().unflatten(-1, (-1, self.group(head_dim)))
        low = groups.amin(-1, keepdim=True).bfloat16()
        scale = ((groups.amax(-1, keepdim=True) - low.float()) * (1 / 15)).bfloat16()
        codes = ((groups - low.float()) / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round()
        codes = codes.clamp(0, 15).to(torch.uint8).flatten(-2)
        packed = codes[..., : head_dim // 2] | (codes[..., head_dim // 2 :] << 4)
        return packed, torch.cat((scale, low), dim=-1).flatten(-2)

    def dequantize(self, codes: Tensor, parameters: Tensor, dtype: torch.dtype) -> Tensor:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1).to(dtype)
        parameters = parameters.to(dtype).unflatten(-1, (-1, 2))
        groups = codes.unflatten(-1, (parameters.shape[-2], -1))
        return torch.addcmul(parameters[..., 1:], groups, parameters[..., :1]).flatten(-2)


KV_DTYPES: dict[str, Int8 | Int4] = {"int8": Int8(), "int4": Int4()}


def check_head_sizes(config: Any, kv_dtype: str) -> None:
    """Raise a ValueError if the heads of a model cannot be stored in this format."""
    for layer in getattr(config, "per_layer_config", None) or [config]:  # Gemma 4 has two head sizes
        if hasattr(layer, "qk_nope_head_dim"):
            sizes = [layer.qk_nope_head_dim + layer.qk_rope_head_dim, layer.v_head_dim]
        else:
            head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
            sizes = [head_dim, getattr(layer, "v_head_dim", None) or head_dim]
        for size in sizes:
            KV_DTYPES[kv_dtype].codes_shape(size)


class RecentTokens:
    """Where a pass finds the R tokens before it and its first one, computed once for all layers.

    Args:
        num_seen: ``(B or 1,)``, tokens before the pass.

    Attributes:
        tokens: their indices ``(B or 1, R + 1)``, negative at the start of a stream.
        rows: their rows in full precision.
        ring: their slots in the ring; those of kept tokens are empty slots while it fills.
    """

    def __init__(self, shape: StreamShape, num_seen: Tensor):
        self.num_recent = min(NUM_RECENT, shape.window)
        self.tokens = num_seen[:, None] - self.num_recent + torch.arange(self.num_recent + 1, device=num_seen.device)
        self.rows = self.tokens.remainder(self.num_recent + 1)
        self.ring = (self.tokens - shape.num_kept).remainder(shape.window + 1)

    def after(self, num_seen: Tensor) -> Tensor:
        """Return the tokens in the rows after ``num_seen`` ``(B or 1,)`` tokens."""
        rows = torch.arange(self.num_recent + 1, device=num_seen.device)
        laps = (num_seen[:, None] - 1 - rows).div(self.num_recent + 1, rounding_mode="floor")
        return rows + laps * (self.num_recent + 1)


class QuantizedLayer(StreamingLayer):
    """Static buffers of one layer; the window is quantized.

    Token t of the window is in the slot ``(t - S) % (W + 1)`` of the ring.

    Attributes:
        key_codes, value_codes: ``(B, G, W + 1, …)``, the ring.
        key_scales, value_scales: ``(B, G, W + 1, …)``, the parameters of its groups, bfloat16.
        recent_keys, recent_values: ``(B, G, R + 1, D)``, the last R tokens as they are; token t is
            in row ``t % (R + 1)``. They replace those in the ring when it is read.
        kept_keys, kept_values: ``(B, G, S + 1, D)``, see `StreamingLayer`.
        num_arrived: ``(B, G)``, counter of the decoding kernel.
    """

    BUFFERS = (
        *("key_codes", "value_codes", "key_scales", "value_scales"),
        *("recent_keys", "recent_values", "kept_keys", "kept_values", "num_arrived"),
    )

    key_codes: Tensor
    value_codes: Tensor
    key_scales: Tensor
    value_scales: Tensor
    recent_keys: Tensor
    recent_values: Tensor
    kept_values: Tensor

    def __init__(self, kv_dtype: str, shape: StreamShape, has_positions: bool = True):
        super().__init__(shape, has_positions)
        self.kv_dtype, self.format = kv_dtype, KV_DTYPES[kv_dtype]
        self.num_recent = min(NUM_RECENT, shape.window)

    def empty_twin(self) -> "QuantizedLayer":
        return QuantizedLayer(self.kv_dtype, self.shape, self.has_positions)

    def _allocate(self, key: Tensor, value: Tensor) -> None:
        for name, states in (("key", key), ("value", value)):
            (batch_size, num_heads), num_tokens = states.shape[:2], self.shape.window + 1
            dtype, num_codes, num_parameters = self.format.codes_shape(states.shape[-1])
            zeros = partial(static_zeros, device=states.device)
            setattr(self, f"{name}_codes", zeros((batch_size, num_heads, num_tokens, num_codes), dtype))
            setattr(self, f"{name}_scales", zeros((batch_size, num_heads, num_tokens, num_parameters), torch.bfloat16))
            setattr(self, f"recent_{name}s", zeros_like_heads(states, self.num_recent + 1))
            setattr(self, f"kept_{name}s", zeros_like_heads(states, self.shape.num_kept + 1))
        self.num_arrived = static_zeros(key.shape[:2], torch.int32, key.device)

    def write(self, key: Tensor, value: Tensor, step: "DecodeStep") -> None:
        ring, row = step.recent.ring[:, -1], step.recent.rows[:, -1]
        for name, states in (("key", key[:, :, 0]), ("value", value[:, :, 0])):
            codes, scales = self.format.quantize(states)
            getattr(self, f"{name}_codes")[step.rows, :, ring] = codes
            getattr(self, f"{name}_scales")[step.rows, :, ring] = scales
            getattr(self, f"recent_{name}s")[step.rows, :, row] = states
            getattr(self, f"kept_{name}s")[step.rows, :, step.kept_row] = states

    def read(self, step: "Step") -> tuple[Tensor, Tensor]:
        recent, dense = step.recent, []
        for name in ("key", "value"):
            exact = gather_columns(getattr(self, f"recent_{name}s"), recent.rows)
            index = recent.ring[:, None, :, None].expand(exact.shape)
            kept = getattr(self, f"kept_{name}s")[:, :, : self.shape.num_kept]
            dense.append(torch.cat((kept, self._ring(name).scatter_(2, index, exact)), dim=2))
        return dense[0], dense[1]

    def store(self, key: Tensor, value: Tensor, step: "ChunkStep") -> None:
        num_kept = self.shape.num_kept
        is_new, columns = step.replacements
        is_recent, recent = step.recent_replacements
        for name, states in (("key", key), ("value", value)):
            codes, scales = self.format.quantize(gather_columns(states, columns[:, num_kept:]))
            replace(getattr(self, f"{name}_codes"), codes, is_new[:, :, num_kept:])
            replace(getattr(self, f"{name}_scales"), scales, is_new[:, :, num_kept:])
            replace(getattr(self, f"recent_{name}s"), gather_columns(states, recent), is_recent)
            kept = getattr(self, f"kept_{name}s")[:, :, :num_kept]
            replace(kept, gather_columns(states, columns[:, :num_kept]), is_new[:, :, :num_kept])

    @property
    def first_values(self) -> Tensor:
        return self.kept_values[:, :, : self.shape.num_kept]

    def turn_window(self, turn: Callable[[Tensor], Tensor]) -> None:
        codes, scales = self.format.quantize(turn(self._ring("key")))
        self.key_codes.copy_(codes)
        self.key_scales.copy_(scales)
        self.recent_keys.copy_(turn(self.recent_keys))

    def restart_rows(self, rows: Tensor) -> None:
        """Kept keys are not rotated in place."""

    def crop(self, num_before: Tensor, num_after: Tensor) -> None:
        """The removed tokens have overwritten some recent ones: take those from the ring."""
        recent = RecentTokens(self.shape, num_after)
        is_gone = (recent.tokens < num_before[:, None] - self.num_recent)[:, None, :, None]
        for name in ("key", "value"):
            states = getattr(self, f"recent_{name}s")
            in_ring = gather_columns(self._ring(name), recent.ring)
            found = torch.where(is_gone, in_ring, gather_columns(states, recent.rows))
            states.scatter_(2, recent.rows[:, None, :, None].expand(found.shape), found)

    def _ring(self, name: str) -> Tensor:
        """Return the keys or values ``(B, G, W + 1, D)`` of the ring in full precision."""
        dtype = self.kept_keys.dtype
        return self.format.dequantize(getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales"), dtype)


def replace(buffer: Tensor, states: Tensor, is_new: Tensor) -> None:
    buffer.copy_(torch.where(is_new, states, buffer))
