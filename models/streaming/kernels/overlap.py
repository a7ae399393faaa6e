"""Kernels that begin before the one in front of them has ended: programmatic dependent launch, on Hopper and later.

Such a kernel may fetch at once what no kernel of the same step writes, such as weights. Then it waits until all that
stands before it is done, and lets the next one begin.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE_BYTES = 128  # of a cache


def can_overlap(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def launch_options(tensor: Tensor) -> dict[str, bool]:
    """Options of a kernel's launch."""
    return {"launch_pdl": True} if can_overlap(tensor) else {}


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Wait for the kernels before, then let the next one come: behind this, their results are there."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers, OVERLAPS: tl.constexpr):
    """Bring the cache lines that hold these addresses into the L2 cache."""
    if OVERLAPS:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )
