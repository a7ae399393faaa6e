"""Compare the training kernels with those of other libraries and of torch.compile, in one run.

    pip install liger-kernel cut-cross-entropy torchao
    python benchmarks/kernel_peers.py -o kernels.json        # on one H100 or H200

Parts, each with its own table. Libraries that are not installed are rows with an error. Times are
means with the standard deviation of the steps.

- ``loss``: forward and backward pass of the head with the mean cross-entropy: milliseconds, peak
  memory beyond the inputs, and the error of both gradients relative to float32.
- ``gelu``: GELU, and its backward pass with the sum over rows, which is the gradient of the bias.
  This part and the next one also have the largest relative error of a result.
- ``rotary``: split projections into queries and keys and rotate a quarter of the dimensions, and
  the backward pass with the sum over rows.
- ``adamw``: an update of flat float32 weights, with a bfloat16 copy.

On a CPU it only rehearses: ``--sizes tiny``.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from part_report import PartReport, with_spread
from torch import Tensor
from torch.nn import functional as F

from sinklm.eval.decode_speed import peak_memory, step_times
from sinklm.eval.report import library_versions
from sinklm.models.loss import linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
LIBRARIES = ("liger-kernel", "cut-cross-entropy", "torchao", "triton")
VOCABULARY = 50_304
NUM_WARMUP, NUM_STEPS = (5, 30) if DEVICE.type == "cuda" else (1, 2)
ERROR_ROWS = 8192  # tokens of which gradients are computed in float32 at a time


class Size(NamedTuple):
    """A model's layer, and the tokens of a micro-batch."""

    tokens: int
    positions: int
    width: int
    heads: int
    parameters: int


SIZES = {
    "160m": Size(65_536, 2048, 768, 12, 162_000_000),
    "410m": Size(32_768, 2048, 1024, 16, 405_000_000),
    "1.4b": Size(16_384, 2048, 2048, 16, 1_415_000_000),
    "tiny": Size(64, 16, 32, 2, 10_000),
}


def random_states(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


# -- Loss ---------------------------------------------------------------------------------------


def liger_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, states, targets)


def cce_loss(states: Tensor, weight: Tensor, targets: Tensor, **options: object) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(states, weight, targets, **options)


def plain_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((states @ weight.T).float(), targets)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sinklm": torch.compile(linear_cross_entropy),
    "Liger": liger_loss,
    "CCE": cce_loss,
    "CCE, no filter": partial(cce_loss, filter_eps=None),
    "torch.compile": torch.compile(plain_loss),
}


def exact_gradients(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of states ``(N, D)`` and of the weight ``(V, D)``, in float32."""
    exact_weight, sums = weight.float(), torch.zeros_like(weight, dtype=torch.float32)
    grads = []
    for part, its_targets in zip(states.split(ERROR_ROWS), targets.split(ERROR_ROWS), strict=True):
        difference = (part.float() @ exact_weight.T).softmax(-1)
        difference[torch.arange(len(part), device=DEVICE), its_targets] -= 1
        difference /= len(states)
        grads.append(difference @ exact_weight)
        sums += difference.T @ part.float()
    return torch.cat(grads), sums


def loss(name: str, size: Size) -> dict:
    torch.manual_seed(0)
    vocabulary = VOCABULARY if size.width > 32 else 100
    states = random_states(size.tokens, size.width).requires_grad_()
    weight = random_states(vocabulary, size.width, scale=size.width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (size.tokens,), device=DEVICE)

    def step() -> None:
        states.grad = weight.grad = None
        LOSSES[name](states, weight, targets).backward()

    step()
    inputs = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
    with peak_memory(DEVICE) as peak:
        times = step_times(step, NUM_WARMUP, NUM_STEPS)
    with torch.no_grad():
        expected = exact_gradients(states, weight, targets)
        errors = [((s.grad - e).norm() / e.norm()).item() for s, e in zip((states, weight), expected, strict=True)]
    return {
        **with_spread("ms", times),
        "peak GiB": (peak.get("bytes", 0) - inputs) / 2**30,
        "error of states": errors[0],
        "error of weight": errors[1],
    }


# -- Between the matrix products ----------------------------------------------------------------


# Forward and backward pass are compiled separately, since other work is between them in training.


def gelu_of_sinklm(states: Tensor) -> tuple[Tensor, ...]:
    from sinklm.models import layer_kernels

    return (layer_kernels.gelu(states)[0],)


def gelu_backward_of_sinklm(grad: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    from sinklm.models import layer_kernels

    grad_states, sums, _ = layer_kernels.gelu_backward(grad, states)
    return grad_states, sums.sum(0)


def gelu_of_torch(states: Tensor) -> tuple[Tensor, ...]:
    return (F.gelu(states),)


def gelu_backward_of_torch(grad: Tensor, states: Tensor) -> tuple[Tensor, ...]:
    grad_states = torch.ops.aten.gelu_backward(grad, states)
    return grad_states, grad_states.sum(0, dtype=torch.float32)


GELUS = {
    "sinklm": (torch.compile(gelu_of_sinklm), torch.compile(gelu_backward_of_sinklm)),
    "torch.compile": (torch.compile(gelu_of_torch), torch.compile(gelu_backward_of_torch)),
}


def gelu(name: str, size: Size) -> dict:
    states, grad = (random_states(size.tokens, 4 * size.width) for _ in range(2))
    forward, backward = GELUS[name]

    def both() -> tuple[Tensor, ...]:
        return *forward(states), *backward(grad, states)

    exact = *gelu_of_torch(states.float()), *gelu_backward_of_torch(grad.float(), states.float())
    return with_bandwidth(both, 5 * states.nbytes) | {"error": difference(both(), exact)}


def rotary_of_sinklm(heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    from sinklm.models import layer_kernels

    return layer_kernels.rotate_heads(heads, cos, sin)


def rotary_backward_of_sinklm(cos: Tensor, sin: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    from sinklm.models import layer_kernels

    grad_heads, sums, _ = layer_kernels.rotate_heads_backward(*grads, cos, sin)
    return grad_heads, sums.sum(0)


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of ``(B, T, H, D)``."""
    rotated, rest = states[..., : cos.shape[-1]].float(), states[..., cos.shape[-1] :]
    a, b = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]
    return torch.cat((rotated.to(states.dtype), rest), dim=-1)


