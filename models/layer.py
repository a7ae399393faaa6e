"""GPT-NeoX layer with the attention of the configured ``sink.kind`` and fused kernels."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXMLP

from .arms import ARMS
from .attention import SinkAttention
from .config import SinkGPTNeoXConfig
from .float8 import Float8Linear
from .fused_layer import BiasedGelu, is_fused, linear_but_bias_gradient


class SinkGPTNeoXLayer(GPTNeoXLayer):
    """Maps ``(B, T, hidden)`` to ``(B, T, hidden)``; the forward pass is that of transformers."""

    def __init__(self, config: SinkGPTNeoXConfig, layer_idx: int):
        GradientCheckpointingLayer.__init__(self)
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = ARMS.get(config.sink_kind, SinkAttention)(config, layer_idx)
        self.mlp = SinkMLP(config)

    def forward(self, hidden_states: Tensor, *args: Any, segment: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Like the layer of transformers.

        Args:
            segment: arguments of `SinkAttention.segment`. The keys and values for the next segment
                are then returned too.
        """
        if segment is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended, carried = self.attention.segment(self.input_layernorm(hidden_states), **segment)
        attended = self.post_attention_dropout(attended)
        if self.use_parallel_residual:
            inner = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
            return inner + attended + hidden_states, carried
        attended = attended + hidden_states
        return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(attended))) + attended, carried


class SinkMLP(GPTNeoXMLP):
    """GPT-NeoX MLP.

    In compiled training on a GPU, one kernel computes GELU and the gradient of the bias before it.
    """

    def __init__(self, config: SinkGPTNeoXConfig):
        super().__init__(config)
        self.is_gelu = config.hidden_act == "gelu"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``(B, T, hidden)`` to ``(B, T, hidden)``."""
        if not (self.is_gelu and is_fused(hidden_states)):
            return super().forward(hidden_states)
        inner, carrier = linear_but_bias_gradient(self.dense_h_to_4h, hidden_states)
        inner, peak = BiasedGelu.apply(inner, self.dense_h_to_4h.bias, carrier)
        if isinstance(self.dense_4h_to_h, Float8Linear):
            return self.dense_4h_to_h(inner, peak)
        return self.dense_4h_to_h(inner)
