"""How fast and in how much memory a stream is scored and decoded, beside what people do without it.

    python benchmarks/streaming_speed.py score --model PATH --ids ids.npy --num-tokens 4000000
    python benchmarks/streaming_speed.py decode --shapes 160m 1.4b 2.8b 6.9b --caches 1024 4096 --batch-sizes 1 8

Both write JSON to stdout. `score`: losses of a text under 4 + window tokens, in chunks and token by token; without
--model a random model of SmolLM2-135M's shape, without --ids random tokens. `decode`: milliseconds a token for Pythia
shapes with random weights: `StreamingDecoder`, transformers' eager loop with a cropped `DynamicCache`, re-computation
of the window for every token, and the floor: bytes of weights and cache over the measured copy bandwidth.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import transformers
from sinklm.models.streaming import StreamingCache, StreamingDecoder, stream_losses
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, LlamaConfig, PreTrainedModel

NUM_KEPT = 4
PYTHIA = {  # hidden size, layers, heads
    "70m": (512, 6, 8),
    "160m": (768, 12, 12),
    "1.4b": (2048, 24, 16),
    "2.8b": (2560, 32, 32),
    "6.9b": (4096, 32, 32),
}


def environment() -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], object], num_warmup: int, num_steps: int) -> float:
    """Mean time of a step."""
    for _ in range(num_warmup):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    synchronize()
    return (time.perf_counter() - start) / num_steps * 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large device-to-device copy."""
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty_like(torch.empty(size, dtype=torch.uint8, device=device)),
    )
    return 2 * size / (milliseconds(lambda: target.copy_(source), 5, 20) / 1e3)


def build(config, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


# -- scoring -------------------------------------------------------------------------------------------------------


def score(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
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
    report = {"banded": banded(model, ids, shape, args), "token by token": single(model, ids[:, : args.single], shape)}
    report["speed-up"] = report["banded"]["tokens/s"] / report["token by token"]["tokens/s"]
    return report | shape | {"dtype": str(dtype)}


def banded(model: PreTrainedModel, ids: torch.Tensor, shape: dict, args: argparse.Namespace) -> dict:
    """Perplexity of every tenth of the text, time, and peak memory after 100,000 tokens and at the end."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start, seen, early, sums, lengths = time.perf_counter(), 0, None, [], []
    for losses in stream_losses(model, ids, **shape, chunk_size=args.chunk_size):
        sums.append(losses.sum())
        lengths.append(losses.shape[1])
        seen += losses.shape[1]
        if early is None and seen >= 100_000 and torch.cuda.is_available():
            early = torch.cuda.max_memory_allocated()
    synchronize()
    seconds = time.perf_counter() - start
    tenths = np.array_split(np.stack([torch.stack(sums).double().cpu().numpy(), lengths]), min(10, len(sums)), axis=1)
    return {
        "tokens": seen,
        "seconds": seconds,
        "tokens/s": seen / seconds,
        "perplexity by tenth": [math.exp(loss.sum() / length.sum()) for loss, length in tenths],
        "peak bytes at 100,000 tokens": early,
        "peak bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


@torch.no_grad()
def single(model: PreTrainedModel, ids: torch.Tensor, shape: dict) -> dict:
    cache = StreamingCache.for_model(model, **shape)
    model(ids[:, : cache.shape.num_slots + 8].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = iter(ids.to(model.device).split(1, dim=1))
    step = lambda: model(next(tokens), past_key_values=cache, use_cache=True).logits  # noqa: E731
    num_steps = ids.shape[1] - 10
    return {"tokens": num_steps, "tokens/s": 1e3 / milliseconds(step, 10, num_steps)}


# -- decoding ------------------------------------------------------------------------------------------------------


def decode(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    bandwidth, rows = copy_bandwidth(device), []
    for name in args.shapes:
        hidden_size, num_layers, num_heads = PYTHIA[name]
        config = GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
        )
        model = build(config, device, dtype)
        for cache_size in args.caches:
            for batch_size in args.batch_sizes:
                row = {"shape": name, "cache": cache_size, "batch size": batch_size}
                row |= decode_row(model, cache_size, batch_size, bandwidth, args)
                rows.append(row)
                print(json.dumps(row), flush=True)
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {"copy bandwidth, bytes/s": bandwidth, "rows": rows}


@torch.no_grad()
def decode_row(
    model: PreTrainedModel, cache_size: int, batch_size: int, bandwidth: float, args: argparse.Namespace
) -> dict:
    ids = torch.randint(0, 50000, (batch_size, cache_size + 8), device=model.device)
    token = ids[:, :1].clone()
    cache = StreamingCache.for_model(model, num_kept=NUM_KEPT, window=cache_size - NUM_KEPT)
    decoder = StreamingDecoder(model, cache, {"mode": args.mode} if args.mode else None)
    decoder.prefill(ids)
    cache_bytes = sum(2 * layer.keys.nbytes for layer in cache.streaming_layers)
    weights = model.num_parameters() - model.get_input_embeddings().weight.numel()
    row = {"floor": (weights * model.dtype.itemsize + cache_bytes) / bandwidth * 1e3}
    row["streaming"] = milliseconds(partial(decoder, token), 10, args.num_steps)
    cache.reset()  # frees its memory
    row["re-computation"] = milliseconds(lambda: model(ids[:, :cache_size], logits_to_keep=1), 2, 5)
    cropped = CroppedCache(model, ids[:, :cache_size], cache_size)
    row["transformers, cropped cache"] = milliseconds(lambda: cropped.step(token), 5, min(args.num_steps, 50))
    return row


class CroppedCache:
    """The eager loop that one writes by hand: after each token keep the first four keys and the last ones.

    It measures time only: its positions are those of the text.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, size: int):
        self.model, self.size, self.position = model, size, ids.shape[1]
        self.cache = DynamicCache(config=model.config)
        model(ids, past_key_values=self.cache, logits_to_keep=1)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        position_ids = torch.full_like(token, self.position)
        self.position += 1
        logits = self.model(token, past_key_values=self.cache, position_ids=position_ids).logits
        for layer in self.cache.layers:
            layer.keys, layer.values = self.crop(layer.keys), self.crop(layer.values)
        return logits

    def crop(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat((states[:, :, :NUM_KEPT], states[:, :, -(self.size - NUM_KEPT) :]), dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("--model")
    scoring.add_argument("--ids")
    scoring.add_argument("--num-tokens", type=int, default=4_000_000)
    scoring.add_argument("--num-kept", type=int, default=NUM_KEPT)
    scoring.add_argument("--window", type=int, default=1020)
    scoring.add_argument("--chunk-size", type=int, default=4096)
    scoring.add_argument("--single", type=int, default=300, help="tokens to feed one by one, for comparison")
    decoding = commands.add_parser("decode")
    decoding.add_argument("--shapes", nargs="+", choices=PYTHIA, default=["160m"])
    decoding.add_argument("--caches", nargs="+", type=int, default=[1024])
    decoding.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    decoding.add_argument("--num-steps", type=int, default=200)
    decoding.add_argument("--mode", help="of torch.compile, such as max-autotune-no-cudagraphs")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report = {"score": score, "decode": decode}[args.command](args, device, dtype)
    print(json.dumps(report | environment(), indent=1))


if __name__ == "__main__":
    main()
