"""What quantization costs a model: the loss of each sample, and its activations without it."""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.checked import check_ids, refuse_nonfinite_losses
from ..models.config import num_prepended_sinks
from ..streaming import stream_losses
from ..streaming.layers import own_rules
from ..streaming.quantized import NUM_RECENT
from ..streaming.wrappers import decoder_of
from .compare import stderr_of_mean
from .quantization import arithmetic, quantized
from .quantization_formats import FORMATS
from .sinks import Sequences, sequences_of_store, sequences_of_texts
from .sinks.statistics import find_massive, summarize_massive

MOST_POSITIONS = 2048  # of a sample, if the models were trained on longer ones
KV_BATCH = 16  # samples that are streamed at once

Progress = Callable[[int], None]  # called with the number of samples done since the last call


@dataclass(frozen=True)
class Increase:
    """Loss of a quantized model minus that of the model itself, in nats per token.

    ``stderr`` is that of the mean of the differences of the samples; None with one sample.
    """

    format: str
    loss: float
    increase: float
    stderr: float | None
    arithmetic: str


def read_samples(data: Path, tokenizer: PreTrainedTokenizerBase, num_samples: int, num_tokens: int) -> Sequences:
    """Cut samples with ``num_tokens`` tokens of text from a text file or a token store.

    Samples of models with different numbers of sinks have the same text.

    Raises:
        FileNotFoundError: there is no such file or store.
        ValueError: the text is too short, or the store was made with another tokenizer.
    """
    from .perplexity import text_prefix

    num_positions = num_tokens + len(text_prefix(tokenizer))
    if data.is_dir():
        return sequences_of_store(data, tokenizer, num_samples, num_positions)
    return sequences_of_texts([data], tokenizer, num_samples, num_positions)


