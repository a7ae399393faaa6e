"""A reference of the streaming rule for any model, and a check of the cache against it.

The reference shares no code with the cache and knows nothing about the model's positions. The stock
model computes it, without a cache: for each query, it reads the tokens that are in the cache at
that time, and nothing else. Its own code thus gives each key its position within the cache. Before
each layer, the states of all tokens but the query are replaced by those of their own step, since a
token's key and value do not change after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..models.cache_argument import CACHE
from ..models.config import num_prepended_sinks
from .cache import StreamingCache
from .wrappers import decoder_of

SHAPES = ((0, 6), (1, 5), (4, 2))  # num_kept and window
NUM_TOKENS = 18
TOLERANCE = 1e-4


def reference_logits(model: PreTrainedModel, ids: Tensor, num_kept: int, window: int) -> Tensor:
    """Compute the logits of one stream by the streaming rule, slowly.

    Args:
        ids: the stream ``(T,)``. Memory grows with ``T * (num_kept + window)``.

    Returns:
        Logits ``(T, V)``.

    Raises:
        ValueError: the model has sink tokens, which it puts in front of every text.
    """
    if num_prepended_sinks(model.config):
        raise ValueError("the model has sink tokens of its own: check one with another kind of sink, or with none")
    cached = [cached_tokens(query, num_kept, window) for query in range(len(ids))]
    return _logits_of(model, ids, cached, num_kept, window)


def cached_tokens(query: int, num_kept: int, window: int) -> list[int]:
    """Return the tokens in the cache for the query of a token, in the order of their positions."""
    return [*range(min(num_kept, query)), *range(max(num_kept, query - window), query)]


@torch.no_grad()
def _logits_of(model: PreTrainedModel, ids: Tensor, cached: list[list[int]], num_kept: int, window: int) -> Tensor:
    """Return the logits ``(T, V)`` of queries that see the tokens ``cached[t]`` and themselves."""
    tokens = torch.zeros(len(ids), max(map(len, cached)) + 1, dtype=torch.long)
    for query, before in enumerate(cached):
        tokens[query, : len(before) + 1] = torch.tensor([*before, query])
    columns = torch.tensor([len(before) for before in cached])  # of the queries; a causal model ignores later ones
    tokens, columns = tokens.to(ids.device), columns.to(ids.device)
    decoder = decoder_of(model)
    with past_states(decoder_layers(decoder), tokens, columns), stock_settings(decoder.config, num_kept, window):
        logits = model(ids[tokens], use_cache=False).logits
    return logits[torch.arange(len(ids), device=ids.device), columns]


@contextmanager
def past_states(layers: nn.ModuleList, tokens: Tensor, columns: Tensor) -> Iterator[None]:
    """Give each layer, for token ``tokens[t, i]`` of row t, the states from that token's own row.

    In row t, the token in column ``columns[t]`` is t itself.
    """
    rows = torch.arange(len(columns), device=columns.device)

    def replace(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = args[0] if args else kwargs["hidden_states"]
        own = states[..., rows, columns, :]  # (T, D); Gemma 3n has several streams of states
        states = own[..., tokens, :]
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def stock_settings(config: PreTrainedConfig, num_kept: int, window: int) -> Iterator[None]:
    """Reduce a model's own windows to that of the cache, where layers do not see all of it.

    Windowed layers of sinklm keep at most the tokens that the cache keeps. Others keep none, unless
    their window covers the whole cache. SDPA of transformers 5.17 ignores a limit of the scores.
    """
    changes: dict[str, Any] = {}
    if getattr(config, "attn_logit_softcapping", None) is not None:
        changes["_attn_implementation"] = "eager"
    trained, own = getattr(config, "layer_windows", None), getattr(config, "sliding_window", None)
    if trained is not None:
        changes["layer_windows"] = [own and min(own, window) for own in trained]
        changes["num_kept"] = min(config.num_kept, num_kept)
    elif own is not None and window + 1 < own <= num_kept + window:
        changes["sliding_window"] = window + 1
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def decoder_layers(decoder: Any) -> nn.ModuleList:
    """Return the layers of a decoder: its list of as many modules as it has layers."""
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == decoder.config.num_hidden_layers:
            return module
    raise ValueError(
        f"{type(decoder).__name__} has no nn.ModuleList of its {decoder.config.num_hidden_layers} layers, so its "
        "states cannot be observed"
    )


def check_family(
    model: PreTrainedModel,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    num_tokens: int = NUM_TOKENS,
    tolerance: float = TOLERANCE,
) -> float:
    """Compare a model's streams with `reference_logits`.

    Random tokens are read one by one and in chunks, by a single stream and by a batch with padding,
    in caches of all ``shapes``. Prompts are shorter and longer than the cache.

    Args:
        model: in float32 or float64, with attention that is not flat. That of a model with default
            initial weights is flat; `random_model` has larger weights.
        shapes: ``(num_kept, window)`` of each cache.
        num_tokens: length of the stream, at least ``2 * (num_kept + window) + 6``.
        tolerance: largest difference, as a fraction of the largest logit.

    Returns:
        The largest difference found, as a fraction of the largest logit.

    Raises:
        ValueError: the model is not supported, or the check proves nothing, because the stream is
            too short, the precision too low or the attention too flat.
        AssertionError: the logits differ by more than the tolerance.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model is in {model.dtype}, whose rounding hides errors: call model.float() first")
    shortest = 2 * max(num_kept + window for num_kept, window in shapes) + 6
    if num_tokens < shortest:
        raise ValueError(f"num_tokens is {num_tokens}: for these caches it must be at least {shortest}")
    num_ids = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, num_ids, (num_tokens,), generator=torch.Generator().manual_seed(0)).to(model.device)
    return max(_check_shape(model, ids, *shape, tolerance) for shape in shapes)