def rotary_of_torch(heads: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    query, key, _ = heads.chunk(3, dim=-1)
    return turned(query, cos, sin), turned(key, cos, sin)


def rotary_backward_of_torch(cos: Tensor, sin: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    grad_heads = torch.cat((turned(grads[0], cos, -sin), turned(grads[1], cos, -sin), grads[2]), dim=-1)
    return grad_heads, grad_heads.sum((0, 1), dtype=torch.float32)


ROTARIES = {
    "sinklm": (torch.compile(rotary_of_sinklm), torch.compile(rotary_backward_of_sinklm)),
    "torch.compile": (torch.compile(rotary_of_torch), torch.compile(rotary_backward_of_torch)),
}


def rotary(name: str, size: Size) -> dict:
    head_size, batch_size = size.width // size.heads, size.tokens // size.positions
    heads = random_states(batch_size, size.positions, size.heads, 3 * head_size)
    grads = [random_states(batch_size, size.positions, size.heads, head_size) for _ in range(3)]
    angles = torch.arange(size.positions, device=DEVICE)[:, None] / 10_000 ** torch.linspace(
        0, 1, head_size // 8, device=DEVICE
    )
    cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    forward, backward = ROTARIES[name]

    def both() -> tuple[Tensor, ...]:
        return *forward(heads, cos, sin), *backward(cos, sin, *grads)

    exact_grads = (grad.float() for grad in grads)
    exact = *rotary_of_torch(heads.float(), cos, sin), *rotary_backward_of_torch(cos, sin, *exact_grads)
    return with_bandwidth(both, heads.nbytes * 10 // 3) | {"error": difference(both(), exact)}


def difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest relative error of the results, in the Frobenius norm."""
    pairs = zip(found, exact, strict=True)
    return max(((a.float().flatten() - b.flatten()).norm() / b.norm()).item() for a, b in pairs)


def with_bandwidth(step: Callable[[], object], num_bytes: int) -> dict:
    """Measure a step that must read and write so many bytes."""
    found = with_spread("ms", step_times(step, NUM_WARMUP, NUM_STEPS))
    return {**found, "TB/s": num_bytes / found["ms"] / 1e9}


# -- Optimizer ----------------------------------------------------------------------------------


def adamw(name: str, size: Size) -> dict:
    weights, copy = random_states(size.parameters, dtype=torch.float32), random_states(size.parameters)
    gradient, options = random_states(size.parameters), {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    num_bytes = size.parameters * (4 * 6 + 2 * 2)  # weights and both moments, read and written; gradient and copy
    if name == "sinklm":
        from sinklm.train.adamw_kernel import adamw_

        moments = [torch.zeros_like(weights) for _ in range(2)]
        step, one, zero = (torch.tensor(value, device=DEVICE) for value in (0.0, 1.0, 0.0))
        state = (weights, copy, gradient, *moments, step)
        return with_bandwidth(lambda: adamw_(*state, eps=1e-8, grad_scale=one, found_inf=zero, **options), num_bytes)
    parameter = torch.nn.Parameter(weights)
    parameter.grad = gradient.float()
    optimizer = optimizer_of(name, parameter, options)

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        copy.copy_(parameter)

    return with_bandwidth(update, num_bytes)


def optimizer_of(name: str, parameter: torch.nn.Parameter, options: dict) -> torch.optim.Optimizer:
    if name == "torch, fused":
        return torch.optim.AdamW([parameter], fused=DEVICE.type == "cuda", **options)
    from torchao.optim import AdamW8bit

    return AdamW8bit([parameter], **options)


# -- Parts --------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[str, Size], dict], tuple[str, ...]]] = {
    "loss": (loss, tuple(LOSSES)),
    "gelu": (gelu, tuple(GELUS)),
    "rotary": (rotary, tuple(ROTARIES)),
    "adamw": (adamw, ("sinklm", "torch, fused", "torchao, 8 bit moments")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["160m", "1.4b"])
    parser.add_argument("--minutes", type=float, default=60.0, help="no measurement begins later")
    parser.add_argument("-o", "--output", type=Path, default=Path("kernel-peers.json"))
    args = parser.parse_args()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    versions = library_versions(*(name for name in LIBRARIES if find_spec(name.replace("-", "_"))))
    report = PartReport(args.output, settings | {"versions": versions}, args.minutes)
    for part in args.parts:
        measure, names = PARTS[part]
        for size in args.sizes:
            torch._dynamo.reset()  # else the second size is compiled for any size
            for name in names:
                label = f"{size}, {name}"
                report.add(part, lambda: [{"size": label, **measure(name, SIZES[size])}], label)  # noqa: B023
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
