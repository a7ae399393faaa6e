"""Compare windowed layers with full attention: speed and memory of a training step, and of kernels.

    python benchmarks/windows.py                                   # Pythia-160M on one GPU
    python benchmarks/windows.py --size 14m --lengths 256,1024 --tokens 1024 --window 127  # a CPU

Every micro-batch has the same number of positions (--tokens), whatever the length of a sample.

- Steps: forward and backward pass of the compiled model, one sink token, random tokens, without an
  optimizer. ``full`` has full attention, ``window`` a fixed window in every layer, ``drawn`` a
  window drawn in each step as in training (from 32 to `--window`), ``3:1`` three windowed layers
  and one full one, ``segments`` carried keys (`sinklm.models.carried`) with segments of twice the
  window.
- Kernels: attention of one layer, forward and backward: ``cuDNN`` and ``flash`` are full and
  causal, ``band`` is the kernel for a fixed window (cuDNN if nvidia-cudnn-frontend is installed),
  ``drawn band`` that for a drawn one, and ``band + kept`` what layers with a fixed window use.
  ``+ logit`` adds an arm's column.

"of full" is the speed relative to full attention at the same length, "of shortest" that relative to
the same layers at the first length. A part that fails is reported, and the others still run.
Times are means with the standard deviation of the steps. Results are printed immediately, and
written to --output as JSON and Markdown.
"""

import argparse
import itertools
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import part_report
import torch
import transformers
from torch import Tensor

from sinklm.eval.decode_speed import step_times, synchronize
from sinklm.models import CarriedKeys, SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from sinklm.models.band import band_backward, band_forward, has_cudnn
from sinklm.models.cost import flops_per_token, peak_flops
from sinklm.models.fused_attention import CUDNN, FLASH
from sinklm.models.fused_windows import fused_windowed_attention
from sinklm.models.sink_column import SinkColumn
from sinklm.models.windows import WindowRule
from sinklm.train.plan import Plan
from sinklm.train.recipe import load_config
from sinklm.train.summary import PYTHIA_TOKENIZER_SIZE
from sinklm.train.windows import window_of_step

LAYERS = ("full", "window", "drawn", "3:1", "segments")
KERNELS = ("cuDNN", "flash", "band", "drawn band", "band + kept", "band + kept + logit")
Settings = argparse.Namespace


def windowed_config(layers: str, length: int, args: Settings) -> SinkGPTNeoXConfig:
    """Return the configuration of the size, with one sink token and the windows of ``layers``."""
    recipe = load_config(f"pythia-{args.size}", [f"train.seq_length={length}", "model.sink.kind=token"])
    fields = Plan(recipe, 1, PYTHIA_TOKENIZER_SIZE).model_config.to_dict()
    if layers != "full":
        num_layers = fields["num_hidden_layers"]
        if layers == "drawn":
            fields["window_range"] = [min(32, args.window), args.window]
        fields["layer_windows"] = [None if layers == "3:1" and i % 4 == 3 else args.window for i in range(num_layers)]
    return SinkGPTNeoXConfig(**fields)


