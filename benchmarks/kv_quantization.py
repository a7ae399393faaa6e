"""Perplexity, memory and time of caches with 16, 8 and 4 bit keys and values.

    python benchmarks/kv_quantization.py --model MODEL --text TEXT -o kv.json

MODEL is a transformers folder, a run or checkpoint of sinklm, or a GGUF file; TEXT is a text file,
or token ids as a .npy file. The defaults are in this repository. Each part is measured on its own:
one that fails is reported, the others go on. Parts that the output file has of the same model,
text, sizes and versions are not measured again, so a command that ended early (--seconds) can be
repeated. Those of others are measured again, and replaced. Another device, Python or torch needs
another --output.

- perplexity: TEXT in --rows streams. On a GPU it is decoded token by token with
  `StreamingDecoder`. On a CPU, passes have 16 tokens: up to 47 of the keys of a
  token are in full precision, instead of 32 as in decoding.
- step: bytes of a full cache of one stream, and the time of an eager step of MODEL, as the median
  with the standard deviation. On a CPU it is processor time of one thread, which other programs
  hardly affect.
- decode: milliseconds per step of `StreamingDecoder` with a full cache (mean and standard
  deviation), for models of the recipes with random weights, and the time to move all phases back,
  which is done once per window.

The dtype is bfloat16 on a GPU and float32 on a CPU.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from part_report import SPREAD, PartReport, with_spread
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.decode_speed import milliseconds, step_times, synchronize
from sinklm.eval.report import library_versions
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.models.cache_argument import CACHE
from sinklm.streaming import StreamingCache, StreamingDecoder, stream_losses
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.summary import PYTHIA_TOKENIZER_SIZE

EXAMPLES = Path(__file__).parents[1] / "examples" / "checkpoints"
PARTS = ["perplexity", "step", "decode"]
KvDtype = Literal["int8", "int4"] | None
KV_DTYPES: dict[str, KvDtype] = {"none": None, "int8": "int8", "int4": "int4"}
TOKENS_PER_PASS = 16  # on a CPU
NUM_EAGER_STEPS = 50
NUM_WARMUP = 5
NUM_REBASES = 3
SETTINGS = ("model", "text", "num_tokens", "rows", "num_kept", "window", "num_steps")  # that change results


# -- Perplexity ---------------------------------------------------------------------------------


@cache
def model_of(name: str) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name.endswith(".gguf"):
        path = Path(name)
        options = {"gguf_file": path.name, "dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(path.parent, trust_remote_code=False, **options).to(device).eval()
    return load_model(name, device=device, dtype=dtype)


def token_ids(args: argparse.Namespace) -> Tensor:
    """Return the text as streams ``(rows, T)``."""
    if args.text.suffix == ".npy":
        ids = torch.from_numpy(np.load(args.text).astype(np.int64))
    else:
        ids = torch.tensor(load_tokenizer(args.model)(args.text.read_text(), verbose=False)["input_ids"])
    if len(ids) < args.num_tokens:
        print(f"the text has only {len(ids):,} of {args.num_tokens:,} tokens")
    ids = ids[: args.num_tokens]
    return ids[: len(ids) // args.rows * args.rows].view(args.rows, -1)


def perplexity(args: argparse.Namespace, kv_dtype: KvDtype) -> dict[str, Any]:
    model, ids = model_of(args.model), token_ids(args)
    settings: dict[str, Any] = {"num_kept": args.num_kept, "window": args.window, "kv_dtype": kv_dtype}
    start = time.perf_counter()
    if model.device.type == "cuda":
        total = decoded_loss(model, ids.to(model.device), settings)
    else:
        chunks = stream_losses(model, ids, chunk_size=TOKENS_PER_PASS, **settings)
        total = sum(chunk.double().sum().item() for chunk in chunks)
    num_scored = ids.shape[0] * (ids.shape[1] - 1)
    return {
        "perplexity": math.exp(total / num_scored),
        "num_scored": num_scored,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def decoded_loss(model: PreTrainedModel, ids: Tensor, settings: dict[str, Any]) -> float:
    """Return the sum of the losses of all tokens but the first of each stream."""
    free_memory()
    decoder = StreamingDecoder(model, StreamingCache.for_model(model, **settings))
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    logits = decoder.prefill(ids[:, :1])
    for t in range(1, ids.shape[1]):
        total += F.cross_entropy(logits[:, -1].float(), ids[:, t], reduction="sum")
        logits = decoder(ids[:, t : t + 1])
    return total.item()


@torch.inference_mode()
def eager_step(args: argparse.Namespace, kv_dtype: KvDtype) -> dict[str, Any]:
    model, cache_size = model_of(args.model), args.num_kept + args.window
    ids = token_ids(args).flatten()[None, : cache_size + 100].to(model.device)
    if ids.shape[1] < cache_size:
        raise ValueError(f"the text has {ids.shape[1]} tokens, so a cache of {cache_size} is not full")
    stream = StreamingCache.for_model(model, num_kept=args.num_kept, window=args.window, kv_dtype=kv_dtype)
    model(ids, use_cache=True, logits_to_keep=1, **{CACHE: stream})
    clock = time.perf_counter if model.device.type == "cuda" else time.process_time
    times = []
    for _ in range(NUM_EAGER_STEPS):
        start = clock()
        model(ids[:, :1], use_cache=True, **{CACHE: stream})
        synchronize()
        times.append(1e3 * (clock() - start))
    return {**with_spread("ms", times, statistics.median), "bytes": stream.num_bytes}


# -- Time of a compiled step --------------------------------------------------------------------


class RandomModel:
    """The model of a recipe with random weights; only the newest one stays in memory."""

    name: str | None = None
    model: PreTrainedModel | None = None

    def __call__(self, name: str) -> PreTrainedModel:
        if name != self.name:
            self.name, self.model = None, None
            config = Plan(load_config(name), 1, PYTHIA_TOKENIZER_SIZE).model_config
            is_gpu = torch.cuda.is_available()
            dtype = torch.bfloat16 if is_gpu else torch.float32
            with torch.device("cuda" if is_gpu else "cpu"):
                self.model = SinkGPTNeoXForCausalLM._from_config(config, dtype=dtype).eval()
            self.name = name
        assert self.model is not None
        return self.model


random_model = RandomModel()


def free_memory() -> None:
    """Free compiled steps, their graphs and caches."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def decode(
    name: str, cache_size: int, batch_size: int, num_kept: int, kv_dtype: KvDtype, num_steps: int
) -> dict[str, Any]:
    model = random_model(name)
    free_memory()
    window = cache_size - num_kept
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window, kv_dtype=kv_dtype)
    decoder = StreamingDecoder(model, cache)
    ids = torch.randint(256, (batch_size, cache_size + 8), device=model.device)
    decoder.prefill(ids)
    cache.streams.rebase()  # the next one is a window away
    start = time.perf_counter()
    decoder(ids[:, :1])
    decoder(ids[:, :1])
    synchronize()
    compiled = time.perf_counter() - start
    times = step_times(partial(decoder, ids[:, :1].clone()), NUM_WARMUP, min(num_steps, window - NUM_WARMUP - 2))
    return {
        **with_spread("ms_per_step", times),
        "ms_per_rebase": milliseconds(cache.streams.rebase, 1, NUM_REBASES),
        "bytes": cache.num_bytes,
        "seconds_to_compile": compiled,
    }


