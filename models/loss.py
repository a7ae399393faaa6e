"""Cross-entropy of a linear head that computes logits for one chunk of tokens at a time.

The gradient of a token's loss with respect to its logits is softmax minus one-hot, so it can be
computed together with the logits. The forward pass therefore computes the gradients of the hidden
states and of the head chunk by chunk, and stores nothing of the size tokens × vocabulary for the
backward pass (as in the fused linear cross-entropy of Liger Kernel, Hsu et al. 2024). On a GPU, one
kernel per chunk replaces the logits by their gradient.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

try:
    from .loss_kernel import cross_entropy_
except ImportError:  # Triton comes with torch's CUDA builds
    cross_entropy_ = None

IGNORED = -100  # target without a loss, the default `ignore_index` of torch
TOKENS_PER_CHUNK = 8192  # 0.8 GB of 16-bit logits at Pythia's vocabulary; smaller chunks make slower matrix products


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of ``hidden_states @ weight.T``, in float32 (float64 for float64 inputs).

    Equal to ``cross_entropy(linear(hidden_states, weight).float(), targets)`` up to rounding, with
    the same gradients.

    Args:
        hidden_states: ``(N, D)``.
        weight: weight of the head, ``(V, D)``.
        targets: ``(N,)``; -100 is ignored.
        num_items: divisor of the summed loss; default: the number of targets that are not ignored.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    loss_sum = (_SummedLoss.apply if torch.is_grad_enabled() else _summed_loss)(hidden_states, weight, targets)
    if num_items is None:
        # Float32 on purpose. In a compiled graph, inductor (torch 2.11) may merge an integer scalar
        # here with the unused dropout seed of attention. It then expects that seed on CUDA, but it
        # is a CPU tensor.
        num_items = (targets != IGNORED).sum(dtype=torch.float32)
    return loss_sum / num_items


def _summed_loss(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses, without gradients."""
    losses = [
        nn.functional.cross_entropy(_exact(chunk @ weight.T), its_targets, ignore_index=IGNORED, reduction="sum")
        for chunk, its_targets in _chunks(hidden_states, targets)
    ]
    return torch.stack(losses).sum()


class _SummedLoss(torch.autograd.Function):
    """Sum of the losses. The backward pass only scales the gradients from the forward pass."""

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
        # Not scaled in the forward pass: gradients divided by the number of targets there would
        # mostly underflow in float16.
        return *((_exact(gradient) * grad_loss).to(ctx.dtype) for gradient in ctx.saved_tensors), None


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(TOKENS_PER_CHUNK) for tensor in tensors), strict=True)


def _exact(values: torch.Tensor) -> torch.Tensor:
    """Convert to float32; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of logits ``(n, V)`` and its gradient with respect to them.

    The gradient has the dtype of the logits and may overwrite them.
    """
    if cross_entropy_ is not None and logits.is_cuda and logits.dtype != torch.float64:
        return cross_entropy_(logits, targets.contiguous(), IGNORED).sum(), logits
    counts = (targets != IGNORED)[:, None]
    targets = targets[:, None].masked_fill(~counts, 0)
    log_probabilities = nn.functional.log_softmax(_exact(logits), dim=-1)
    loss = -log_probabilities.gather(1, targets).masked_fill(~counts, 0).sum()
    gradient = _minus_one_hot(log_probabilities.exp_(), targets)
    return loss, gradient.mul_(counts).to(logits.dtype)


def _minus_one_hot(probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling():  # fuses into one kernel; a scatter would split it
        return probabilities - (targets == torch.arange(probabilities.shape[1], device=targets.device)).to(
            probabilities
        )
    return probabilities.scatter_add_(1, targets, -torch.ones_like(targets, dtype=probabilities.dtype))