def measure_step(layers: str, length: int, args: Settings) -> dict:
    """Return seconds and memory of a step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = windowed_config(layers, length, args)
    with torch.device(args.device):
        model = SinkGPTNeoXForCausalLM(config)
    for parameter in model.parameters():  # buffers stay float32, as in DeepSpeed
        parameter.data = parameter.data.to(torch.bfloat16 if args.device == "cuda" else torch.float32)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
    samples = torch.randint(0, PYTHIA_TOKENIZER_SIZE, (args.tokens // length, length), device=args.device)
    steps = itertools.count(1)

    def step() -> None:
        settings = {"skip_logits": True, "use_cache": False}
        if layers == "drawn":
            settings["window"] = torch.tensor(window_of_step(0, next(steps), *config.window_range))
        if layers != "segments":
            forward(samples[:, :-1], labels=samples, **settings).loss.backward()
        else:
            carried, size = CarriedKeys(), min(length, 2 * args.window + 2)
            for start in range(0, length, size):
                # The first segment has a position for the sink, as a whole sample has.
                first, last = max(start - 1, 0), start + size - 1
                segment = samples[:, first : last + 1]
                output = forward(segment[:, :-1], labels=segment, carried=carried, **settings)
                carried = output.carried
                output.loss.backward()
        model.zero_grad(set_to_none=True)

    row = timed(step, args)
    row["tokens_per_second"] = args.tokens / row["seconds"]
    if args.device == "cuda" and (peak := peak_flops(torch.device("cuda", 0), "bf16")):
        row["mfu"] = row["tokens_per_second"] * flops_per_token(config, length) / peak
    return row


def timed(step: Callable[[], None], args: Settings) -> dict:
    """Return mean and deviation of a step's seconds after warm-up, and the steps' peak memory."""
    for _ in range(args.num_warmup_steps):
        step()
    synchronize()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [time / 1e3 for time in step_times(step, 0, args.num_steps)]
    return {
        "seconds": statistics.fmean(seconds),
        "stdev": part_report.spread(seconds),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0,
    }


def measure_kernel(name: str, length: int, args: Settings) -> dict:
    """Return the times of the forward and of the backward pass of one layer's attention."""
    config = windowed_config("full", length, args)
    head_size = config.hidden_size // config.num_attention_heads
    shape = (args.tokens // length, length, config.num_attention_heads, head_size)
    states = [torch.randn(shape, device=args.device, dtype=torch.bfloat16) for _ in range(4)]
    forward, backward = passes(name, states, args)
    row = {"forward": timed(forward, args), "backward": timed(backward, args)}
    return row | {"seconds": row["forward"]["seconds"] + row["backward"]["seconds"]}


def passes(name: str, states: list[Tensor], args: Settings) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return functions that run the forward and the backward pass of a kernel."""
    grad, query, key, value = states
    scaling = query.shape[-1] ** -0.5
    if name in ("cuDNN", "flash"):
        kernel = CUDNN if name == "cuDNN" else FLASH
        grad, *inputs = (tensor.transpose(1, 2) for tensor in states)
        out, lse = kernel.forward(*inputs, True, scaling)
        return (
            lambda: kernel.forward(*inputs, True, scaling),
            lambda: kernel.backward(grad, *inputs, out, lse, True, scaling),
        )
    if name in ("band", "drawn band"):
        settings = {"window": args.window, "scaling": scaling, "by_cudnn": name == "band"}
        out, lse = band_forward(query, key, value, **settings)
        return (
            lambda: band_forward(query, key, value, **settings),
            lambda: band_backward(grad, query, key, value, out, lse, **settings),
        )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    num_rotated = query.shape[-1] // 4
    turn = (torch.arange(query.shape[1], device=query.device) - args.window - 1).clamp(min=0)
    angles = turn[:, None] * 10000.0 ** (-torch.arange(num_rotated, device=query.device) / num_rotated)
    tables = (angles.cos()[None], angles.sin()[None])
    rule = WindowRule(args.window, None, 1, turn[None], None, *tables, is_dense=True)
    column = None
    if "logit" in name:
        column = SinkColumn(torch.zeros(query.shape[2], 1, device=query.device, requires_grad=True))
    kept = fused_windowed_attention(*inputs, rule, column, scaling)

    def run() -> None:  # with gradients: without, FlashAttention computes the band
        fused_windowed_attention(*inputs, rule, column, scaling)

    return run, lambda: torch.autograd.grad(kept, inputs, grad, retain_graph=True)


def measure(kind: str, name: str, length: int, args: Settings) -> dict:
    """Return the row of one part, with its error if it failed."""
    row: dict = {"kind": kind, "name": name, "length": length}
    try:
        row |= (measure_step if kind == "step" else measure_kernel)(name, length, args)
    except Exception as error:  # the other parts are still measured
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def table(rows: list[dict]) -> str:
    """Return Markdown tables of steps and kernels."""
    done = {(row["kind"], row["name"], row["length"]): row for row in rows if "error" not in row}
    shortest = min(row["length"] for row in rows)
    steps: list[dict] = []
    kernels: list[dict] = []
    for row in rows:
        if row["kind"] == "step":
            shown = {"layers": row["name"], "positions": f"{row['length']:,}"}
            steps.append(shown)
        else:
            shown = {"attention of a layer": row["name"], "positions": f"{row['length']:,}"}
            kernels.append(shown)
        if "error" in row:
            shown["error"] = row["error"]
        elif row["kind"] == "kernel":
            shown |= {f"{part}, ms": milliseconds(row[part], 3) for part in ("forward", "backward")}
            shown["sum, ms"] = f"{1e3 * row['seconds']:.3f}"
        else:
            shown["ms/step"] = milliseconds(row, 1)
            shown["tokens/s"] = f"{row['tokens_per_second']:,.0f}"
            shown["MFU"] = f"{row['mfu']:.1%}" if "mfu" in row else ""
            shown["memory, GiB"] = f"{row['memory_gib']:.2f}"
            others = {"full": ("full", row["length"]), "shortest": (row["name"], shortest)}
            for name, key in others.items():
                other = done.get(("step", *key))
                shown[f"of {name}"] = f"{other['seconds'] / row['seconds']:.3f}" if other else ""
    return "\n\n".join(part_report.table(part) for part in (steps, kernels) if part) + "\n"


def milliseconds(times: dict, digits: int) -> str:
    """Return the mean of the steps and their standard deviation."""
    spread = "" if times["stdev"] is None else f" ± {1e3 * times['stdev']:.{digits}f}"
    return f"{1e3 * times['seconds']:.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="160m")
    parser.add_argument("--lengths", default="2048,4096,16384,65536")
    parser.add_argument("--tokens", type=int, default=65536, help="positions of a micro-batch")
    parser.add_argument("--window", type=int, default=1023)
    parser.add_argument("--layers", default=",".join(LAYERS), help="parts of the steps, or nothing")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="parts of the kernels, or nothing (CUDA only)")
    parser.add_argument("--num-warmup-steps", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/windows"),
        help="path of the files, to which .json and .md are added",
    )
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bands of fixed windows": "cuDNN" if args.device == "cuda" and has_cudnn() else "FlashAttention",
    }
    settings = {key: str(value) for key, value in vars(args).items()}
    report: dict = {"device": name, **versions, "settings": settings, "rows": []}
    print(name, flush=True)
    parts = [("kernel", part) for part in args.kernels.split(",") if part and args.device == "cuda"]
    parts += [("step", part) for part in args.layers.split(",") if part]
    for length in map(int, args.lengths.split(",")):
        for kind, part in parts:
            report["rows"].append(row := measure(kind, part, length, args))
            print(row, flush=True)
            Path(f"{args.output}.json").write_text(json.dumps(report, indent=1) + "\n")
            Path(f"{args.output}.md").write_text(table(report["rows"]))
    print("\n" + table(report["rows"]))


if __name__ == "__main__":
    main()
