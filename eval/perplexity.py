"""Perplexity on long text by cache configuration (Xiao et al. 2024, Table 3 and Figure 3)."""

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import read_text
from ..models.checked import check_ids
from ..perplexity import perplexity_of
from ..streaming import MemoryOptions, StreamingCache
from ..streaming.families import num_embedded_positions
from ..streaming.layers import former_shape
from ..streaming.wrappers import decoder_of
from .losses import ReportTokens, dense_losses, recompute_losses, streaming_losses
from .tables import number

METHODS = ("dense", "window", "streaming", "recompute")
KEPT_TOKENS = (0, 1, 2, 4)  # the columns of Table 3
BINS_PER_OCTAVE = 4
MIN_BIN_TOKENS = 64


def cache_name(num_kept: int, window: int, memory: MemoryOptions | None = None) -> str:
    """Return the name of a streaming cache: ``4+1020``, ``4+1020, memory 8x64``."""
    return f"{num_kept}+{window}" + ("" if memory is None else f", memory {memory}")


@dataclass(frozen=True)
class Configuration:
    """An attention method for long text, with ``num_kept + window`` tokens in the cache."""

    method: str
    num_kept: int = 0
    window: int = 0
    memory: MemoryOptions | None = None

    @property
    def cache_size(self) -> int:
        return self.num_kept + self.window

    @property
    def cache(self) -> str:
        """Name of the cache: ``4+1020``, ``1024`` for re-computation, ``all`` for dense."""
        if self.method == "dense":
            return "all"
        return str(self.cache_size) if self.method == "recompute" else cache_name(*self.size, self.memory)

    @property
    def size(self) -> tuple[int, int]:
        return self.num_kept, self.window

    def __str__(self) -> str:
        return {"dense": "dense", "recompute": f"recompute {self.cache}"}.get(self.method, self.cache)


@dataclass(frozen=True)
class TokenizedText:
    """A tokenized text: ``ids`` ``(T,)``, of which the first ``num_prefix`` are special tokens.

    ``sha256`` is the hash of the joined text in UTF-8, without byte order marks. ``num_bytes``
    ``(T - num_prefix,)`` is the length of each token of the text in UTF-8; None for tokenizers that
    do not report it.
    """

    ids: torch.Tensor
    num_prefix: int
    sha256: str
    files: tuple[str, ...]
    num_bytes: torch.Tensor | None = None


@dataclass(frozen=True)
class Result:
    configuration: Configuration
    losses: torch.Tensor  # (T,) nats, NaN where a token was not scored
    seconds: float

    @property
    def num_scored(self) -> int:
        return int(self.losses.isfinite().sum())

    @property
    def perplexity(self) -> float:
        return perplexity_of(float(self.losses.nanmean()))

    def after_first(self) -> "Result":
        """Return the result without the first token, which not all models score."""
        losses = self.losses.clone()
        losses[0] = float("nan")
        return replace(self, losses=losses)

    def num_bytes_scored(self, tokenized: TokenizedText) -> int | None:
        """Return the UTF-8 length of the scored tokens; None if it is not known."""
        if tokenized.num_bytes is None:
            return None
        return int(tokenized.num_bytes[self.losses.isfinite()].sum())

    def bits_per_byte(self, tokenized: TokenizedText) -> float | None:
        """Return the loss in bits per byte of text, which models of other tokenizers share."""
        num_bytes = self.num_bytes_scored(tokenized)
        return float(self.losses.nansum()) / math.log(2) / num_bytes if num_bytes else None


def read_text_files(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None = None
) -> TokenizedText:
    """Join text files with blank lines and tokenize them after the `text_prefix`.

    Args:
        num_tokens: stop after this many tokens of text; None reads all.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the texts have fewer than 2 or ``num_tokens`` tokens, or are not UTF-8 text.
    """
    digest = hashlib.sha256()
    tokenized: list[int] = []
    lengths: list[torch.Tensor] | None = [] if tokenizer.is_fast else None
    used: list[str] = []
    for path in files:
        text = _read_text(path) if not used else "\n\n" + _read_text(path)
        digest.update(text.encode())
        encoding = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
        tokenized += encoding["input_ids"]
        if lengths is not None:
            lengths.append(token_lengths(text, encoding["offset_mapping"]))
        used.append(str(path))
        if num_tokens and len(tokenized) >= num_tokens:
            break
    if len(tokenized) < (num_tokens or 2):
        remedy = "add a --text or lower --tokens" if num_tokens else "add a --text"
        raise ValueError(f"{', '.join(used)}: {len(tokenized)} tokens, but {num_tokens or 2} are needed: {remedy}")
    prefix = text_prefix(tokenizer)
    ids = torch.tensor(prefix + tokenized[:num_tokens])
    num_bytes = None if lengths is None else torch.cat(lengths)[:num_tokens]
    return TokenizedText(ids, len(prefix), digest.hexdigest(), tuple(used), num_bytes)


