"""GPT-NeoX's attention with two places for a sink that is no token: before the softmax, and behind it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, eager_attention_forward

from .fused_layer import RotatedHeads, is_fused, linear_but_bias_gradient
from .sink_column import SinkColumn, attention_with_column, explicit_attention


class SinkAttention(GPTNeoXAttention):
    """GPT-NeoX's attention with two places for an arm: `column` before the softmax, `gated` behind it.

    Heads stay behind positions, ``(B, T, H, D)``, as the projections write and read them. transformers turns them to
    ``(B, H, T, D)``, so that a compiled training pass copies the kernel's output and every gradient back.
    """

    column_reads_query = False  # or only its type and device

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``(B, T, hidden)`` to the same, and the probabilities ``(B, H, T, K)`` if the attention is eager."""
        assert position_embeddings is not None
        query, key, value, column = self.heads(hidden_states, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = self.attend(query, key, value, attention_mask, column, **kwargs)
        return self.dense(self.gated(out.flatten(2), hidden_states)), weights

    def heads(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, SinkColumn | None]:
        """Queries and keys with their phases and values, each ``(B, H, T, D)``, and the arm's column."""
        projection = self.query_key_value
        if is_fused(hidden_states) and len(cos) == 1 and not self.column_reads_query and projection.bias is not None:
            heads = linear_but_bias_gradient(projection, hidden_states).unflatten(-1, (-1, 3 * self.head_size))
            query, key, value = RotatedHeads.apply(heads, projection.bias, cos[0], sin[0])
            column = self.column(query.transpose(1, 2))
        else:
            query, key, value = projection(hidden_states).unflatten(-1, (-1, 3 * self.head_size)).chunk(3, dim=-1)
            column = self.column(query.transpose(1, 2))
            query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), column

    def attend(self, query, key, value, mask, column: SinkColumn | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention as the model's ``attn_implementation`` says: ``(B, T, H, D)``."""
        implementation = self.config._attn_implementation
        kwargs |= {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        if column is None:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        elif implementation in COLUMN_ATTENTION:
            interface, kwargs = COLUMN_ATTENTION[implementation], kwargs | {"column": column}
        else:
            raise ValueError(
                f"attn_implementation {implementation!r} has no place for the column of sink.kind "
                f"{self.config.sink_kind}: choose one of sdpa, eager"
            )
        return interface(self, query, key, value, mask, **kwargs)

    def column(self, query: Tensor) -> SinkColumn | None:
        """What the softmax gets besides the keys, for queries ``(B, H, T, D)`` without their rotary phase."""
        return None

    def gated(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """What becomes of the heads' outputs ``(B, T, hidden)`` before they are mixed."""
        return out

    def initialise(self) -> None:
        """Give the arm's own parameters, except for matrices, their first values."""


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first dimensions of ``(B, T, H, D)`` turned by the angles of their positions.

    Args:
        cos, sin: ``(1 or B, T, rotated dimensions)``, the second half like the first, as transformers makes them.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def score_dtype(query: Tensor) -> torch.dtype:
    """A column's score is not rounded to half precision, for the kernels' own scores are not."""
    return torch.promote_types(query.dtype, torch.float32)


def eager_with_column(module, query, key, value, mask, *, column, scaling, dropout, **kwargs):
    out, weights = explicit_attention(query, key, value, mask, column, scaling, dropout)
    return out.transpose(1, 2), weights


def sdpa_with_column(module, query, key, value, mask, *, column, scaling, dropout, **kwargs):
    return attention_with_column(query, key, value, mask, column, scaling, dropout).transpose(1, 2), None


# Attention functions that take a sink's column, by ``attn_implementation``. Other parts of the project add theirs.
COLUMN_ATTENTION: dict[str, Callable] = {"eager": eager_with_column, "sdpa": sdpa_with_column}


def register_column_attention(name: str, function: Callable) -> None:
    """Let ``attn_implementation=name`` serve arms with a column: ``function`` as in transformers' `AttentionInterface`,
    with the column as the keyword ``column``."""
    COLUMN_ATTENTION[name] = function
