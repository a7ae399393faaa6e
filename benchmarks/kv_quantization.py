"""Perplexity, memory and time of caches with 16 or 32, 8 and 4 bit keys and values, as JSON lines.

    python benchmarks/kv_quantization.py MODEL book.txt --num-tokens 100000

The text is split into ``--rows`` streams. Passes have 16 tokens, fewer than are stored in full
precision, so that tokens are read from quantized keys and values as in decoding.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.streaming import StreamingCache, stream_losses

TOKENS_PER_PASS = 16
NUM_TIMED = 50
REPORT_EVERY = 16  # passes


@torch.inference_mode()
def seconds_per_token(model, ids, settings) -> tuple[float, int]:
    """Return the median time of a step of one stream with a full cache, and the cache's bytes.

    On a CPU, it is the time of one thread, which other programs hardly affect.
    """
    is_cpu = model.device.type == "cpu"
    num_threads, clock = torch.get_num_threads(), time.process_time if is_cpu else time.perf_counter
    if is_cpu:
        torch.set_num_threads(1)
    cache = StreamingCache.for_model(model, **settings)
    model(ids[:, : settings["window"] + 100], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if cache.get_seq_length() < settings["num_kept"] + settings["window"]:
        raise SystemExit(f"a row has only {ids.shape[1]} tokens, so the cache is not full: use --rows 1 or more tokens")
    times = []
    for _ in range(NUM_TIMED):
        start = clock()
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        if not is_cpu:
            torch.cuda.synchronize()
        times.append(clock() - start)
    torch.set_num_threads(num_threads)
    return sorted(times)[NUM_TIMED // 2], cache.num_bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--num-tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--num-kept", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--kv-dtypes", nargs="+", default=["none", "int8", "int4"])
    args = parser.parse_args()
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    ids = torch.tensor(tokenizer(args.text.read_text(), verbose=False)["input_ids"][: args.num_tokens])
    ids = ids[: len(ids) // args.rows * args.rows].view(args.rows, -1)
    settings = {
        name: {"num_kept": args.num_kept, "window": args.window, "kv_dtype": None if name == "none" else name}
        for name in args.kv_dtypes
    }
    for name in args.kv_dtypes:
        step, num_bytes = seconds_per_token(model, ids[:1], settings[name])
        print(json.dumps({"kv_dtype": name, "bytes": num_bytes, "ms_per_token": 1000 * step}), flush=True)
    streams = [stream_losses(model, ids, chunk_size=TOKENS_PER_PASS, **settings[name]) for name in args.kv_dtypes]
    sums, num_scored = [0.0] * len(streams), 0
    for num_passes, losses in enumerate(zip(*streams, strict=True), start=1):  # side by side, to compare any part
        sums = [total + chunk.double().sum().item() for total, chunk in zip(sums, losses, strict=True)]
        num_scored += losses[0].numel()
        if num_passes % REPORT_EVERY == 0 or num_passes == -(-ids.shape[1] // TOKENS_PER_PASS):
            perplexity = {name: math.exp(total / num_scored) for name, total in zip(args.kv_dtypes, sums, strict=True)}
            print(json.dumps({"num_scored": num_scored, "perplexity": perplexity}), flush=True)


if __name__ == "__main__":
    main()
