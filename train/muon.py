"""Muon for the matrices of hidden layers, AdamW for all other parameters, under ZeRO-0 to 2.

Muon (Jordan et al. 2024) averages the gradient of a matrix and replaces the average by the nearest
semi-orthogonal matrix, so that all its singular values become about 1. Liu et al. 2025 ("Muon is
Scalable for LLM Training") scale this update to the size of AdamW's, so that one learning rate and
one weight decay serve both. For a matrix of m × n:

    M ← μ M + (1 − μ) G                          exponential average, μ = 0.95
    U ← 0.2 √max(m, n) · O((1 − μ) G + μ M)      Nesterov; O by five Newton-Schulz iterations
    W ← (1 − lr · weight_decay) W − lr · U

This is `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``, which can do neither of these:

- ZeRO-1 and 2 give the optimizer one flat partition instead of matrices. Here, momentum and weights
  stay partitioned. A rank orthogonalizes the matrices in its partition, and those that are cut are
  completed by `matrix_partition`.
- GPT-NeoX stores query, key and value of all heads in one weight, interleaved by head. Here they
  are three matrices, as in models that store them apart. In one matrix, only the three together
  would become orthogonal, and the one with the largest gradient would get most of the update.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .matrix_partition import MatrixPartition

MOMENTUM = 0.95
NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MIN_NORM = 1e-7
RMS = 0.2  # of AdamW's updates, in units of the learning rate
LARGEST_BATCH = 2**26  # elements orthogonalized at once; bounds memory, does not change the result


@dataclass(frozen=True)
class Shape:
    """Shape of a weight. With ``num_heads``, its rows are the heads' queries, keys and values."""

    rows: int
    columns: int
    num_heads: int | None = None

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def split(self, weight: Tensor) -> Tensor:
        """Return the weight as separate matrices ``(k, m, n)``; ``k`` is 3 or 1."""
        if self.num_heads is None:
            return weight.view(1, self.rows, self.columns)
        by_head = weight.view(self.num_heads, 3, -1, self.columns)
        return by_head.transpose(0, 1).reshape(3, -1, self.columns)

    def join(self, matrices: Tensor) -> Tensor:
        """Return the rows of separate matrices in the order of the weight, ``(rows, columns)``."""
        if self.num_heads is not None:
            matrices = matrices.reshape(3, self.num_heads, -1, self.columns).transpose(0, 1)
        return matrices.reshape(self.rows, self.columns)


