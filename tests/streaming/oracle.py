"""A slow and simple reference of the streaming rule: each query alone, with explicit lists of keys.

It uses a model's own weights in float64, without caches, slots, phases or chunks.
"""

import torch

from .tiny import inverse_frequencies


def contract_keys(t: int, num_kept: int, window: int) -> list[tuple[int, int]]:
    """Return the keys that the query of token t sees, as (token, distance) pairs."""
    kept = [(i, min(t, num_kept + window) - i) for i in range(min(num_kept, t))]
    recent = [(j, t - j) for j in range(max(num_kept, t - window), t + 1)] if t >= num_kept else [(t, 0)]
    return kept + recent


def dense_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Return logits ``(T, V)`` of ordinary causal attention, with gradients."""
    return ORACLES[model.config.model_type](model, ids, 0, len(ids))


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


def attend(q, k, v, num_kept: int, window: int, score, sink=None) -> torch.Tensor:
    """Attention of T queries: ``(H, T, D)`` to ``(T, H * D)``.

    Args:
        score: maps ``(query (H, D), key (H, D), distance, position)`` to ``(H,)``; ``position`` is
            the query's position in the cache.
        sink: scores ``(H, T)`` and values ``(H, D)`` of one more key, which every query sees.
    """
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
    out = []
    for t in range(q.shape[1]):
        keys, position = contract_keys(t, num_kept, window), min(t, num_kept + window)
        scores = torch.stack([score(q[:, t], k[:, j], distance, position) for j, distance in keys], dim=-1)
        values = torch.stack([v[:, j] for j, _ in keys], dim=1)  # (H, keys, D)
        if sink is not None:
            scores = torch.cat((scores, sink[0][:, t, None]), dim=-1)
            values = torch.cat((values, sink[1][:, None]), dim=1)
        out.append((scores.softmax(-1)[..., None] * values).sum(1).flatten())
    return torch.stack(out)


def rotary_score(inv_freq, scaling, interleaved=False):
    return lambda q, k, distance, _: (rotate(q, distance, inv_freq, interleaved) * k).sum(-1) * scaling


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
    for index, layer in enumerate(decoder.layers):
        attn, normed = layer.attention, layer.input_layernorm(x)
        q, k, v = heads(attn.query_key_value(normed), config.num_attention_heads).chunk(3, dim=-1)
        own = config.layer_windows[index] if getattr(config, "layer_windows", None) else None
        shape = (num_kept, window) if own is None else (min(num_kept, config.num_kept), min(window, own))
        attended = attend(q, k, v, *shape, score, sink_of(attn, q))
        if hasattr(attn, "gate"):
            attended = attended / (1 + torch.exp(-normed @ attn.gate.weight.T))
        if hasattr(attn, "head_gate"):
            gates = [1 / (1 + torch.exp(-normed @ row)) for row in attn.head_gate.weight]  # (T,) of each head
            outputs = attended.split(head_dim, dim=-1)
            attended = torch.cat([out * gate[:, None] for out, gate in zip(outputs, gates, strict=True)], dim=-1)
        attended = attn.dense(attended)
        if config.use_parallel_residual:
            x = x + attended + layer.mlp(layer.post_attention_layernorm(x))
        else:
            x = x + attended
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.final_layer_norm(x))


def sink_of(attn, q):
    """Return an arm's sink for `attend`, from queries ``(H, T, D)`` before rotary embedding."""
    kind = getattr(attn.config, "sink_kind", "none")
    nothing = torch.zeros_like(q[:, 0])
    if kind == "zero":
        return torch.zeros_like(q[..., 0]), nothing
    if kind == "logit":
        return attn.sink_logit[:, None].expand(q.shape[:2]), nothing
    if kind == "kv_bias":
        return torch.einsum("htd,hd->ht", q, attn.sink_key) * q.shape[-1] ** -0.5, attn.sink_value
    return None


def llama(model, ids, num_kept, window):
    """Llama and models with the same architecture: Mistral, Qwen 2 and 3, Gemma, OLMo."""
    config, decoder = model.config, model.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaling = head_dim**-0.5 * decoder.rotary_emb.attention_scaling**2  # YaRN scales both tables
    score = rotary_score(inverse_frequencies(config), scaling)
    x = decoder.embed_tokens(ids)
    for layer in decoder.layers:
        attn, normed = layer.self_attn, layer.input_layernorm(x)
        q = heads(attn.q_proj(normed), config.num_attention_heads)
        k = heads(attn.k_proj(normed), config.num_key_value_heads)
        v = heads(attn.v_proj(normed), config.num_key_value_heads)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        x = x + attn.o_proj(attend(q, k, v, num_kept, window, score))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


def gemma3(model, ids, num_kept, window):
    config, decoder = model.config, model.model
    x = decoder.embed_tokens(ids)
    for layer, layer_type in zip(decoder.layers, config.layer_types, strict=True):
        attn, normed = layer.self_attn, layer.input_layernorm(x)
        q = attn.q_norm(heads(attn.q_proj(normed), config.num_attention_heads))
        k = attn.k_norm(heads(attn.k_proj(normed), config.num_key_value_heads))
        v = heads(attn.v_proj(normed), config.num_key_value_heads)
        score = rotary_score(inverse_frequencies(config, layer_type), config.query_pre_attn_scalar**-0.5)
        is_windowed = layer_type == "sliding_attention"
        shape = (0, min(window, config.sliding_window - 1)) if is_windowed else (num_kept, window)
        x = x + layer.post_attention_layernorm(attn.o_proj(attend(q, k, v, *shape, score)))
        x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
    return model.lm_head(decoder.norm(x))


