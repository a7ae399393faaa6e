"""The cross-entropy of a linear head, without its logits: they exist for one chunk of tokens at a time.

The gradient of a token's loss by its logits, softmax minus one-hot, is known as soon as the logits are. So the forward
pass forms the gradients of the hidden states and of the head as it goes, and keeps nothing of the size tokens ×
vocabulary for the backward pass (the idea of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024). Between the
matrix products of a chunk stands one kernel, which turns logits into their gradient.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

try:
    from .loss_kernel import cross_entropy_
except ImportError:  # Triton comes with torch's CUDA builds
    cross_entropy_ = None

IGNORED = -100  # a target that does not count, as everywhere in torch
TOKENS_PER_CHUNK = 8192  # 0.8 GB of 16-bit logits at Pythia's vocabulary; fewer tokens make slower matrix products


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of ``hidden_states @ weight.T``, in float32 (float64 for float64).

    It equals ``cross_entropy(linear(hidden_states, weight).float(), targets)``, the gradients to rounding too.

    Args:
        hidden_states: ``(N, D)``.
        weight: of the head, ``(V, D)``.
        targets: ``(N,)``; -100 does not count.
        num_items: divides the sum in place of the number of targets that count.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        loss_sum = (_SummedLoss.apply if torch.is_grad_enabled() else _summed_loss)(hidden_states, weight, targets)
    if num_items is None:
        # Not an integer, in whose place a compiled graph may put the seed of a dropout that attention does not do:
        # inductor (torch 2.11) takes that for a CUDA tensor, as this is one, and it lies on the CPU.
        num_items = (targets != IGNORED).sum(dtype=torch.float32)
    return loss_sum / num_items


def _summed_loss(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the losses where no gradient is wanted."""
    losses = [
        nn.functional.cross_entropy(_exact(chunk @ weight.T), its_targets, ignore_index=IGNORED, reduction="sum")
        for chunk, its_targets in _chunks(hidden_states, targets)
    ]
    return torch.stack(losses).sum()


class _SummedLoss(torch.autograd.Function):
    """The sum of the losses; the backward pass only scales what the forward pass has found."""

    @staticmethod
    def forward(ctx, hidden_states, weight, targets):
        losses, grad_hidden_states, grad_weight = [], [], torch.zeros_like(_exact(weight))
        for chunk, its_targets in _chunks(hidden_states, targets):
            loss, grad_logits = _loss_and_gradient(chunk @ weight.T, its_targets)
            losses.append(loss)
            grad_hidden_states.append(grad_logits @ weight)
            grad_weight += grad_logits.T @ chunk
        ctx.save_for_backward(torch.cat(grad_hidden_states), grad_weight)
        ctx.dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        # Scaled here and not before: divided by the number of targets, float16 would lose most of it.
        return *((_exact(gradient) * grad_loss).to(ctx.dtype) for gradient in ctx.saved_tensors), None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(TOKENS_PER_CHUNK) for tensor in tensors), strict=True)


def _exact(values: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of logits ``(n, V)`` and its gradient by them, in their type and perhaps in their place."""
    if cross_entropy_ is not None and logits.is_cuda and logits.dtype != torch.float64:
        return cross_entropy_(logits, targets.contiguous(), IGNORED).sum(), logits
    counts = (targets != IGNORED)[:, None]
    targets = targets[:, None].masked_fill(~counts, 0)
    log_probabilities = nn.functional.log_softmax(_exact(logits), dim=-1)
    loss = -log_probabilities.gather(1, targets).masked_fill(~counts, 0).sum()
    gradient = _minus_one_hot(log_probabilities.exp_(), targets)
    return loss, gradient.mul_(counts).to(logits.dtype)


def _minus_one_hot(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():  # one kernel with all around it, which a scatter would cut in two
        return probabilities - (targets == torch.arange(probabilities.shape[1], device=targets.device)).to(
            probabilities
        )
    return probabilities.scatter_add_(1, targets, -torch.ones_like(targets, dtype=probabilities.dtype))