def token_lengths(text: str, offsets: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return the UTF-8 length of each token: from the end of the one before it to its own end.

    The lengths add up to that of the text: the last token has the rest. A character that is split
    into several tokens counts for the first of them.

    Args:
        offsets: start and end of each token, in characters.
    """
    if not offsets:
        return torch.zeros(0, dtype=torch.long)
    code_points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    sizes = 1 + torch.bucketize(code_points, torch.tensor([0x80, 0x800, 0x10000], dtype=torch.int32), right=True)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])  # bytes before each character
    last = [*(end for _, end in offsets[:-1]), len(text)]  # offsets may leave out spaces at the end
    reached = ends[torch.tensor(last, dtype=torch.long)].cummax(0)[0]
    return reached.diff(prepend=torch.zeros(1, dtype=torch.long))


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text (begin-of-text, an export's sinks)."""
    no_text, some_text = tokenizer("")["input_ids"], tokenizer("a")["input_ids"]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(no_text, some_text, strict=False))
    return [token_id for token_id, _ in same]  # followed by the text, or by special tokens at the end


def _read_text(path: Path) -> str:
    """Read a text file as `sinklm prepare` does."""
    if path.is_char_device() or path.is_block_device():
        raise ValueError(f"--text {path} is a device: pass a text file")
    return read_text(path, "pass a text file")


