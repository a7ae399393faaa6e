"""Linear layers of a step with a single token: matrix-vector products that read each weight once.

Such a step is bound by reading weights. cuBLAS does not reach the memory bandwidth here: it splits
a product of one row into two kernels or uses too little of the GPU. A GELU after a layer is fused
into the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TILE = 1024  # weights that a program processes at a time
MAX_BLOCK_IN = 1024


class OneRowLinear(TorchFunctionMode):
    """Runs linear layers with one input row on CUDA as `matvec`, fused with a GELU that follows.

    `torch.compile` traces this mode and removes the unused product without the GELU.
    """

    def __init__(self) -> None:
        super().__init__()
        # The output of the last product, and its inputs.
        self.newest: tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func is F.gelu and not kwargs and self.newest is not None and args[0] is self.newest[0]:
            return linear_one_row(*self.newest[1], gelu=True)
        if func is Tensor.unflatten:  # a Python method with a super() call that cannot be traced
            func = torch.unflatten
        return func(*args, **kwargs)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not is_one_row(input, weight):
            return F.linear(input, weight, bias)
        out = linear_one_row(input, weight, bias)
        self.newest = out, (input, weight, bias)
        return out


def is_one_row(states: Tensor, weight: Tensor) -> bool:
    return (
        states.is_cuda
        and type(weight) in (Tensor, Parameter)  # excludes subclasses such as quantised weights
        and states.numel() == states.shape[-1]
        and states.dtype == weight.dtype != torch.float64
        and weight.is_contiguous()
    )


def linear_one_row(states: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`torch.nn.functional.linear` of one row of states ``(…, I)``, optionally with a GELU."""
    return matvec(states.reshape(-1), weight, bias, gelu).view(*states.shape[:-1], -1)


@custom_op("sinklm::matvec", mutates_args=())
def matvec(vector: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """``weight @ vector + bias`` of shapes ``(O, I)``, ``(I,)``, ``(O,)``, summed in float32."""
    vector, bias = vector.contiguous(), None if bias is None else bias.contiguous()
    num_out, num_in = weight.shape
    out = vector.new_empty(num_out)
    block_in = block_of_inputs(num_in)
    block_out = max(1, TILE // block_in)
    with torch.cuda.device_of(vector):
        _matvec_kernel[triton.cdiv(num_out, block_out),](
            *(vector, weight, vector if bias is None else bias, out),
            NUM_OUT=num_out,
            NUM_IN=num_in,
            HAS_BIAS=bias is not None,
            GELU=gelu,
            BLOCK_OUT=block_out,
            BLOCK_IN=block_in,
            num_warps=4,
        )
    return out


def block_of_inputs(num_in: int) -> int:
    """Return the block size: all inputs if they fit, else a power of 2, if possible a divisor."""
    whole = triton.next_power_of_2(num_in)
    if whole <= MAX_BLOCK_IN:
        return whole
    divisor = min(num_in & -num_in, MAX_BLOCK_IN)
    return divisor if divisor >= 64 else MAX_BLOCK_IN  # not a divisor: the last block is masked


@matvec.register_fake
def _(vector: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return vector.new_empty(weight.shape[0])


@triton.jit
def _matvec_kernel(
    vector,
    weight,
    bias,
    out,
    NUM_OUT: tl.constexpr,
    NUM_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program per block of outputs; products are summed over the inputs at the end."""
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inputs = tl.arange(0, BLOCK_IN)
    weight += outputs[:, None] * NUM_IN + inputs[None, :]
    is_output = outputs < NUM_OUT
    products = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for start in tl.range(0, NUM_IN, BLOCK_IN):
        is_input = start + inputs < NUM_IN
        states = tl.load(vector + start + inputs, mask=is_input, other=0.0).to(tl.float32)
        mask = is_output[:, None] & is_input[None, :]
        products += tl.load(weight + start, mask=mask, other=0.0).to(tl.float32) * states[None, :]
    result = tl.sum(products, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)
    if GELU:
        result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=is_output)