def _check_shape(model: PreTrainedModel, ids: Tensor, num_kept: int, window: int, tolerance: float) -> float:
    paddings = (0, len(ids) // 4, 2 * len(ids) // 3)  # of the rows of a batch
    expected = [reference_logits(model, ids[start:], num_kept, window) for start in paddings]
    scale = float(expected[0].abs().max())
    cached = [cached_tokens(query, num_kept, window) for query in range(len(ids))]
    misplaced = _logits_of(model, ids, [[*before[1:], *before[:1]] for before in cached], num_kept, window)
    if float((misplaced - expected[0]).abs().max()) < 100 * tolerance * scale:
        raise ValueError(
            "the logits hardly depend on the positions of keys, so a comparison proves nothing: use a trained model, "
            "or larger weights as in random_model"
        )
    worst = 0.0
    for padding in (paddings[:1], paddings):
        for sizes in readings(len(ids), num_kept + window, is_padded=len(padding) > 1):
            found = stream_rows(model, ids, padding, sizes, num_kept, window)
            for row, logits in zip(found, expected, strict=False):
                difference = float((row - logits).abs().max()) / scale
                if not difference <= tolerance:  # also if it is NaN
                    raise AssertionError(
                        f"model type {decoder_of(model).config.model_type!r}, cache {num_kept}+{window}, pieces of "
                        f"{sizes} tokens, padding {padding}: logits differ from the streaming rule by "
                        f"{difference:.1e} of their scale, more than {tolerance:.0e}"
                    )
                worst = max(worst, difference)
    return worst


def readings(num_tokens: int, num_cached: int, *, is_padded: bool) -> list[list[int]]:
    """Return sizes of pieces in which a stream is read."""
    short, long = max(1, num_cached // 2), num_cached + 3
    in_chunks = [[short, 1, long], [long, 1, 1, short]]
    in_chunks = [[*sizes, num_tokens - sum(sizes)] for sizes in in_chunks]
    return in_chunks if is_padded else [[1] * num_tokens, *in_chunks]


@torch.no_grad()
def stream_rows(
    model: PreTrainedModel, ids: Tensor, padding: Sequence[int], sizes: list[int], num_kept: int, window: int
) -> list[Tensor]:
    """Return the logits ``(T - p, V)`` of the streams ``ids[p:]``, read as a batch in pieces.

    Args:
        padding: p of each row of the batch; the row begins with as many padding inputs.
    """
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, chunk_size=max(sizes) - 1 or 1)
    batch = ids.expand(len(padding), -1)
    starts = torch.tensor(padding, device=ids.device)[:, None]
    mask = (torch.arange(len(ids), device=ids.device) >= starts).long()
    logits, end = [], 0
    for piece in batch.split(sizes, dim=1):
        end += piece.shape[1]
        seen = mask[:, :end] if len(padding) > 1 else None
        logits.append(model(piece, attention_mask=seen, use_cache=True, **{CACHE: cache}).logits)
    rows = torch.cat(logits, dim=1)
    return [row[start:] for row, start in zip(rows, padding, strict=True)]


def random_model(config: PreTrainedConfig, *, std: float = 0.3) -> PreTrainedModel:
    """Return a model with random weights that are large enough for sharp attention.

    No weight has its initial value: a norm whose weights are all 1 commutes with a rotation.

    Args:
        std: standard deviation of all matrices, and of the change of all vectors, such as the
            weights of norms; it suits widths of about 50.
    """
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model