def default_caches(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Return 0, 1, 2 and 4 kept tokens in a cache of half the trained length (the paper's Table 3).

    For a trained length of 2048: 0+1024, 1+1023, 2+1022, 4+1020. Caches of an export with full
    attention whose layers were all trained with one window are as large as that window with its
    kept tokens, and one of them keeps as many.

    Raises:
        ValueError: the model's configuration has no trained length of at least 16.
    """
    if former := former_shape(decoder_of(model).config):
        kept = sorted({*KEPT_TOKENS, former.num_kept})
        return [(num_kept, former.num_cached - num_kept) for num_kept in kept if num_kept < former.num_cached]
    num_positions = getattr(model.config, "max_position_embeddings", None)
    if not num_positions or num_positions < 16:
        raise ValueError("the model's configuration has no trained length: set the caches to compare with --caches")
    return [(num_kept, num_positions // 2 - num_kept) for num_kept in KEPT_TOKENS]


def configurations(
    methods: Sequence[str],
    caches: Sequence[tuple[int, int]],
    num_sinks: int,
    memory: MemoryOptions | None = None,
) -> list[Configuration]:
    """Return the configurations of some methods and caches.

    ``dense`` is run once, ``window`` for caches without and ``streaming`` for caches with kept
    tokens, and ``recompute`` for each cache size. With a ``memory``, the caches of ``window`` and
    ``streaming`` are run without and with it. A cache that no method has is left out.

    Raises:
        ValueError: a method is unknown or has no cache, or a cache is smaller than the model's
            sinks.
    """
    chosen: list[Configuration] = []
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods contains {method!r}: use only {', '.join(METHODS)}")
        if method == "dense":
            found = [Configuration("dense")]
        elif method == "recompute":
            found = [Configuration("recompute", 0, size) for size in dict.fromkeys(kept + w for kept, w in caches)]
        else:
            shapes = [shape for shape in caches if (shape[0] == 0) == (method == "window")]
            found = [Configuration(method, *shape, each) for shape, each in without_and_with(memory, shapes)]
        if not found:
            example = "0+1024" if method == "window" else "4+1020"
            raise ValueError(
                f"--methods contains {method}, but --caches has no cache for it: add one such as {example}"
            )
        chosen += found
    refuse_small_caches([(c.num_kept, c.window) for c in chosen if c.method != "dense"], num_sinks)
    return list(dict.fromkeys(chosen))


def without_and_with(
    memory: MemoryOptions | None, caches: Iterable[tuple[int, int]]
) -> list[tuple[tuple[int, int], MemoryOptions | None]]:
    """Return each cache without a memory, and then with it if there is one."""
    return [(shape, each) for shape in caches for each in dict.fromkeys((None, memory))]


def default_methods(caches: Sequence[tuple[int, int]]) -> list[str]:
    """Return ``dense``, and ``window`` and ``streaming`` if there are caches for them."""
    kinds = {"window" if num_kept == 0 else "streaming" for num_kept, _ in caches}
    return [method for method in METHODS if method in {"dense", *kinds}]


def refuse_small_caches(caches: Iterable[tuple[int, int]], num_sinks: int) -> None:
    """Raise a ValueError for a cache that is smaller than the model's sinks."""
    for num_kept, window in caches:
        if num_kept + window < num_sinks:
            raise ValueError(
                f"the cache {num_kept}+{window} is smaller than the model's {num_sinks} sink tokens: use a larger cache"
            )


def refuse_unmeasurable(model: PreTrainedModel, tokenized: TokenizedText, chosen: Sequence[Configuration]) -> None:
    """Raise a ValueError if the model does not support one of the configurations."""
    check_ids(tokenized.ids, model)
    for configuration in chosen:
        if configuration.method in ("window", "streaming"):
            StreamingCache.for_model(
                model, num_kept=configuration.num_kept, window=configuration.window, memory=configuration.memory
            )
    num_positions = num_embedded_positions(model.config)
    if num_positions and Configuration("dense") in chosen and len(tokenized.ids) - 1 > num_positions:
        raise ValueError(
            f"the model has only {num_positions} positions for dense attention: lower --tokens or remove dense from "
            "--methods"
        )
    for configuration in chosen:
        if num_positions and configuration.method == "recompute" and configuration.cache_size > num_positions:
            raise ValueError(
                f"the model has only {num_positions} positions, too few for re-computation with the cache "
                f"{configuration.cache}: use a smaller one"
            )


def measure(
    model: PreTrainedModel,
    tokenized: TokenizedText,
    configuration: Configuration,
    *,
    recompute_every: int = 1,
    progress: ReportTokens | None = None,
) -> Result:
    """Score the text under one configuration; the prefix is not scored."""
    started = time.perf_counter()
    if configuration.method == "dense":
        losses = dense_losses(model, tokenized.ids, tokenized.num_prefix, progress)
    elif configuration.method == "recompute":
        losses = recompute_losses(
            model,
            tokenized.ids,
            configuration.cache_size + 1,  # the number of keys per query in the other methods
            num_prefix=tokenized.num_prefix,
            every=recompute_every,
            progress=progress,
        )
    else:
        losses = streaming_losses(model, tokenized.ids, *configuration.size, progress, configuration.memory)
    return Result(configuration, losses[tokenized.num_prefix :], time.perf_counter() - started)


def position_bins(num_tokens: int) -> list[int]:
    """Return edges of log-scale bins of ``[0, num_tokens)``, at least `MIN_BIN_TOKENS` wide."""
    edges = [0]
    while (last := edges[-1]) < num_tokens:
        edges.append(max(last + MIN_BIN_TOKENS, round(last * 2 ** (1 / BINS_PER_OCTAVE))))
    edges[-1] = num_tokens
    if len(edges) > 2 and edges[-1] - edges[-2] < MIN_BIN_TOKENS:
        del edges[-2]
    return edges


def binned_losses(losses: torch.Tensor, edges: Sequence[int]) -> list[float | None]:
    """Return the mean loss in each bin of positions, or None if no token in it was scored."""
    means = (float(losses[a:b].nanmean()) for a, b in pairwise(edges))
    return [None if math.isnan(mean) else mean for mean in means]


def as_json(results: Iterable[Result], tokenized: TokenizedText) -> dict[str, Any]:
    """Return all numbers of the tables and plots, ready for JSON."""
    results = list(results)
    edges = position_bins(len(tokenized.ids) - tokenized.num_prefix)
    return {
        "text": {
            "files": list(tokenized.files),
            "sha256": tokenized.sha256,
            "ids_sha256": hashlib.sha256(tokenized.ids[tokenized.num_prefix :].numpy().tobytes()).hexdigest(),
            "num_tokens": len(tokenized.ids) - tokenized.num_prefix,
            "num_prefix_tokens": tokenized.num_prefix,
            "num_bytes": None if tokenized.num_bytes is None else int(tokenized.num_bytes.sum()),
        },
        "bin_edges": edges,
        "results": [
            {
                "configuration": str(result.configuration),
                "method": result.configuration.method,
                "num_kept": result.configuration.num_kept,
                "window": result.configuration.window,
                "memory": None if result.configuration.memory is None else asdict(result.configuration.memory),
                **_scores(result, tokenized),
                "after_first": _scores(result.after_first(), tokenized),
                "binned_losses": binned_losses(result.losses, edges),
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def _scores(result: Result, tokenized: TokenizedText) -> dict[str, Any]:
    return {
        "perplexity": result.perplexity,
        "loss": float(result.losses.nanmean()),
        "bits_per_byte": result.bits_per_byte(tokenized),
        "num_scored": result.num_scored,
        "num_bytes_scored": result.num_bytes_scored(tokenized),
    }


def results_table(results: Iterable[Result], tokenized: TokenizedText, title: str, windows: str | None = None) -> Table:
    """Return a table with a row for each result.

    Args:
        windows: which layers of the model have windows, which dense attention has too.
    """
    table = Table(title=title)
    table.add_column("Method")
    table.add_column("Cache")
    for header in ("Perplexity", "Nats", "Bits/byte", "Tokens", "Tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.configuration.method,
            windows if windows and result.configuration.method == "dense" else result.configuration.cache,
            number(result.perplexity, 2),
            f"{float(result.losses.nanmean()):.4f}",
            "" if (bits := result.bits_per_byte(tokenized)) is None else f"{bits:.4f}",
            f"{result.num_scored:,}",
            f"{result.num_scored / max(result.seconds, 1e-9):,.0f}",
        )
    return table
