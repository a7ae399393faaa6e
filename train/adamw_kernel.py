"""AdamW on flat weights in one pass over memory, which also writes the weights' 16-bit copy."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@torch.no_grad()
def adamw_(
    weights: Tensor,
    copy: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    found_inf: Tensor,
) -> None:
    """One in-place step of AdamW (Loshchilov & Hutter 2019), as in `torch.optim.AdamW`.

    All tensors except the scalars are contiguous and have N elements. `amsgrad` and `maximize` are
    not supported.

    Args:
        weights: float32, ``(N,)``.
        copy: receives the new weights in another dtype.
        gradient: of any floating-point dtype, scaled by ``grad_scale``.
        exp_avg, exp_avg_sq, step: AdamW's state, as in torch.
        grad_scale, found_inf: scalars on the device. If ``found_inf`` is 1, nothing is changed.
    """
    step += 1 - found_inf
    log_first, log_second = (math.log(beta) if beta > 0 else -math.inf for beta in betas)  # a power of 0 is 0
    _adamw_kernel[triton.cdiv(weights.numel(), BLOCK),](
        *(weights, copy, gradient, exp_avg, exp_avg_sq, step, grad_scale, found_inf, weights.numel()),
        lr=lr,
        decay=lr * weight_decay,
        eps=eps,
        first_rate=1 - betas[0],
        second_rate=1 - betas[1],
        log_first=log_first,
        log_second=log_second,
        BLOCK=BLOCK,
    )


@triton.jit
def _adamw_kernel(
    weights, copy, gradient, exp_avg, exp_avg_sq, step, grad_scale, found_inf, num_weights,
    lr, decay, eps, first_rate, second_rate, log_first, log_second, BLOCK: tl.constexpr,
):  # fmt: skip
    scale, count = tl.load(grad_scale), tl.load(step).to(tl.float64)
    step_size = lr / (1.0 - tl.exp(count * log_first)).to(tl.float32)  # includes the first moment's bias correction
    correction = tl.sqrt((1.0 - tl.exp(count * log_second)).to(tl.float32))
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.where(tl.load(found_inf) == 0.0, num_weights, 0)
    x = tl.load(weights + place, mask=mask, other=0.0)
    g = tl.load(gradient + place, mask=mask, other=0.0).to(tl.float32) / scale
    first = tl.load(exp_avg + place, mask=mask, other=0.0)
    second = tl.load(exp_avg_sq + place, mask=mask, other=0.0)
    first += first_rate * (g - first)
    second += second_rate * (g * g - second)
    x -= decay * x + step_size * first / (tl.sqrt(second) / correction + eps)
    tl.store(weights + place, x, mask=mask)
    tl.store(copy + place, x.to(copy.dtype.element_ty), mask=mask)
    tl.store(exp_avg + place, first, mask=mask)
    tl.store(exp_avg_sq + place, second, mask=mask)
