"""Measure float8 training (``train.precision=fp8``) against bf16 in one run.

    python benchmarks/float8.py                                             # on one H100 or H200
    python benchmarks/float8.py --parts layers --sizes 1.4b
    python benchmarks/float8.py --parts curve --store stores/pile --curve-steps 2000

Parts, each with its own table:

- ``products``: milliseconds of a layer's twelve matrix products alone, with random factors: bf16,
  float8 with one scale for each matrix (with and without fast accumulation), and with one scale for
  each row.
- ``casts``: milliseconds of the largest absolute value, and of the cast with transposition by tile
  size, of a matrix of a micro-batch.
- ``layers``: forward and backward pass of compiled layers without embedding and head: bf16, float8
  in some of the products, and the recipes of torchao if it is installed.
- ``steps``: whole training steps with DeepSpeed, as in `sinklm train`. Both engines are in memory
  and take turns. Memory is the peak of one engine.
- ``kernels``: the kernels of the steps in groups, from the profiler.
- ``curve``: the loss of two runs that differ in the precision only, on a token store.

Times of products, casts and layers are the median of --repeats with their standard deviation.

A part that fails is reported, and the others are measured. Results are written to --output after
each part; those of other parts and sizes in the file are kept. Parts that would begin after
--minutes are skipped. On a CPU it only rehearses:
``--sizes 14m train.micro_batch_size=1 train.seq_length=64``.
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from part_report import PartReport, with_spread
from torch import Tensor, nn
from training_profile import Steps, group_of, kernels_of

from sinklm.eval.decode_speed import synchronize
from sinklm.models import SinkGPTNeoXConfig, attention, float8, layer
from sinklm.models.cost import flops_per_token, peak_flops
from sinklm.models.modeling import SinkGPTNeoXModel
from sinklm.train import config as recipe_keys
from sinklm.train import engine, run
from sinklm.train.launch import connected
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.summary import PYTHIA_TOKENIZER_SIZE

PARTS = ("products", "casts", "layers", "steps", "kernels", "curve")
SIZES = "160m,410m,1b,1.4b"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MLP = ("dense_h_to_4h", "dense_4h_to_h")
TILES = [(64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 4), (128, 128, 8), (256, 64, 8), (64, 256, 8)]
LAYER_VARIANTS: dict[str, tuple[str, ...] | str | None] = {
    "bf16": None,
    "float8": float8.PRODUCTS,
    "float8, a pass for each peak": float8.PRODUCTS,
    "float8, not dense": ("query_key_value", *MLP),
    "float8, MLP only": MLP,
    "torchao tensorwise": "tensorwise",
    "torchao rowwise": "rowwise",
    "torchao rowwise_with_gw_hp": "rowwise_with_gw_hp",
}


def settings_of(size: str, args: argparse.Namespace, *more: str) -> list[str]:
    """Return overrides for a step of one micro-batch."""
    given = [*args.overrides, *more]
    config = load_config(f"pythia-{size}", given)
    return [*given, f"train.batch_size_tokens={config.train.micro_batch_size * config.train.seq_length}"]


def plan_of(size: str, args: argparse.Namespace, *more: str) -> Plan:
    return Plan(load_config(f"pythia-{size}", settings_of(size, args, *more)), 1, PYTHIA_TOKENIZER_SIZE)


def milliseconds(call: Callable[[], Any], args: argparse.Namespace) -> list[float]:
    """Return the time of a call on the device, in each repetition."""
    for _ in range(3):
        call()
    times = []
    for _ in range(args.repeats):
        synchronize()
        started = time.perf_counter()
        for _ in range(args.calls):
            call()
        synchronize()
        times.append((time.perf_counter() - started) / args.calls * 1e3)
    return times


def free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def products_of(config: SinkGPTNeoXConfig, num_rows: int) -> dict[str, tuple[int, int, int]]:
    """Return the sizes of a layer's products: rows and columns of the result, inner size."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layers = {
        "query_key_value": (3 * hidden, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (inner, hidden),
        "dense_4h_to_h": (hidden, inner),
    }
    sizes = {}
    for name, (outputs, inputs) in layers.items():
        sizes[f"{name} forward"] = (num_rows, outputs, inputs)
        sizes[f"{name} gradient of states"] = (num_rows, inputs, outputs)
        sizes[f"{name} gradient of weight"] = (outputs, inputs, num_rows)
    return sizes


