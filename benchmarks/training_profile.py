"""Profile a training step: the time of its kernels, in groups, and the time between them.

    python benchmarks/training_profile.py pythia-160m
    python benchmarks/training_profile.py pythia-160m model.sink.kind=logit --without gelu,rotary
    python benchmarks/training_profile.py pythia-70m --inductor triton.cudagraphs=true

Runs steps like `sinklm train` (`sinklm.train.engine`: DeepSpeed, ZeRO-1, bfloat16 on a GPU) on
random tokens, with one micro-batch per step unless ``train.batch_size_tokens`` is set. Steps are
first timed without a profiler, then a few are profiled.

- "stdev": standard deviation of the steps, each of which ends when its last kernel does.
- "gap": time of a step minus the time of its kernels.
- "idle": time in which no kernel ran while profiling. A larger gap means that kernels were slower
  without the profiler (in a long run the GPU is warmer and its clock lower).
- "host": time in which the host queued a step, which may include waiting for the device.

--without disables parts of sinklm, to measure their effect; --inductor sets options of
`torch._inductor.config`.

Recorded results: docs/results/training-speed.md.
"""

import argparse
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from part_report import spread
from torch.profiler import ProfilerActivity, profile
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

from sinklm.eval.decode_speed import mark, milliseconds_between, synchronize
from sinklm.models import SinkGPTNeoXForCausalLM, attention, layer, loss
from sinklm.models.cost import peak_flops
from sinklm.train import deepspeed_patches, fused_update
from sinklm.train.config import TrainingConfig
from sinklm.train.engine import make_engine
from sinklm.train.launch import World, connected
from sinklm.train.plan import Plan
from sinklm.train.progress import peak_memory_gib
from sinklm.train.recipe import load_config
from sinklm.train.step import PendingStep, train_step
from sinklm.train.summary import PYTHIA_TOKENIZER_SIZE

# Ranges that the profiler reports in addition to kernels.
RANGES = ("ProfilerStep", "Torch-Compiled", "## Call", "nccl:", "Optimizer.", "CompiledFunction", "autograd::")
# A kernel's group is that of the first matching pattern. Inductor's kernel names list the fused
# operations.
GROUPS = {
    "rotary and layout": r"^triton.*(attention|_cat_|_cat$|split)|rotate",  # inductor names copies by consumer
    "attention": r"flash|fmha|sdpa|cudnn.*attention|attention|convert_dq|compute_dot_do_o|mha|_(merge|gradient)_kernel",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitK|(^|::)(mm|addmm|bmm)$|mkl",
    "loss": r"cross_entropy|log_softmax|logsumexp",
    "GELU": r"gelu|erf",
    "layer norms": r"layer_norm|native_layer_norm|mix_order",
    "embedding": r"embedding|index_put|indexing_backward|sort|radix",
    "communication": r"nccl|gloo|c10d",
    "optimizer": r"adam|multi_tensor|foreach",
    "copies and fills": r"memcpy|memset|copy|fill|CatArray",
}
WITHOUT = {
    "gelu": lambda: setattr(layer.SinkMLP, "forward", GPTNeoXMLP.forward),
    "rotary": lambda: setattr(attention, "is_fused", _never),
    "loss": lambda: setattr(loss, "cross_entropy_", None),
    "adamw": lambda: setattr(fused_update, "has_kernel", _never),
    "update": lambda: setattr(deepspeed_patches, "fused_update", lambda *_: None),
}


def _never(_: Any) -> bool:
    return False


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "rest")


def recipe_config(args: argparse.Namespace, num_ranks: int) -> TrainingConfig:
    """Return the recipe with one micro-batch per step on each rank."""
    on_gpu = torch.cuda.is_available()
    first = [f"train.precision={'bf16' if on_gpu else 'fp32'}", *args.overrides]
    config = load_config(args.recipe, first)
    if any(override.startswith("train.batch_size_tokens") for override in args.overrides):
        return config
    positions = num_ranks * config.train.micro_batch_size * config.train.seq_length
    return load_config(args.recipe, [*first, f"train.batch_size_tokens={positions}"])


