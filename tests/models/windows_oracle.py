"""A slow reference of windowed layers: each query alone, with an explicit list of keys."""

import torch

from ..streaming.oracle import attend, heads, rotary_score, sink_of
from ..streaming.tiny import inverse_frequencies


def windowed_logits(model, ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Return logits ``(T, V)`` of sinks and text ``(T,)``, with gradients, in float64.

    Args:
        window: replaces the windows of the configuration.
    """
    config, decoder = model.config, model.gpt_neox
    head_size = config.hidden_size // config.num_attention_heads
    scaling = head_size**-0.5 * decoder.rotary_emb.attention_scaling**2  # YaRN scales both tables
    score = rotary_score(inverse_frequencies(config), scaling)
    x = decoder.embed_in(ids)
    for layer, own_window in zip(decoder.layers, config.windows, strict=True):
        # With full attention, every key is within the window.
        rule = (0, len(ids)) if own_window is None else (config.num_kept, window or own_window)
        attn, normed = layer.attention, layer.input_layernorm(x)
        q, k, v = heads(attn.query_key_value(normed), config.num_attention_heads).chunk(3, dim=-1)
        attended = attend(q, k, v, *rule, score, sink_of(attn, q))
        for gates in (getattr(attn, name) for name in ("gate", "head_gate") if hasattr(attn, name)):
            gate = 1 / (1 + torch.exp(-normed @ gates.weight.T))  # of each dimension or of each head
            attended = (attended.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2)
        attended = attn.dense(attended)
        if config.use_parallel_residual:
            x = x + attended + layer.mlp(layer.post_attention_layernorm(x))
        else:
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.final_layer_norm(x))