def attempt(name: str, call: Callable[[], Any], args: argparse.Namespace) -> dict[str, float | None]:
    """Return the time of a call and its spread; None if it fails."""
    try:
        return with_spread(name, milliseconds(call, args), statistics.median)
    except Exception as error:
        print(f"  failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        return {name: None}


def measure_products(size: str, args: argparse.Namespace) -> list[dict]:
    plan = plan_of(size, args)
    rows = []
    for name, (m, n, k) in products_of(plan.model_config, plan.config.train.batch_size_tokens).items():
        left, right = (torch.randn(length, k, device=DEVICE, dtype=torch.bfloat16) for length in (m, n))
        left_scale, right_scale = scale(left), scale(right)
        left_8, right_8 = (left.float() * left_scale).to(float8.FORMAT), (right.float() * right_scale).to(float8.FORMAT)
        by_row = {"scale_a": torch.ones(m, 1, device=DEVICE), "scale_b": torch.ones(1, n, device=DEVICE)}

        whole = {"scale_a": torch.ones((), device=DEVICE), "scale_b": torch.ones((), device=DEVICE)}

        def time_of(name: str, scales: dict, a: Tensor = left_8, b: Tensor = right_8) -> dict[str, float | None]:
            settings = {**scales, "out_dtype": torch.bfloat16, "use_fast_accum": name.endswith("fast")}
            return attempt(name, lambda: torch._scaled_mm(a, b.t(), **settings), args)

        rows.append(
            {
                "size": size,
                "product": name,
                **with_spread("bf16", milliseconds(lambda a=left, b=right: a @ b.t(), args), statistics.median),
                **time_of("float8", whole),
                **time_of("float8 fast", whole),
                **time_of("by row", by_row),
                **time_of("by row fast", by_row),
            }
        )
    total: dict[str, Any] = {"size": size, "product": "all"}
    for key in ("bf16", "float8", "float8 fast", "by row", "by row fast"):
        times = [row[key] for row in rows]
        total[key] = None if None in times else sum(times)
    return [*rows, total]


def measure_casts(size: str, args: argparse.Namespace) -> list[dict]:
    """Time the cast of the widest states of a layer."""
    plan = plan_of(size, args)
    shape = plan.config.train.batch_size_tokens, plan.model_config.intermediate_size
    matrix = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    factor = scale(matrix)
    compiled = torch.compile(scale, dynamic=False)
    cast = torch.compile(_plain_cast, dynamic=False)
    calls: dict[str, tuple[Callable, int]] = {  # bytes for each value
        "peak": (lambda: compiled(matrix), 2),
        "cast, compiled by inductor": (lambda: cast(matrix, factor), 4),
    }
    if float8.kernel is not None and DEVICE.type == "cuda":
        for tile in TILES:
            calls[f"cast, tile {tile}"] = (lambda tile=tile: cast_with(matrix, factor, tile), 4)
        calls["cast, transposed only"] = (lambda: float8.cast_transposed(matrix, factor, float8.FORMAT), 3)
    rows = []
    for name, (call, per_value) in calls.items():
        found = attempt("ms", call, args)
        speed = None if found["ms"] is None else per_value * matrix.numel() / found["ms"] / 1e9
        rows.append({"size": size, "shape": str(shape), "what": name, **found, "TB/s": speed})
    return rows


def scale(matrix: Tensor) -> Tensor:
    return float8.scale_of(float8.peak_of(matrix), float8.FORMAT)


def _plain_cast(matrix: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rounded = (matrix.float() * scale).to(float8.FORMAT)
    return rounded, rounded.t().contiguous()


def cast_with(matrix: Tensor, scale: Tensor, tile: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cast with another tile than that of the module."""
    kernel: Any = float8.kernel
    num_rows, num_columns = matrix.shape
    plain = torch.empty(num_rows, num_columns, device=DEVICE, dtype=float8.FORMAT)
    transposed = torch.empty(num_columns, num_rows, device=DEVICE, dtype=float8.FORMAT)
    grid = (-(-num_columns // tile[1]), -(-num_rows // tile[0]))
    kernel._cast_kernel[grid](
        matrix, scale, plain, transposed, num_rows, num_columns, True, tile[0], tile[1], num_warps=tile[2]
    )
    return plain, transposed


def measure_layers(size: str, args: argparse.Namespace) -> list[dict]:
    return [measure_variant(name, variant, size, args) for name, variant in LAYER_VARIANTS.items()]


def measure_variant(name: str, variant: tuple[str, ...] | str | None, size: str, args: argparse.Namespace) -> dict:
    """Time the forward and backward pass of a few compiled layers."""
    row: dict[str, Any] = {"size": size, "variant": name, "ms per layer": None, "GiB": None}
    free()
    plan = plan_of(size, args)
    config = copy.deepcopy(plan.model_config)
    config.num_hidden_layers = args.layers
    try:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = SinkGPTNeoXModel(config).to(torch.bfloat16).train()
        with converted(model, variant), passes_for_peaks("pass for each peak" in name):
            if DEVICE.type == "cuda":
                model.compile(dynamic=False)
            shape = plan.config.train.micro_batch_size, plan.config.train.seq_length, config.hidden_size
            states = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            grad = 1e-5 * torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

            def step() -> None:
                model.zero_grad()
                states.grad = None
                model(inputs_embeds=states, use_cache=False).last_hidden_state.backward(grad)

            step()
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times = [time / args.layers for time in milliseconds(step, args)]
            row |= with_spread("ms per layer", times, statistics.median)
            if DEVICE.type == "cuda":
                row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        traceback.print_exc()
    return row


@contextmanager
def converted(model: nn.Module, variant: tuple[str, ...] | str | None) -> Iterator[None]:
    """Convert layers to float8: ours by the names of the products, torchao's by its recipe."""
    if not isinstance(variant, str):
        float8.use_float8(model, variant or ())
        yield
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    config = Float8LinearConfig.from_recipe_name(variant)
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: name.rpartition(".")[2] in float8.PRODUCTS
    )

    def linear_but_bias_gradient(linear: Any, states: Tensor) -> tuple[Tensor, None]:
        product = matmul_with_hp_or_float8_args.apply(states, linear.weight.t(), linear.linear_mm_config, linear.config)
        return product + linear.bias.detach(), None

    originals = attention.linear_but_bias_gradient, layer.linear_but_bias_gradient
    attention.linear_but_bias_gradient = layer.linear_but_bias_gradient = linear_but_bias_gradient
    try:
        yield
    finally:
        attention.linear_but_bias_gradient, layer.linear_but_bias_gradient = originals


@contextmanager
def passes_for_peaks(is_wanted: bool) -> Iterator[None]:
    """Let the products compute all peaks themselves."""
    linear = float8.Float8Linear
    original = linear._product

    def without_given_peak(self: Any, states: Tensor, bias: Any, peak: Any, *, has_carrier: bool) -> Any:
        return original(self, states, bias, None, has_carrier=False)

    if is_wanted:
        linear._product = without_given_peak
    try:
        yield
    finally:
        linear._product = original


def measure_steps(size: str, args: argparse.Namespace) -> list[dict]:
    """Time whole steps of both precisions in turns."""
    free()
    with connected() as world:
        runs: dict[str, tuple[Plan, Steps]] = {}
        rows: dict[str, dict] = {}
        for precision in ("bf16", "fp8"):
            plan = plan_of(size, args, f"train.precision={precision}")
            before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
            started = time.perf_counter()
            steps = Steps(plan, world)
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps.take(1)
            synchronize()
            rows[precision] = {"size": size, "precision": precision, "first step, s": time.perf_counter() - started}
            steps.take(args.warmup)
            synchronize()
            if DEVICE.type == "cuda":
                rows[precision]["GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            runs[precision] = plan, steps
        times: dict[str, list[float]] = {precision: [] for precision in runs}
        for _ in range(args.turns):
            for precision, (_, steps) in runs.items():
                times[precision].append(statistics.fmean(steps.time(args.steps)[0]))
        for precision, (plan, steps) in runs.items():
            rows[precision] |= speed_of(plan, times[precision], times["bf16"])
            if "kernels" in args.parts.split(","):
                kernels, _, _ = kernels_of(steps, 2)
                rows[precision]["kernels"] = {name: [sum(ms) / 2, len(ms) / 2] for name, ms in kernels.items()}
        runs.clear()
    free()
    return list(rows.values())


def speed_of(plan: Plan, seconds: list[float], of_bf16: list[float]) -> dict:
    positions = plan.config.train.batch_size_tokens
    peak, mean = peak_flops(DEVICE, "bf16"), statistics.mean(seconds)
    operations = flops_per_token(plan.model_config, plan.config.train.seq_length) * positions
    ratios = [before / after for before, after in zip(of_bf16, seconds, strict=True)]
    return {
        **with_spread("ms", [1e3 * each for each in seconds]),
        "tokens/s": positions / mean,
        "MFU of bf16": operations / mean / peak if peak else None,
        "× bf16": statistics.mean(ratios),
        "×, least": min(ratios),
        "×, most": max(ratios),
    }


def kernel_rows(steps: list[dict]) -> list[dict]:
    """Return the milliseconds of each group of kernels, and of the longest of the first size."""
    rows = []
    for step in steps:
        kernels = step.get("kernels", {})
        groups: dict[str, float] = {}
        for name, (ms, _) in kernels.items():
            groups[group_of(name)] = groups.get(group_of(name), 0.0) + ms
        key = {"size": step["size"], "precision": step.get("precision")}
        rows += [{**key, "kernel": f"all of {group}", "ms": ms, "times": None} for group, ms in groups.items()]
        longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:20] if step["size"] == steps[0]["size"] else []
        rows += [{**key, "kernel": name[:90], "ms": ms, "times": times} for name, (ms, times) in longest]
    return rows


def measure_curve(args: argparse.Namespace) -> list[dict]:
    """Train twice, and compare losses over windows of steps and on the validation split."""
    if args.store is None:
        raise ValueError("give --store, a folder made by `sinklm prepare`")
    curves: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("bf16", "fp8"):
            run_dir = Path(folder) / precision
            run.train(
                f"pythia-{args.curve_size}",
                [
                    *args.overrides,
                    *(f"data.path={args.store}", f"train.run_dir={run_dir}", f"train.precision={precision}"),
                    *(f"train.num_steps={args.curve_steps}", f"train.seq_length={args.curve_seq_length}"),
                    f"train.micro_batch_size={args.curve_samples}",
                    f"train.batch_size_tokens={args.curve_samples * args.curve_seq_length}",
                    *(f"validation.every_steps={args.curve_steps}", "validation.num_samples=256"),
                    *("checkpoint.every_steps=null", "wandb.mode=disabled", *args.curve_overrides),
                ],
            )
            lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            curves[precision] = [json.loads(line) for line in lines]
            free()
    return curve_rows(curves, args.curve_steps)


def curve_rows(curves: dict[str, list[dict]], num_steps: int) -> list[dict]:
    windows = [
        (start, min(start + num_steps // 10, num_steps)) for start in range(0, num_steps, max(num_steps // 10, 1))
    ]
    rows = []
    for start, end in windows:
        losses = {
            precision: statistics.mean(line["loss"] for line in lines if "loss" in line and start < line["step"] <= end)
            for precision, lines in curves.items()
        }
        rows.append({"steps": f"{start + 1}–{end}", **losses, "difference, %": difference(losses)})
    last = {
        precision: next((line["validation_loss"] for line in reversed(lines) if "validation_loss" in line), None)
        for precision, lines in curves.items()
    }
    rows.append({"steps": "validation", **last, "difference, %": difference(last)})
    return rows


def difference(losses: dict[str, Any]) -> float | None:
    return None if None in losses.values() else 100 * (losses["fp8"] / losses["bf16"] - 1)


def allow_everything(args: argparse.Namespace) -> None:
    """Lift the limits of ``train.precision=fp8``, which these measurements are for."""
    recipe_keys.FLOAT8_WIDTH = 0
    if DEVICE.type == "cpu":
        engine.check_float8 = lambda device: None
        args.overrides = [*args.overrides, "train.compile=false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,kernels,layers,casts,products", help=f"of {','.join(PARTS)}")
    parser.add_argument("--sizes", default=SIZES, help="Pythia sizes")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins later")
    parser.add_argument("--layers", type=int, default=4, help="layers of a model in the part layers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=10, help="calls timed together")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=10, help="steps timed together")
    parser.add_argument("--turns", type=int, default=4, help="turns of each precision")
    parser.add_argument("--store", type=Path, help="token store of the part curve")
    parser.add_argument("--curve-size", default="410m")
    parser.add_argument("--curve-steps", type=int, default=2000)
    parser.add_argument("--curve-seq-length", type=int, default=1024)
    parser.add_argument("--curve-samples", type=int, default=16, help="samples per step")
    parser.add_argument("--curve-overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--output", type=Path, default=Path("results/float8.json"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings as for `sinklm train`")
    args = parser.parse_intermixed_args()
    allow_everything(args)
    report = PartReport(args.output, {key: str(value) for key, value in vars(args).items()}, args.minutes)
    measures = {"products": measure_products, "casts": measure_casts, "layers": measure_layers, "steps": measure_steps}
    for part in args.parts.split(","):
        if part == "curve":
            report.add(part, lambda: measure_curve(args))
        elif part == "kernels":
            report.add(part, lambda: kernel_rows(report.content["parts"].get("steps", [])))
        else:
            for size in reversed(args.sizes.split(",")):
                report.add(part, lambda part=part, size=size: measures[part](size, args), size)


if __name__ == "__main__":
    main()