def num_text_tokens(model: PreTrainedModel, num_prefix: int, wanted: int | None) -> int:
    """Return how many tokens of text a sample has: the wanted number, or what fits.

    Raises:
        ValueError: the wanted number does not fit the trained length after sinks and prefix.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    num_others = num_prepended_sinks(model.config) + num_prefix
    if wanted is None:
        return min(longest or MOST_POSITIONS, MOST_POSITIONS) - num_others
    if longest and wanted + num_others > longest:
        raise ValueError(f"--seq-length {wanted} is more than the {longest - num_others} tokens that fit: lower it")
    return wanted


def sample_losses(model: PreTrainedModel, samples: Sequences, progress: Progress | None = None) -> Tensor:
    """Return the mean loss ``(N,)`` of each sample in nats per token, in float64.

    All tokens of text but the first are scored, so that models with and without sinks score the
    same ones. A sample is one forward pass: one scale per tensor is one scale per sample.

    Raises:
        ValueError: a loss is not finite, or an id is outside of the vocabulary.
    """
    check_ids(samples.ids, model)
    first = samples.num_prefix
    losses = []
    for row in samples.ids.to(model.device, torch.long):
        with torch.inference_mode():
            logits = model(row[None], use_cache=False).logits[0, first:-1]
            each = nn.functional.cross_entropy(_wide(logits), row[first + 1 :], reduction="none")
        losses.append(refuse_nonfinite_losses(each.double()).mean().cpu())
        if progress is not None:
            progress(1)
    return torch.stack(losses)


def num_kept_tokens(config: PreTrainedConfig) -> int:
    """Return how many first tokens the windowed layers keep; 0 without windowed layers."""
    return max((rule.num_kept for rule in own_rules(config) if rule is not None), default=0)


def check_kv(config: PreTrainedConfig, num_positions: int) -> None:
    """Raise a ValueError if no key or value would be quantized in samples of this length.

    Args:
        config: of the model's decoder.
        num_positions: of a sample, with sinks and prefix.
    """
    widest = max(num_positions if rule is None else rule.window for rule in own_rules(config))
    if widest <= NUM_RECENT < num_positions:
        raise ValueError(
            f"kv8 would quantize nothing: the last {NUM_RECENT} tokens are exact, and the windows of this model have "
            f"at most {widest} tokens: leave kv8 out of --formats"
        )
    longest = min(widest, num_positions - 2 - num_kept_tokens(config))  # distance to a key that is not kept
    if longest <= NUM_RECENT:
        raise ValueError(
            f"kv8 would quantize nothing: the last {NUM_RECENT} tokens are exact, and in a sample of {num_positions} "
            f"positions this model sees at most {max(longest, 0)} before its own: raise --seq-length, or leave kv8 "
            "out of --formats"
        )


def cached_losses(
    model: PreTrainedModel, samples: Sequences, kv_dtype: Any, progress: Progress | None = None
) -> Tensor:
    """Like `sample_losses`, with a cache of all tokens whose keys and values are ``kv_dtype``.

    Windowed layers see what they see without a cache. Tokens that they keep are exact, and so are
    the last 32; no other token is, neither sinks nor first tokens. Each token is a pass of its own,
    since tokens of a pass see more than 32 in full precision.
    """
    check_ids(samples.ids, model)
    num_kept = num_kept_tokens(decoder_of(model).config)
    window = samples.ids.shape[1] + num_prepended_sinks(model.config)
    losses = []
    for rows in samples.ids.split(KV_BATCH):
        chunks = stream_losses(model, rows, num_kept=num_kept, window=window, chunk_size=1, kv_dtype=kv_dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the cache .* is too large")  # it has the sample's size
            each = torch.cat(list(chunks), dim=1)[:, samples.num_prefix :]
        losses.append(refuse_nonfinite_losses(each.double()).mean(1).cpu())
        if progress is not None:
            progress(len(rows))
    return torch.cat(losses)


def measure_increase(
    model: PreTrainedModel, samples: Sequences, name: str, losses: Tensor, progress: Progress | None = None
) -> Increase:
    """Measure a format of `FORMATS`.

    Args:
        losses: of the model itself, ``(N,)``, from `sample_losses`.

    Raises:
        ValueError: the model does not fit the format, a loss is not finite, or nothing would be
            quantized.
    """
    kv_dtype, config = FORMATS[name].kv_dtype, decoder_of(model).config
    if kv_dtype:
        check_kv(config, samples.ids.shape[1] + num_prepended_sinks(model.config))
        found = cached_losses(model, samples, kv_dtype, progress)
    else:
        found = sample_losses(quantized(model, name), samples, progress)
    differences = (found - losses).tolist()
    return Increase(
        format=name,
        loss=found.mean().item(),
        increase=math.fsum(differences) / len(differences),
        stderr=stderr_of_mean(differences),
        arithmetic=arithmetic(name, model.device, num_kept_tokens(config) if kv_dtype else 0),
    )


@torch.inference_mode()
def activations(model: PreTrainedModel, samples: Sequences) -> dict[str, Any]:
    """Measure the residual stream of the unquantized model, at the inputs of all layers.

    Returns:
        ``largest_activation`` and ``largest_ratio`` (magnitude over the median of its layer), both
        means over samples of the largest, and ``massive_activations`` as in `eval.sinks`.
    """
    largest, ratios = [], []
    massive: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for row in samples.ids.to(model.device, torch.long):
        outputs: Any = model(row[None], use_cache=False, output_hidden_states=True, logits_to_keep=1)
        inputs = outputs.hidden_states[: model.config.num_hidden_layers]
        magnitudes = [_wide(states).abs() for states in inputs]
        largest.append(max(m.max().item() for m in magnitudes))
        ratios.append(max((m.max() / m.median().clamp(min=1e-6)).item() for m in magnitudes))
        for i, states in enumerate(inputs):
            for position, dimension, value, ratio in find_massive(states):
                massive.setdefault((i, position, dimension), []).append((value, ratio))
    num_samples = len(samples.ids)
    found = summarize_massive(massive, num_samples)
    return {
        "largest_activation": math.fsum(largest) / num_samples,
        "largest_ratio": math.fsum(ratios) / num_samples,
        "massive_activations": [asdict(activation) for activation in found],
    }


def ids_sha256(samples: Sequences) -> str:
    """Return a digest of the tokens of text, which is equal for samples that can be compared."""
    text = samples.ids[:, samples.num_prefix :].to(torch.int64).contiguous()
    return hashlib.sha256(text.numpy().tobytes()).hexdigest()


def as_json(losses: Tensor, increases: Sequence[Increase], found: dict[str, Any]) -> dict[str, Any]:
    """Return all numbers of one run, ready for JSON."""
    return {"loss": losses.mean().item(), "formats": [asdict(increase) for increase in increases], **found}


def _wide(states: Tensor) -> Tensor:
    """Convert to float32, or keep a wider type."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
