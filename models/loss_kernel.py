"""Triton kernel of the cross-entropy that overwrites the logits with their gradient.

Each row is read from memory once and written once; later reads of the row hit the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK = 4096  # logits of a row that a program processes at a time


@triton_op("sinklm::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return the losses ``(n,)``, float32, of logits ``(n, V)``.

    The logits are overwritten with the gradient of the sum of the losses. A row whose target is
    ``ignored`` has loss 0 and gradient 0.
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    with torch.cuda.device_of(logits):
        wrap_triton(_cross_entropy_kernel)[len(logits),](
            *(logits, targets, losses), VOCABULARY=logits.shape[1], IGNORED=ignored, BLOCK=BLOCK, num_warps=16
        )
    return losses


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, VOCABULARY: tl.constexpr, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCABULARY
    target = tl.load(targets + row)
    is_counted = target != IGNORED
    columns = tl.arange(0, BLOCK)

    peaks = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        block = tl.load(logits + start + columns, mask=start + columns < VOCABULARY, other=-float("inf"))
        peaks = tl.maximum(peaks, block.to(tl.float32))
    peak = tl.max(peaks, axis=0)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        block = tl.load(logits + start + columns, mask=start + columns < VOCABULARY, other=-float("inf"))
        totals += tl.exp(block.to(tl.float32) - peak)
    lse = peak + tl.log(tl.sum(totals, axis=0))
    own = tl.load(logits + tl.where(is_counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(is_counted, lse - own, 0.0))

    tl.debug_barrier()  # the target's logit must be read before it is overwritten
    for start in range(0, VOCABULARY, BLOCK):
        mask = start + columns < VOCABULARY
        block = tl.load(logits + start + columns, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.exp(block - lse) - tl.where(start + columns == target, 1.0, 0.0)
        gradient = tl.where(is_counted, gradient, 0.0)
        tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=mask)