def olmo2(model, ids, num_kept, window):
    config, decoder = model.config, model.model
    score = rotary_score(inverse_frequencies(config), (config.hidden_size // config.num_attention_heads) ** -0.5)
    x = decoder.embed_tokens(ids)
    for layer in decoder.layers:
        attn = layer.self_attn
        q = heads(attn.q_norm(attn.q_proj(x)), config.num_attention_heads)
        k = heads(attn.k_norm(attn.k_proj(x)), config.num_key_value_heads)
        v = heads(attn.v_proj(x), config.num_key_value_heads)
        attended = attn.o_proj(attend(q, k, v, num_kept, window, score))
        x = x + layer.post_attention_layernorm(attended)
        x = x + layer.post_feedforward_layernorm(layer.mlp(x))
    return model.lm_head(decoder.norm(x))


def phi(model, ids, num_kept, window):
    config, decoder = model.config, model.model
    score = rotary_score(inverse_frequencies(config), (config.hidden_size // config.num_attention_heads) ** -0.5)
    x = decoder.embed_tokens(ids)
    for layer in decoder.layers:
        attn, normed = layer.self_attn, layer.input_layernorm(x)
        q = heads(attn.q_proj(normed), config.num_attention_heads)
        k = heads(attn.k_proj(normed), config.num_key_value_heads)
        v = heads(attn.v_proj(normed), config.num_key_value_heads)
        x = x + attn.dense(attend(q, k, v, num_kept, window, score)) + layer.mlp(normed)
    return model.lm_head(decoder.final_layernorm(x))


def gptj(model, ids, num_kept, window):
    config, decoder = model.config, model.transformer
    inv_freq = 10000.0 ** (-torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim)
    score = rotary_score(inv_freq, (config.n_embd // config.n_head) ** -0.5, interleaved=True)
    x = decoder.wte(ids)
    for block in decoder.h:
        attn, normed = block.attn, block.ln_1(x)
        q, k, v = (heads(proj(normed), config.n_head) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        x = x + attn.out_proj(attend(q, k, v, num_kept, window, score)) + block.mlp(normed)
    return model.lm_head(decoder.ln_f(x))


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """The slopes of the ALiBi paper for a power of two of heads."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, dtype=torch.float64) / num_heads)


def mpt(model, ids, num_kept, window):
    config, decoder = model.config, model.transformer
    scaling, slopes = (config.d_model // config.n_heads) ** -0.5, alibi_slopes(config.n_heads)
    x = decoder.wte(ids)
    for block in decoder.blocks:
        q, k, v = (heads(states, config.n_heads) for states in block.attn.Wqkv(block.norm_1(x)).chunk(3, dim=-1))
        attended = attend(q, k, v, num_kept, window, lambda q, k, d, _: (q * k).sum(-1) * scaling - slopes * d)
        x = x + block.attn.out_proj(attended)
        x = x + block.ffn.down_proj(block.ffn.act(block.ffn.up_proj(block.norm_2(x))))
    return model.lm_head(decoder.norm_f(x))


def falcon(model, ids, num_kept, window):
    config, decoder = model.config, model.transformer
    num_heads, head_dim = config.num_attention_heads, config.head_dim
    slopes = alibi_slopes(num_heads).bfloat16()

    def alibi_score(q, k, distance, position):  # Falcon rounds slope * position to bfloat16 and scales the sum
        return ((q * k).sum(-1) + (slopes * (position - distance)).double()) * head_dim**-0.5

    score = alibi_score if config.alibi else rotary_score(inverse_frequencies(config), head_dim**-0.5)
    x = decoder.word_embeddings(ids)
    for block in decoder.h:
        attn = block.self_attention
        two_norms = config.new_decoder_architecture
        normed = block.ln_attn(x) if two_norms else block.input_layernorm(x)
        q, k, v = split_falcon(attn.query_key_value(normed), config)
        attended = attn.dense(attend(q, k, v, num_kept, window, score))
        if config.parallel_attn:
            x = x + attended + block.mlp(block.ln_mlp(x) if two_norms else normed)
        else:
            x = x + attended
            x = x + block.mlp(block.post_attention_layernorm(x))
    return model.lm_head(decoder.ln_f(x))


def split_falcon(qkv, config):
    """Split Falcon's projection: the queries of a group, then its key and its value.

    Multi-query models have 1 group, the oldest models one group per head.
    """
    if config.new_decoder_architecture:
        num_groups = config.num_kv_heads
    else:
        num_groups = 1 if config.multi_query else config.num_attention_heads
    grouped = qkv.view(qkv.shape[0], num_groups, config.num_attention_heads // num_groups + 2, config.head_dim)
    q, k, v = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "olmo")
ORACLES = {
    "gpt_neox": gpt_neox,
    "gemma3_text": gemma3,
    "olmo2": olmo2,
    "phi": phi,
    "gptj": gptj,
    "mpt": mpt,
    "falcon": falcon,
}
ORACLES |= {"sink_gpt_neox": gpt_neox} | dict.fromkeys(LLAMAS, llama)
