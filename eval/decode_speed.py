"""Time and memory per decoded token against the cache size (Xiao et al. 2024, Figure 10)."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from ..models.cache_argument import CACHE
from ..models.checked import checked_passes
from ..models.config import default_num_kept
from ..streaming import Generator, StreamingCache
from ..streaming.layers import former_shape
from ..streaming.wrappers import decoder_of

METHODS = ("streaming", "cropped cache", "re-computation", "floor")
NUM_WARMUP = 5
CACHE_SIZES = (256, 512, 1024, 2048, 4096)
RECOMPUTE_SHARE = 5  # re-computation is timed for this many times fewer steps, because each runs a whole window
EXTRA_TOKENS = 8  # prompt tokens beyond the cache size, so that the cache is full and has evicted tokens


def default_caches(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return caches of `CACHE_SIZES` that keep the model's sinks, or 4 tokens without any.

    An export with full attention whose layers were all trained with one window has that one.
    """
    if former := former_shape(decoder_of(model).config):
        return [(former.num_kept, former.window)]
    num_kept = default_num_kept(model.config)
    return [(num_kept, size - num_kept) for size in CACHE_SIZES]


def measure_decoding(
    model: PreTrainedModel, num_kept: int, window: int, batch_size: int, *, num_steps: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Measure milliseconds per decoding step and peak GPU memory (weights included) of each method.

    - ``streaming``: sinklm's decoding step, compiled and captured in CUDA graphs on a GPU.
    - ``cropped cache``: transformers' eager loop with a `DynamicCache` cropped after each token.
    - ``re-computation``: the whole window through the eager model, without a cache.
    - ``floor``: bytes of the weights read in a step and of the cache, divided by the copy
      bandwidth.

    Args:
        num_kept: first tokens in the cache.
        window: recent tokens in the cache.
        batch_size: number of streams.
        num_steps: timed steps; of re-computation, a `RECOMPUTE_SHARE`-th and at least 3.
        bandwidth: bytes per second, see `copy_bandwidth`.

    Returns:
        a row for each method with the mean, the standard deviation and the number of its steps.

    Raises:
        ValueError: the model does not support the cache, or the logits are not finite.
    """
    cache_size = num_kept + window
    num_ids = min(256, model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(num_ids, (batch_size, cache_size + EXTRA_TOKENS), device=model.device)
    with torch.inference_mode(), checked_passes(model):
        model(ids[:, :EXTRA_TOKENS], logits_to_keep=1, use_cache=False)
    row = {"cache_size": cache_size, "batch_size": batch_size, "num_kept": num_kept, "window": window}
    costs = [
        time_streaming(model, ids, num_kept, window, num_steps),
        time_cropped_cache(model, ids[:, :cache_size], num_kept, num_steps),
        time_recomputation(model, ids[:, :cache_size], max(3, num_steps // RECOMPUTE_SHARE)),
    ]
    costs.append(StepCost([(bytes_read(model) + costs[0].cache_bytes) / bandwidth * 1e3], None))
    return [{"method": method, **cost.as_json(), **row} for method, cost in zip(METHODS, costs, strict=True)]


@dataclass(frozen=True)
class StepCost:
    """Times of steps, peak GPU memory (None on a CPU), and bytes of a streaming cache."""

    milliseconds: list[float]
    peak_bytes: int | None
    cache_bytes: int = 0
    is_eager: bool | None = None

    def as_json(self) -> dict[str, Any]:
        times = self.milliseconds
        return {
            "milliseconds": statistics.fmean(times),
            "stdev": statistics.stdev(times) if len(times) > 1 else None,
            "num_steps": len(times) if self.is_eager is not None else None,
            "is_eager": self.is_eager,
            "peak_bytes": self.peak_bytes,
        }


@torch.no_grad()
def time_streaming(model: PreTrainedModel, ids: torch.Tensor, num_kept: int, window: int, num_steps: int) -> StepCost:
    torch._dynamo.reset()  # each cache size and batch size is compiled separately
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
    generator = Generator(model, cache)
    with peak_memory(model.device) as peak:
        generator.decoder.prefill(ids)
        times = step_times(partial(generator.read_one, ids[:, :1].clone()), NUM_WARMUP, num_steps)
    return StepCost(times, peak.get("bytes"), cache.num_bytes, not generator.is_compiled)


@torch.no_grad()
def time_cropped_cache(model: PreTrainedModel, ids: torch.Tensor, num_kept: int, num_steps: int) -> StepCost:
    with peak_memory(model.device) as peak:
        cropped = CroppedCache(model, ids, num_kept)
        times = step_times(partial(cropped.step, ids[:, :1]), NUM_WARMUP, num_steps)
    return StepCost(times, peak.get("bytes"), is_eager=True)


@torch.no_grad()
def time_recomputation(model: PreTrainedModel, ids: torch.Tensor, num_steps: int) -> StepCost:
    recompute = partial(model, ids, logits_to_keep=1, use_cache=False)
    with peak_memory(model.device) as peak:
        times = step_times(recompute, 2, num_steps)
    return StepCost(times, peak.get("bytes"), is_eager=True)


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of the weights read in a step: all except an untied input embedding."""
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = unembedding is not None and unembedding.weight is embedding.weight
    return sum(p.nbytes for p in model.parameters()) - (0 if is_tied else embedding.weight.nbytes)


class CroppedCache:
    """An eager loop that keeps the first and the last keys after each token.

    For timing only: it uses positions in the text, not in the cache.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, num_kept: int):
        self.model, self.num_kept = model, num_kept
        self.cache = DynamicCache(config=model.config)
        model(ids, logits_to_keep=1, use_cache=True, **{CACHE: self.cache})
        self.size = self.cache.get_seq_length()

    def step(self, token: torch.Tensor) -> torch.Tensor:
        logits = self.model(token, use_cache=True, **{CACHE: self.cache}).logits
        for layer in self.cache.layers:
            if getattr(layer, "is_sliding", False):  # a window of the model, which transformers keeps
                continue
            if layer.keys is None:  # the layer uses the keys of another one
                continue
            layer.keys, layer.values = self._crop(layer.keys), self._crop(layer.values)
        return logits

    def _crop(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat((states[:, :, : self.num_kept], states[:, :, -(self.size - self.num_kept) :]), dim=2)


def milliseconds(step: Callable[[], object], num_warmup: int, num_steps: int) -> float:
    """Return the mean time of a step."""
    return statistics.fmean(step_times(step, num_warmup, num_steps))


def step_times(step: Callable[[], object], num_warmup: int, num_steps: int) -> list[float]:
    """Return the milliseconds of each step, without waiting for a GPU between them."""
    for _ in range(num_warmup):
        step()
    synchronize()
    marks = [mark()]
    for _ in range(num_steps):
        step()
        marks.append(mark())
    synchronize()
    return [milliseconds_between(start, end) for start, end in pairwise(marks)]


def mark() -> float | torch.cuda.Event:
    """Return the time, or on a GPU an event that has the time at which the work so far is done."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(start: Any, end: Any) -> float:
    """Return the time between two marks, which must have been reached."""
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Yield a dictionary that receives the peak GPU memory as ``"bytes"`` at exit."""
    peak: dict[str, int] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak["bytes"] = torch.cuda.max_memory_allocated(device)


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second, read and written, of a large copy in device memory."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source), 5, 20) / 1e3)


def results_table(results: list[dict[str, Any]], title: str) -> Table:
    """Return a table of times by cache and batch size, with the speed-up over re-computation."""
    eager = [method for method in METHODS if any(row["method"] == method and row.get("is_eager") for row in results)]
    caption = f"mean ± standard deviation of the steps; eager: {', '.join(eager) or 'none'}"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("Cache", "Batch", *METHODS, "over re-computation"):
        table.add_column(header, justify="right", no_wrap=True)
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in results:
        key = f"{row['num_kept']}+{row['window']}", row["batch_size"]
        rows.setdefault(key, {})[row["method"]] = row
    for (cache, batch_size), found in rows.items():
        speed_up = found["re-computation"]["milliseconds"] / found["streaming"]["milliseconds"]
        cells = (_with_spread(found[method]) for method in METHODS)
        table.add_row(cache, str(batch_size), *cells, f"{speed_up:,.1f}×")
    return table


def _with_spread(row: dict[str, Any]) -> str:
    spread = row.get("stdev")
    return f"{row['milliseconds']:,.2f}" + ("" if spread is None else f" ± {spread:,.2f}")
