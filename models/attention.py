"""GPT-NeoX's attention for the compiled training pass, in a layout that saves copies."""

import torch
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention


class CausalAttention(GPTNeoXAttention):
    """The same parameters and the same results as transformers' attention.

    Where no mask and no cache is given it compiles to less: heads stay behind positions, ``(B, T, heads, head_dim)``,
    as the projections write and read them. transformers turns queries and keys to ``(B, heads, T, head_dim)``, and the
    kernel's output and every gradient have to be copied back: 12 bytes in 16 bit for each value of the hidden states.
    """

    def forward(self, hidden_states, attention_mask=None, layer_past=None, position_embeddings=None, **kwargs):
        is_sdpa = self.config._attn_implementation == "sdpa"
        if torch.compiler.is_compiling() and is_sdpa and attention_mask is None and layer_past is None:
            return self._causal(hidden_states, *position_embeddings), None
        return super().forward(hidden_states, attention_mask, layer_past, position_embeddings, **kwargs)

    def _causal(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        projected = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_size))
        query, key, value = projected.chunk(3, dim=-1)  # (B, T, heads, head_dim)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        attended = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=True,
            scale=self.scaling,
        )
        return self.dense(attended.transpose(1, 2).flatten(-2))


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first dimensions of ``(B, T, heads, head_dim)`` turned by the angles of their positions.

    Args:
        cos, sin: ``(1 or B, T, rotated dimensions)``, the second half like the first, as transformers makes them.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
