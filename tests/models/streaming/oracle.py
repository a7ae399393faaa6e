"""The streaming contract, computed the slow and obvious way: every query by itself, over explicit lists of tokens.

Works on any model's own weights in float64. Nothing here knows of caches, slots, phases or chunks.
"""

import torch

from .tiny import inverse_frequencies


def contract_keys(t: int, num_kept: int, window: int) -> list[tuple[int, int]]:
    """What the query of token t sees: (token, distance) pairs."""
    kept = [(i, min(t, num_kept + window) - i) for i in range(min(num_kept, t))]
    recent = [(j, t - j) for j in range(max(num_kept, t - window), t + 1)] if t >= num_kept else [(t, 0)]
    return kept + recent


def rotate(x: torch.Tensor, distance: float, inv_freq: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the leading dimensions of ``(…, D)`` by a distance."""
    cos, sin = torch.cos(distance * inv_freq), torch.sin(distance * inv_freq)
    rotary_dim = 2 * len(inv_freq)
    out = x.clone()
    if interleaved:
        a, b = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
        out[..., 0:rotary_dim:2], out[..., 1:rotary_dim:2] = a * cos - b * sin, b * cos + a * sin
    else:
        a, b = x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
        out[..., :rotary_dim] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return out


def attend(q, k, v, num_kept: int, window: int, score) -> torch.Tensor:
    """Attention of T queries: ``(H, T, D)`` to ``(T, H * D)``; ``score(query, key, distance)`` gives ``(H,)``."""
    out = []
    for t in range(q.shape[1]):
        keys = contract_keys(t, num_kept, window)
        scores = torch.stack([score(q[:, t], k[:, j], distance) for j, distance in keys], dim=-1)  # (H, keys)
        values = torch.stack([v[:, j] for j, _ in keys], dim=1)  # (H, keys, D)
        out.append((scores.softmax(-1)[..., None] * values).sum(1).flatten())
    return torch.stack(out)


def rotary_score(inv_freq, scaling, interleaved=False):
    return lambda q, k, distance: (rotate(q, distance, inv_freq, interleaved) * k).sum(-1) * scaling


def heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``(T, H * D)`` -> ``(H, T, D)``."""
    return x.view(x.shape[0], num_heads, -1).transpose(0, 1)


@torch.no_grad()
def stream_logits(model, ids: torch.Tensor, num_kept: int, window: int) -> torch.Tensor:
    """Logits ``(T, V)`` of one stream ``(T,)``."""
    return ORACLES[model.config.model_type](model, ids, num_kept, window)


def gpt_neox(model, ids, num_kept, window):
    config, decoder = model.config, model.gpt_neox
    head_dim = config.hidden_size // config.num_attention_heads
    score = rotary_score(inverse_frequencies(config), head_dim**-0.5)
    x = decoder.embed_in(ids)
    for layer in decoder.layers:
        qkv = heads(layer.attention.query_key_value(layer.input_layernorm(x)), config.num_attention_heads)
        attended = layer.attention.dense(attend(*qkv.chunk(3, dim=-1), num_kept, window, score))
        if config.use_parallel_residual:
            x = x + attended + layer.mlp(layer.post_attention_layernorm(x))
        else:
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.final_layer_norm(x))


def llama(model, ids, num_kept, window):
    config, decoder = model.config, model.model
    num_heads, num_groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // num_heads
    score = rotary_score(inverse_frequencies(config), head_dim**-0.5)
    x = decoder.embed_tokens(ids)
    for layer in decoder.layers:
        attn, normed = layer.self_attn, layer.input_layernorm(x)
        q = heads(attn.q_proj(normed), num_heads)
        k = heads(attn.k_proj(normed), num_groups).repeat_interleave(num_heads // num_groups, dim=0)
        v = heads(attn.v_proj(normed), num_groups).repeat_interleave(num_heads // num_groups, dim=0)
        x = x + attn.o_proj(attend(q, k, v, num_kept, window, score))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


ORACLES = {"gpt_neox": gpt_neox, "llama": llama}