# -- All parts ----------------------------------------------------------------------------------


def parts_of(args: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield parts with the name of one measurement of it."""
    for name in args.kv_dtypes if "perplexity" in args.parts else []:
        yield "perplexity", name, partial(perplexity, args, KV_DTYPES[name])
    for name in args.kv_dtypes if "step" in args.parts else []:
        yield "step", name, partial(eager_step, args, KV_DTYPES[name])
    for batch_size in args.batch_sizes if "decode" in args.parts else []:
        for size in args.sizes:
            for cache_size in args.caches:
                for name in args.kv_dtypes:
                    values = size, cache_size, batch_size, args.num_kept, KV_DTYPES[name], args.num_steps
                    yield "decode", f"{size} {cache_size} {batch_size} {name}", partial(decode, *values)


def measure(args: argparse.Namespace, report: PartReport) -> None:
    """Measure the parts that the report does not have yet."""
    for part, name, call in parts_of(args):
        if name not in measured(report, part):
            report.add(part, partial(rows_of, name, call), name)


def rows_of(name: str, call: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"size": name, **call()}]


def measured(report: PartReport, part: str) -> dict[str, dict[str, Any]]:
    return {row["size"]: row for row in report.rows(part) if "error" not in row}


def print_tables(report: PartReport) -> None:
    """Print values without quantization, of int8 and int4, and the ratios to the first."""
    for part, quantities in {"perplexity": ["perplexity"], "step": ["bytes", "ms"]}.items():
        found = measured(report, part)
        for quantity in quantities:
            rows = [found.get(name, {}) for name in KV_DTYPES]
            print(f"{part} of the model, {quantity}: {side_by_side(rows, quantity)}")
    print("decode: recipe, cache, batch; ms per step, then MB")
    found = measured(report, "decode")
    for setting in dict.fromkeys(name.rsplit(" ", 1)[0] for name in found):
        rows = [found.get(f"{setting} {name}", {}) for name in KV_DTYPES]
        rows = [row | ({"MB": row["bytes"] / 1e6} if "bytes" in row else {}) for row in rows]
        cells = (side_by_side(rows, quantity) for quantity in ("ms_per_step", "MB"))
        print(f"{setting:>24} {' '.join(cells)}")


def side_by_side(rows: list[dict[str, Any]], quantity: str) -> str:
    """Return a quantity and its spread without and with quantization, and ratios to the first."""
    values = [row.get(quantity) for row in rows]
    ratios = [value / values[0] if value and values[0] else None for value in values[1:]]
    spreads = [f" ± {spread:.4f}" if (spread := row.get(SPREAD + quantity)) else "" for row in rows]
    cells = [
        f"{value:12,.4f}{spread}" if value else f"{'-':>12}" for value, spread in zip(values, spreads, strict=True)
    ]
    return " ".join(cells + [f"{ratio:7.4f}x" if ratio else f"{'-':>8}" for ratio in ratios])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLES / "vanilla"))
    parser.add_argument("--text", type=Path, default=EXAMPLES / "book.txt")
    parser.add_argument("-o", "--output", type=Path, default=Path("kv_quantization.json"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--num-tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--num-kept", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020, help="for the perplexity")
    parser.add_argument("--kv-dtypes", nargs="+", default=list(KV_DTYPES), choices=KV_DTYPES)
    parser.add_argument("--sizes", nargs="+", default=["pythia-160m", "pythia-6.9b", "pythia-1.4b"])
    parser.add_argument("--caches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no further part after this time")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    report = PartReport(args.output, settings | {"versions": library_versions()}, args.seconds / 60)
    measure(args, report)
    print_tables(report)


if __name__ == "__main__":
    main()
