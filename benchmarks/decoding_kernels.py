"""Time the kernels of the decoding step against the operations they replace. Needs a GPU.

    python benchmarks/decoding_kernels.py [--settings]

Prints microseconds per call and the standard deviation of the repetitions, in a CUDA graph of calls
on copies that together exceed the L2 cache, like the layers of a model. The floor is the time to
read weights or cache once at the copy bandwidth measured in the same run.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from types import ModuleType

import torch
import triton
from part_report import spread
from torch.nn import functional as F

from sinklm.eval.decode_speed import copy_bandwidth, step_times
from sinklm.streaming import kernels
from sinklm.streaming.buffers import StreamingLayer
from sinklm.streaming.encodings import Rotary
from sinklm.streaming.kernels import attention, matvec, parts, quantized_attention
from sinklm.streaming.quantized import KV_DTYPES, QuantizedLayer
from sinklm.streaming.rule import StreamShape
from sinklm.streaming.steps import DecodeStep

# heads, groups, head size, cache, batch: Pythia-160M and 6.9B, then fewer groups than heads:
# Llama-3-8B and Falcon-7B
ATTENTION = [(12, 12, 64, 1024, 1), (12, 12, 64, 1024, 8), (32, 32, 128, 4096, 1), (32, 32, 128, 4096, 8)]
ATTENTION += [(32, 8, 128, 4096, 1), (32, 8, 128, 4096, 8), (71, 1, 64, 2048, 1), (71, 1, 64, 2048, 8)]
# outputs, inputs: the four matrices of a layer, and the head
LINEAR = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (50304, 768)]
LINEAR += [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384), (50432, 4096)]
BYTES_IN_ALL = 400e6
DTYPE = torch.bfloat16


def microseconds(calls: list[Callable[[], object]]) -> list[float]:
    """Return the time of a call in each repetition, with all calls captured in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [time / len(calls) * 1e3 for time in step_times(graph.replay, 3, 30)]


def attention_calls(
    heads: int, groups: int, head_size: int, cache: int, batch: int, kv_dtype: str | None = None
) -> tuple[list[Callable[[], object]], int]:
    """Return calls of the step's attention, one for each layer, and the bytes read by one call."""
    shape, inv_freq = StreamShape(4, cache - 4), torch.ones(head_size // 8, device="cuda")
    query = torch.randn(batch, heads, 1, head_size, device="cuda", dtype=DTYPE)
    key = torch.randn(batch, groups, 1, head_size, device="cuda", dtype=DTYPE)
    layers: list[StreamingLayer] = []
    while len(layers) < 2 or sum(layer.num_bytes for layer in layers) < BYTES_IN_ALL:
        layers.append(StreamingLayer(shape) if kv_dtype is None else QuantizedLayer(kv_dtype, shape))
        layers[-1].allocate(key, key)
    num_bytes = layers[0].num_bytes
    num_seen = torch.full((batch,), 3 * cache, device="cuda")
    step = DecodeStep(layers, shape, Rotary(lambda: inv_freq), num_seen, num_seen - cache - 5)
    return [lambda i=i: step.attend(i, query, key, key, 0.1) for i in range(len(layers))], num_bytes


def linear_calls(num_out: int, num_in: int) -> tuple[list[Callable[[], object]], int]:
    size = (num_out, num_in)
    num_bytes = num_out * num_in * DTYPE.itemsize
    weights = [
        torch.randn(size, device="cuda", dtype=DTYPE) for _ in range(min(24, max(2, int(BYTES_IN_ALL / num_bytes))))
    ]
    states, bias = torch.randn(1, num_in, device="cuda", dtype=DTYPE), torch.randn(num_out, device="cuda", dtype=DTYPE)
    return [lambda weight=weight: F.linear(states, weight, bias) for weight in weights], num_bytes


@contextmanager
def settings(values: dict[tuple[ModuleType, str], object]) -> Iterator[None]:
    old = {place: getattr(*place) for place in values}
    for place, value in values.items():
        setattr(*place, value)
    yield
    for place, value in old.items():
        setattr(*place, value)


def with_matvec(calls: list[Callable[[], object]]) -> list[float]:
    def run(call: Callable[[], object]) -> None:
        with kernels.OneRowLinear():
            call()

    return microseconds([lambda call=call: run(call) for call in calls])


def sweep(measure: Callable[[], list[float]], choices: dict[tuple[ModuleType, str], tuple[int, ...]]) -> None:
    """Print the five fastest combinations of a kernel's settings."""
    results = []
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        with settings(chosen):
            try:
                results.append((fmean(measure()), chosen))
            except triton.OutOfResources as error:
                print(f"    {list(chosen.values())}: {error}", flush=True)
    for time, chosen in sorted(results, key=lambda result: result[0])[:5]:
        names = ", ".join(f"{name}={value}" for (_, name), value in chosen.items())
        print(f"    {time:8.2f}  {names}", flush=True)


def sweep_attention(calls: list[Callable[[], object]], module: ModuleType, block_bytes: tuple[int, ...]) -> None:
    choices = {(module, "BLOCK_BYTES"): block_bytes, (parts, "PROGRAMS_PER_PROCESSOR"): (1, 2, 3, 4, 6)}
    sweep(lambda: microseconds(calls), choices)


def report_attention(has_sweep: bool, bandwidth: float) -> None:
    print("attention: heads, groups, head size, cache, batch: floor, SDPA with a mask, ours; int8, int4: floor, ours")
    for size in ATTENTION:
        calls, num_bytes = attention_calls(*size)
        with settings({(kernels, "is_available"): False}):
            plain = microseconds(calls)
        cells = [cell([num_bytes / bandwidth * 1e6]), cell(plain), cell(microseconds(calls))]
        if has_sweep:
            sweep_attention(calls, attention, (4096, 8192, 16384, 32768))
        for kv_dtype in KV_DTYPES:
            calls, num_bytes = attention_calls(*size, kv_dtype)
            cells += [cell([num_bytes / bandwidth * 1e6]), cell(microseconds(calls))]
            if has_sweep:
                print(f"  {kv_dtype}")
                sweep_attention(calls, quantized_attention, (8192, 16384, 32768))
        print(f"{size!s:>22}:", *cells, flush=True)


def cell(times: list[float]) -> str:
    """Return the mean of times, and their standard deviation if there are several."""
    deviation = spread(times)
    return f"{fmean(times):8.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", action="store_true", help="try other settings of the kernels")
    args = parser.parse_args()
    bandwidth = copy_bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    report_attention(args.settings, bandwidth)
    print("linear layer of one row: outputs, inputs: floor, cuBLAS, ours")
    for size in LINEAR:
        calls, num_bytes = linear_calls(*size)
        cells = [num_bytes / bandwidth * 1e6], microseconds(calls), with_matvec(calls)
        print(f"{size!s:>22}:", *map(cell, cells), flush=True)
        if args.settings:
            choices = {(matvec, "TILE"): (1024, 2048, 4096), (matvec, "MAX_BLOCK_IN"): (512, 1024, 2048)}
            sweep(lambda calls=calls: with_matvec(calls), choices)


if __name__ == "__main__":
    main()