def random_batches(plan: Plan, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield a few micro-batches repeatedly, from device memory."""
    shape = (4, plan.config.train.micro_batch_size, plan.tokens_per_sample)
    batches = torch.randint(0, PYTHIA_TOKENIZER_SIZE, shape, device=device)
    while True:
        yield from batches


class Steps:
    """Runs training steps."""

    def __init__(self, plan: Plan, world: World):
        torch.manual_seed(plan.config.train.seed)
        with torch.device(world.device if world.device.type == "cuda" else "cpu"):
            model = SinkGPTNeoXForCausalLM(plan.model_config)
        self._plan, self._world = plan, world
        self._engine = make_engine(model, plan, world.device)
        self._batches = random_batches(plan, world.device)

    def take(self, num_steps: int, after_each: Callable[[], None] = lambda: None) -> list[float]:
        """Run steps like the training loop: each is read after the next one is queued.

        Args:
            after_each: called when a step is queued.

        Returns:
            seconds that the host needed to queue each step.
        """
        seconds = []
        pending: PendingStep | None = None
        for _ in range(num_steps):
            queued = train_step(self._engine, self._batches, self._plan, self._world, step=1, lr=1e-4)
            after_each()
            seconds.append(queued.host_seconds)
            if pending is not None:
                pending.result()
            pending = queued
        assert pending is not None
        assert pending.result().loss > 0
        return seconds

    def time(self, num_steps: int) -> tuple[list[float], list[float]]:
        """Return the seconds of each step, and those in which the host queued it."""
        synchronize()
        marks = [mark()]
        by_host = self.take(num_steps, lambda: marks.append(mark()))
        synchronize()
        return [milliseconds_between(*pair) / 1e3 for pair in pairwise(marks)], by_host


def kernels_of(steps: Steps, num_steps: int) -> tuple[dict[str, list[float]], float, float]:
    """Profile steps; on a CPU, operators count as kernels.

    Returns:
        milliseconds of each kernel by name, and the milliseconds of a step with and without a
            running kernel.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        steps.take(num_steps)
        synchronize()
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in profiler.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA if on_gpu else not event.cpu_children
        if is_kernel and not event.name.startswith(RANGES):
            spans.append((event.time_range.start, event.time_range.end))
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    busy = covered(spans)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return kernels, busy / 1e3 / num_steps, (whole - busy) / 1e3 / num_steps


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def report(args: argparse.Namespace, plan: Plan, world: World) -> dict:
    steps = Steps(plan, world)
    started = time.perf_counter()
    steps.take(1)
    synchronize()
    first = time.perf_counter() - started
    steps.take(args.num_warmup_steps)
    times, by_host = steps.time(args.num_steps)
    seconds = statistics.fmean(times)
    positions = plan.config.train.batch_size_tokens
    peak = peak_flops(world.device, plan.config.train.precision)
    operations = plan.flops_per_token() * positions
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "ranks": world.size,
        "command": [args.recipe, *args.overrides, "without", args.without, "inductor", *args.inductor],
        "first_step_s": round(first, 1),
        "ms_per_step": round(1e3 * seconds, 2),
        "stdev_ms": None if (stdev := spread(times)) is None else round(1e3 * stdev, 2),
        "host_ms": round(1e3 * statistics.median(by_host), 2),
        "tokens_per_second": round(positions / seconds),
        "mfu": round(operations / seconds / peak / world.size, 4) if peak else None,
        "memory_gib": round(peak_memory_gib(world.device), 2),
    }
    if args.num_profiled_steps:
        kernels, busy_ms, idle_ms = kernels_of(steps, args.num_profiled_steps)
        n = args.num_profiled_steps
        groups: Counter[str] = Counter()
        for name, times in kernels.items():
            groups[group_of(name)] += sum(times) / n
        longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[: args.num_kernels]
        result |= {
            "kernels_ms": round(busy_ms, 2),
            "gap_ms": round(1e3 * seconds - busy_ms, 2),
            "idle_ms": round(idle_ms, 2),
            "num_kernels": round(sum(map(len, kernels.values())) / n),
            "groups_ms": {group: round(ms, 2) for group, ms in groups.most_common()},
            "longest": [
                {"ms": round(sum(times) / n, 3), "times": round(len(times) / n, 1), "kernel": name[:160]}
                for name, times in longest
            ],
        }
    return result


def table(result: dict) -> str:
    lines = [" ".join(map(str, result["command"]))]
    lines += [f"  {key:18} {value}" for key, value in result.items() if key not in ("command", "groups_ms", "longest")]
    lines += [f"  {ms:9.2f} ms  {group}" for group, ms in result.get("groups_ms", {}).items()]
    lines += [f"  {row['ms']:9.3f} ms {row['times']:7.1f} ×  {row['kernel']}" for row in result.get("longest", [])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings as for `sinklm train`")
    parser.add_argument("--without", default="", help=f"parts to disable, of {','.join(WITHOUT)}")
    parser.add_argument("--inductor", nargs="*", default=[], metavar="option=value", help="options; values are JSON")
    parser.add_argument("--num-warmup-steps", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=20, help="steps timed without the profiler")
    parser.add_argument("--num-profiled-steps", type=int, default=3)
    parser.add_argument("--num-kernels", type=int, default=25)
    parser.add_argument("--output", type=Path, help="file to which a line of JSON is appended")
    args = parser.parse_intermixed_args()
    for part in filter(None, args.without.split(",")):
        WITHOUT[part]()
    for option in args.inductor:
        name, _, value = option.partition("=")
        set_option(torch._inductor.config, name, value)
    with connected() as world:
        plan = Plan(recipe_config(args, world.size), world.size, PYTHIA_TOKENIZER_SIZE)
        result = report(args, plan, world)
        if world.is_main:
            print(table(result), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")


def set_option(config: Any, name: str, value: str) -> None:
    *path, last = name.split(".")
    for part in path:
        config = getattr(config, part)
    before, after = getattr(config, last), json.loads(value)
    if isinstance(before, bool) and not isinstance(after, bool):  # with 1 instead of true, torch fails much later
        raise SystemExit(f"--inductor {name}={value}: write true or false")
    setattr(config, last, after)


if __name__ == "__main__":
    main()
