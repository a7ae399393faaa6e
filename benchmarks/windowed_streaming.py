"""Time of a decoding step, of reading text, and memory of caches whose layers differ.

    python benchmarks/windowed_streaming.py --output windowed_streaming.json

Models have random weights and differ in the windows of their layers only. ``decode`` is the
compiled step of one stream, captured on a GPU (mean and standard deviation); ``read`` is a text of
``--num-tokens`` in chunks. A part that fails has its error in the JSON, and the others go on.
"""

import argparse
import json
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import transformers
from part_report import shown, with_spread

from sinklm.eval.decode_speed import step_times, synchronize
from sinklm.models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from sinklm.streaming import Generator, StreamingCache

SIZES = {"14m": (128, 6, 4), "160m": (768, 12, 12), "410m": (1024, 24, 16)}  # width, layers, heads
PATTERNS = {"full": None, "3:1": 3, "all windows": 0}  # windowed layers before each full one


def make_model(size: str, pattern: str, window: int, trained_length: int) -> SinkGPTNeoXForCausalLM:
    width, num_layers, num_heads = SIZES[size]
    every = PATTERNS[pattern]
    windows = [None if every and i % (every + 1) == every else window for i in range(num_layers)]
    config = SinkGPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
        max_position_embeddings=trained_length,
        sink={"kind": "token"},
        layer_windows=None if every is None else windows,
    )
    is_gpu = torch.cuda.is_available()
    with torch.device("cuda" if is_gpu else "cpu"):
        return SinkGPTNeoXForCausalLM._from_config(config, dtype=torch.bfloat16 if is_gpu else torch.float32).eval()


@torch.inference_mode()
def measure(args: argparse.Namespace, pattern: str, kept_and_window: tuple[int, int]) -> dict[str, float]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = make_model(args.size, pattern, args.layer_window, sum(kept_and_window) + 2)
    num_kept, window = kept_and_window
    ids = torch.randint(50000, (1, max(args.num_tokens, window + 64)), device=model.device)
    new_cache = partial(StreamingCache.for_model, model, num_kept=num_kept, window=window)
    cache = new_cache(chunk_size=4096)
    synchronize()
    start = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize()
    seconds, cache = time.perf_counter() - start, new_cache()
    generator = Generator(model, cache)
    generator.decoder.prefill(ids[:, : window + 64])
    times = step_times(partial(generator.read_one, ids[:, :1].clone()), 5, args.num_steps)
    return {
        **with_spread("decode ms", times),
        "read tokens/s": ids.shape[1] / seconds,
        "cache MB": cache.num_bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="160m")
    parser.add_argument("--caches", nargs="+", default=["1+1023", "1+4095", "1+16383"])
    parser.add_argument("--layer-window", type=int, default=255)
    parser.add_argument("--num-tokens", type=int, default=200_000)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("windowed_streaming.json"))
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__, "results": []}
    report |= {name: getattr(args, name) for name in ("size", "layer_window", "num_tokens", "num_steps")}
    print(f"{'layers':12} {'cache':>8} {'decode ms':>16} {'read tokens/s':>14} {'cache MB':>9}")
    for cache in args.caches:
        num_kept, window = map(int, cache.split("+"))
        for pattern in PATTERNS:
            row = {"layers": pattern, "cache": cache}
            try:
                row |= measure(args, pattern, (num_kept, window))
                cells = f"{shown(row, 'decode ms'):>16} {row['read tokens/s']:14,.0f} {row['cache MB']:9.1f}"
            except Exception:
                row["error"] = traceback.format_exc()
                cells = row["error"].strip().splitlines()[-1]
            print(f"{pattern:12} {cache:>8} {cells}", flush=True)
            report["results"].append(row)
            args.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