class Muon(torch.optim.Optimizer):
    """Muon for the first group of parameters, fused AdamW for the others.

    As with fused AdamW, ``grad_scale`` and ``found_inf`` are optional attributes: a step divides
    gradients by the former and changes nothing if the latter is 1. State and hyperparameters are
    in torch's form. The average of the gradient is ``exp_avg``, as AdamW's.

    Args:
        matrices: group of weights of two dimensions, with their weight decay.
        num_heads: of each weight that holds query, key and value by head; None for the others.
        others: groups for AdamW, with their weight decay.
        dtype: in which to orthogonalize.
        adamw: settings of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        num_heads: list[int | None],
        others: list[dict[str, Any]],
        *,
        dtype: torch.dtype,
        **adamw: Any,
    ):
        self._adamw = torch.optim.AdamW(others, **adamw)
        self._weights: list[nn.Parameter] = list(matrices["params"])
        self._shapes = [Shape(w.shape[0], w.shape[1], n) for w, n in zip(self._weights, num_heads, strict=True)]
        self._dtype = dtype
        self._partition: MatrixPartition | None = None
        super().__init__([{**matrices, "lr": adamw["lr"], "is_muon": True}, *self._adamw.param_groups], {})
        self._step_supports_amp_scaling = True  # a GradScaler sets grad_scale and found_inf

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the groups in ``param_groups``, which ZeRO may set to one of them."""
        adamw = self._adamw
        adamw.param_groups, adamw.state = [], self.state
        for name in ("grad_scale", "found_inf"):
            setattr(adamw, name, getattr(self, name, None))
        for group in self.param_groups:
            if group.get("is_muon"):
                self.update_matrices(group, [weight.grad for weight in group["params"]])
            else:
                adamw.param_groups.append(group)
        if adamw.param_groups:
            adamw.step()

    @torch.no_grad()
    def update_matrices(self, group: dict[str, Any], gradients: list[Tensor | None]) -> None:
        """Update the group of matrices, which are whole or one partition, with their gradients."""
        updates = [self._averaged(w, g) for w, g in zip(group["params"], gradients, strict=True)]
        if group["params"][0].ndim == 1:
            (update,), partition = updates, self._own_partition(group["params"][0])
            wholes = partition.complete(update)
            orthogonalize_(wholes, [self._shapes[i] for i in partition.indices], self._dtype)
            partition.write_back(update, wholes)
        else:
            orthogonalize_(updates, self._shapes, self._dtype)
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        for weight, update in zip(group["params"], updates, strict=True):
            weight.mul_(self._unless_held(1.0 - decay, 1.0))
            weight.sub_(update.mul_(self._unless_held(lr, 0.0)))

    def _averaged(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """Add a gradient to the average, and return what to orthogonalize, in a new tensor."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        current = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if gradient is not None:
            current.copy_(gradient)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            current.div_(scale)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            current.masked_fill_(found_inf > 0, 0.0)  # it may be NaN
        state["step"] += self._unless_held(1.0, 0.0)
        state["exp_avg"].lerp_(current, self._unless_held(1.0 - MOMENTUM, 0.0))
        return current.lerp_(state["exp_avg"], MOMENTUM)

    def _unless_held(self, value: float, otherwise: float) -> Tensor | float:
        """Return ``value``, or ``otherwise`` if the device holds the update back."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return value
        return torch.where(found_inf > 0, otherwise, value)

    def _own_partition(self, flat: Tensor) -> MatrixPartition:
        if self._partition is None:
            sizes = [shape.size for shape in self._shapes]
            self._partition = MatrixPartition(sizes, flat.numel(), dist.get_rank(), dist.get_world_size())
        return self._partition

    def check_partition(self) -> None:
        """Compare ZeRO's partition, if there is one, with the model's weights at the same places.

        Raises:
            ValueError: they differ, because a setting of DeepSpeed changes the partition.
        """
        flat = self.param_groups[0]["params"][0].detach()
        if flat.ndim > 1:
            return
        partition = self._own_partition(flat)
        expected = torch.zeros_like(flat)
        partition.write_back(expected, [self._weights[i].detach() for i in partition.indices])
        if not torch.equal(flat[: partition.num_elements], expected[: partition.num_elements]):
            raise ValueError(
                "optimizer.name=muon needs the matrices in DeepSpeed's partition one after another, and they are not: "
                "remove the keys of deepspeed.zero_optimization, or set optimizer.name=adamw"
            )


def orthogonalize_(updates: list[Tensor], shapes: list[Shape], dtype: torch.dtype) -> None:
    """Replace each update by the nearest semi-orthogonal matrix times ``0.2 √max(m, n)``.

    Matrices of the same size are multiplied in one batch.

    Args:
        updates: contiguous, of the given shapes or flat.
        dtype: of the products.
    """
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        rows = shape.rows if shape.num_heads is None else shape.rows // 3
        by_size[min(rows, shape.columns), max(rows, shape.columns)].append(index)
    for size, indices in by_size.items():
        at_once = max(1, LARGEST_BATCH // (3 * math.prod(size)))
        for start in range(0, len(indices), at_once):
            _orthogonalize_batch_(updates, shapes, indices[start : start + at_once], dtype)


def _orthogonalize_batch_(updates: list[Tensor], shapes: list[Shape], indices: list[int], dtype: torch.dtype) -> None:
    """Do the same for updates whose matrices all have one size, except for transposition."""
    split = [shapes[i].split(updates[i]) for i in indices]
    is_tall = [matrices.shape[1] > matrices.shape[2] for matrices in split]
    batch = torch.cat([matrices.mT if tall else matrices for matrices, tall in zip(split, is_tall, strict=True)])
    batch = batch / batch.norm(dim=(1, 2), keepdim=True).clamp(min=MIN_NORM)
    batch = newton_schulz(batch.to(dtype)).to(batch.dtype) * (RMS * math.sqrt(batch.shape[2]))
    for index, result, tall in zip(indices, batch.split([len(matrices) for matrices in split]), is_tall, strict=True):
        joined = shapes[index].join(result.mT if tall else result)
        updates[index].copy_(joined.reshape(updates[index].shape))


def newton_schulz(batch: Tensor) -> Tensor:
    """Return matrices with the singular vectors of the given ones and singular values about 1.

    The iteration ``X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X`` with Jordan's coefficients, which bring
    singular values to about 0.7 to 1.2 and not to 1 exactly.

    Args:
        batch: ``(B, m, n)`` with m ≤ n, each matrix of Frobenius norm at most 1.
    """
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = batch @ batch.mT
        batch = torch.baddbmm(batch, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), batch, beta=a)
    return batch
