"""GPT-NeoX attention with hooks for sinks that are not tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, eager_attention_forward

from .fused_layer import RotatedHeads, is_fused, linear_but_bias_gradient
from .sink_column import SinkColumn, attention_with_column, explicit_attention
from .windowed_attention import windowed_attention, windowed_probabilities
from .windows import WindowRule


class SinkAttention(GPTNeoXAttention):
    """GPT-NeoX attention with two hooks for arms: `column` extends the softmax, `gated` the output.

    States keep the memory layout ``(B, T, H, D)`` that the projections write and read. transformers
    uses ``(B, H, T, D)``, which costs a compiled training pass a copy of the kernel's output and of
    every gradient.
    """

    column_reads_query = False  # `column` uses the values of the query, not only its dtype and device

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        rules: dict[int, WindowRule] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention over ``hidden_states`` ``(B, T, hidden)``.

        Args:
            rules: of the windowed layers of this pass (`windows.rules_of_pass`).

        Returns:
            The output ``(B, T, hidden)``, and with eager attention the probabilities
            ``(B, H, T, K)`` (otherwise None).
        """
        assert position_embeddings is not None
        query, key, value, column = self.heads(hidden_states, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        if rules is not None and self.window is not None:
            kwargs["rule"] = rules[self.window]
        out, weights = self.attend(query, key, value, attention_mask, column, **kwargs)
        return self.dense(self.gated(out.flatten(2), hidden_states)), weights

    def segment(
        self,
        hidden_states: Tensor,
        rules: dict[int, WindowRule],
        position_embeddings: tuple[Tensor, Tensor],
        carried: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute attention over a segment ``(B, sinks + T, hidden)`` and the keys carried to it.

        Args:
            rules: for the queries of the text.
            carried: keys and values ``(B, C, H, D)``; None for the first segment.

        Returns:
            The output ``(B, sinks + T, hidden)``, and the keys and values for the next segment.
        """
        assert self.window is not None
        rule, num_sinks = rules[self.window], self.config.num_sinks
        query, key, value, column = self.heads(hidden_states, *position_embeddings)
        dropout = self.attention_dropout if self.training else 0.0
        outputs = []
        if num_sinks:
            sink_query, sink_key, sink_value = (states[:, :, :num_sinks] for states in (query, key, value))
            attended = scaled_dot_product_attention(
                sink_query, sink_key, sink_value, dropout_p=dropout, is_causal=True, scale=self.scaling
            )
            outputs.append(attended.transpose(1, 2))
        keys, values = key.transpose(1, 2), value.transpose(1, 2)  # (B, sinks + T, H, D)
        if carried is not None:
            keys, values = (
                torch.cat((new[:, :num_sinks], old.to(new.dtype), new[:, num_sinks:]), dim=1)
                for new, old in zip((keys, values), carried, strict=True)
            )
            rule = rule._replace(num_carried=carried[0].shape[1])
        attended = windowed_attention(
            query[:, :, num_sinks:], keys.transpose(1, 2), values.transpose(1, 2), rule, column, self.scaling, dropout
        )
        outputs.append(attended.transpose(1, 2))
        out = self.dense(self.gated(torch.cat(outputs, dim=1).flatten(2), hidden_states))
        last = slice(max(num_sinks, keys.shape[1] - self.window), None)
        return out, (keys[:, last].detach().clone(), values[:, last].detach().clone())

    @property
    def window(self) -> int | None:
        """Number of recent tokens that a query sees besides its own; None for all."""
        return self.config.windows[self.layer_idx]

    def heads(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, SinkColumn | None]:
        """Return rotated queries and keys, values, each ``(B, H, T, D)``, and the arm's column."""
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
        """Run the model's ``attn_implementation``.

        Returns:
            The output ``(B, T, H, D)`` and the probabilities or None.

        Raises:
            ValueError: the implementation supports neither the arm's column nor windowed layers.
        """
        implementation = self.config._attn_implementation
        kwargs |= {"scaling": self.scaling, "dropout": self.attention_dropout if self.training else 0.0}
        if "rule" in kwargs:
            interface, kwargs = RULE_ATTENTION[implementation], kwargs | {"column": column}
        elif self.window is not None and implementation not in OWN_RULE_ATTENTION:
            raise ValueError(
                f"attn_implementation={implementation!r} does not support windowed layers: use 'sdpa' or 'eager'"
            )
        elif column is None:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        elif implementation in COLUMN_ATTENTION:
            interface, kwargs = COLUMN_ATTENTION[implementation], kwargs | {"column": column}
        else:
            raise ValueError(
                f"attn_implementation={implementation!r} does not support sink.kind={self.config.sink_kind!r}: "
                "use 'sdpa' or 'eager'"
            )
        return interface(self, query, key, value, mask, **kwargs)

    def column(self, query: Tensor) -> SinkColumn | None:
        """Return the extra softmax column, or None.

        Args:
            query: ``(B, H, T, D)``, before rotary embedding.
        """
        return None

    def gated(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """Transform the heads' outputs ``(B, T, hidden)`` before the output projection."""
        return out

    def initialise(self) -> None:
        """Initialise the arm's own parameters, except its linear layers."""


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to the first dimensions of ``states`` ``(B, T, H, D)``.

    Args:
        cos, sin: ``(1 or B, T, rotated dimensions)``; the second half of the last dimension repeats
            the first, as in transformers.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def score_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of a column's score: at least float32, as for scores inside the kernels."""
    return torch.promote_types(query.dtype, torch.float32)


def eager_with_column(module, query, key, value, mask, *, column, scaling, dropout, **kwargs):
    out, weights = explicit_attention(query, key, value, mask, column, scaling, dropout)
    return out.transpose(1, 2), weights


def sdpa_with_column(module, query, key, value, mask, *, column, scaling, dropout, **kwargs):
    return attention_with_column(query, key, value, mask, column, scaling, dropout).transpose(1, 2), None


def eager_windowed(module, query, key, value, mask, *, rule, column, scaling, dropout, **kwargs):
    out, weights = windowed_probabilities(query, key, value, rule, column, scaling, dropout)
    return out.transpose(1, 2), weights


def sdpa_windowed(module, query, key, value, mask, *, rule, column, scaling, dropout, **kwargs):
    return windowed_attention(query, key, value, rule, column, scaling, dropout).transpose(1, 2), None


# Attention functions that support a sink's column, by ``attn_implementation``.
COLUMN_ATTENTION: dict[str, Callable] = {"eager": eager_with_column, "sdpa": sdpa_with_column}
# Attention functions of windowed layers, which take a `WindowRule`.
RULE_ATTENTION: dict[str, Callable] = {"eager": eager_windowed, "sdpa": sdpa_windowed}
# Attention functions that know the windows of the layers without a `WindowRule`.
OWN_RULE_ATTENTION: set[str] = set()


def register_column_attention(name: str, function: Callable) -> None:
    """Register an attention function that supports arms with a column.

    Args:
        name: value of ``attn_implementation`` that selects the function.
        function: as in transformers' `AttentionInterface`, with the extra keyword ``column``.
    """
    COLUMN_ATTENTION[name] = function


def register_window_attention(name: str, function: Callable | None = None) -> None:
    """Register an attention function that supports windowed layers.

    Args:
        name: value of ``attn_implementation`` that selects the function.
        function: like that of `register_column_attention`, with the further keyword ``rule`` (a
            `WindowRule`), for windowed layers. None: the layers' ordinary attention function of
            this name takes the window from ``module.window`` and applies the rule itself.
    """
    if function is None:
        OWN_RULE_ATTENTION.add(name)
    else:
        RULE_ATTENTION[name] = function
