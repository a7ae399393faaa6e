"""Measure time and memory of scoring a long text, in chunks and token by token.

Token by token means both the eager forward pass of transformers and, on a GPU, sinklm's step, which
is compiled and captured in a CUDA graph.

    python benchmarks/scoring_speed.py --model PATH --ids ids.npy --num-tokens 4000000

Prints JSON to stdout: perplexity of each tenth of the text, time and peak memory; progress is
printed to stderr. The default model is random, with SmolLM2-135M's shape; the default text is
random tokens. For decoding speed, use `sinklm bench decode`.
"""

import argparse
import json
import math
import statistics
import sys
import time

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sinklm.eval.decode_speed import step_times, synchronize
from sinklm.streaming import Generator, StreamingCache, stream_losses


def environment() -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def build(config, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def score(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, trust_remote_code=False).to(device).eval()
    else:
        shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        model = build(LlamaConfig(intermediate_size=1536, vocab_size=49152, **shape), device, dtype)
    if args.ids:
        ids = torch.from_numpy(np.load(args.ids, mmap_mode="r")[: args.num_tokens].astype(np.int64))[None]
    else:
        ids = torch.randint(0, model.config.vocab_size, (1, args.num_tokens))
    shape = {"num_kept": args.num_kept, "window": args.window}
    warm = stream_losses(model, ids[:, : 3 * args.chunk_size], **shape, chunk_size=args.chunk_size)
    sum(float(losses.sum()) for losses in warm)
    report = {"banded": banded(model, ids, shape, args)}
    report["token by token, eager"] = single(model, ids[:, : args.single], shape, is_captured=False)
    if device.type == "cuda":
        report["token by token, captured"] = single(model, ids[:, : args.single], shape, is_captured=True)
    alone = stream_losses(model, ids[:, -(ids.shape[1] // 10) :], **shape, chunk_size=args.chunk_size)
    mean = torch.cat([losses[0] for losses in alone]).double().mean()
    report["perplexity of the last tenth by itself"] = math.exp(float(mean))  # of a stream without context
    for name in [name for name in report if name.startswith("token by token")]:
        report[f"chunks are faster than {name}, by"] = report["banded"]["tokens/s"] / report[name]["tokens/s"]
    return report | shape | {"dtype": str(dtype)}


def banded(model: PreTrainedModel, ids: torch.Tensor, shape: dict, args: argparse.Namespace) -> dict:
    """Perplexity of each tenth, time, and peak memory after 100,000 tokens and at the end."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start, seen, early, perplexities, losses = time.perf_counter(), 0, None, [], []
    for chunk in stream_losses(model, ids, **shape, chunk_size=args.chunk_size):
        losses.append(chunk[0])
        seen += chunk.shape[1]
        if early is None and seen >= 100_000 and torch.cuda.is_available():
            early = torch.cuda.max_memory_allocated()
        if seen * 10 >= (len(perplexities) + 1) * (ids.shape[1] - 1):
            perplexities.append(math.exp(float(torch.cat(losses).double().mean())))
            losses.clear()
            seconds = time.perf_counter() - start
            print(f"{seen:,} tokens, {seconds:.1f} s, perplexity {perplexities[-1]:.3f}", file=sys.stderr, flush=True)
    return {
        "tokens": seen,
        "seconds": seconds,
        "tokens/s": seen / seconds,
        "perplexity by tenth": perplexities,
        "peak bytes at 100,000 tokens": early,
        "peak bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


@torch.no_grad()
def single(model: PreTrainedModel, ids: torch.Tensor, shape: dict, *, is_captured: bool) -> dict:
    """Time of a step, without the loss, after a text that fills the cache."""
    ids = ids.to(model.device)
    cache = StreamingCache.for_model(model, **shape)
    generator = Generator(model, cache, compile=is_captured)
    num_slots = cache.shape.num_slots
    generator.decoder.prefill(ids.repeat(1, -(-(num_slots + 8) // ids.shape[1]))[:, : num_slots + 8])
    tokens = iter(ids.split(1, dim=1))

    def step() -> torch.Tensor:
        if is_captured:
            return generator.read_one(next(tokens))
        return model(next(tokens), past_key_values=cache, use_cache=True).logits

    times = step_times(step, 10, ids.shape[1] - 10)
    mean = statistics.fmean(times)
    return {"tokens": len(times), "ms": mean, "stdev of ms": statistics.stdev(times), "tokens/s": 1e3 / mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--ids")
    parser.add_argument("--num-tokens", type=int, default=4_000_000)
    parser.add_argument("--num-kept", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--chunk-size", type=int, default=4096)
    parser.add_argument("--single", type=int, default=300, help="tokens scored one at a time, for comparison")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(json.dumps(score(args, device, dtype) | environment(), indent=1))


if __name__ == "__main__":
    main()
