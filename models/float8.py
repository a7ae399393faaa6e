"""Linear layers whose matrix products run in float8, for training in ``train.precision: fp8``.

The weights stay in the model's dtype. Each product casts its two factors to float8 with one scale
for each matrix, so that the largest absolute value of the matrix becomes the largest number of the
format ("tensor-wise dynamic scaling"; Micikevicius et al. 2022, torchao's recipe ``tensorwise``).
The product accumulates in float32 and returns the model's dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from . import float8_kernel as kernel
except ImportError:  # Triton comes with torch's CUDA builds
    kernel = None  # type: ignore[assignment]

FORMAT = torch.float8_e4m3fn  # of states and weights
GRADIENT_FORMAT = torch.float8_e5m2  # a wider range, less precision
LARGEST = {FORMAT: torch.finfo(FORMAT).max, GRADIENT_FORMAT: torch.finfo(GRADIENT_FORMAT).max}
SMALLEST_PEAK = 2.0**-100  # scale of a matrix of zeros; scale and its reciprocal are normal float32 numbers
MULTIPLE = 16  # of all three sizes of a float8 product
PRODUCTS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # of a layer


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in float8 in training, and as `nn.Linear` in evaluation.

    All sizes, also the number of rows of the input, must be multiples of `MULTIPLE`.
    """

    def forward(self, input: Tensor, peak: Tensor | None = None) -> Tensor:
        """Map ``(…, in_features)`` to ``(…, out_features)``.

        Args:
            peak: largest absolute value of ``input``, float32 ``()``, if it is known.
        """
        if not self.training:
            return super().forward(input)
        return self._product(input, self.bias, peak, has_carrier=False)[0]

    def product_with_carrier(self, states: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the layer with another tensor as the bias.

        Returns:
            The output, and its carrier ``()``. As the "gradient" of the carrier, the only function
            that uses the output must return the peak of the output's gradient, which saves a pass
            over it.
        """
        return self._product(states, bias, None, has_carrier=True)

    def _product(
        self, states: Tensor, bias: Tensor | None, peak: Tensor | None, *, has_carrier: bool
    ) -> tuple[Tensor, Tensor]:
        out, carrier = Float8Product.apply(states.flatten(0, -2), self.weight, bias, peak, has_carrier)
        return out.view(*states.shape[:-1], -1), carrier


def use_float8(model: nn.Module, names: tuple[str, ...] = PRODUCTS) -> None:
    """Turn the linear layers with these names into `Float8Linear`, in place.

    Parameters and their names are unchanged.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names and type(module) is nn.Linear:
            module.__class__ = Float8Linear


class Float8Product(torch.autograd.Function):
    """``states @ weight.T + bias`` and its gradients, three products in float8.

    Returns the product, and the carrier of `Float8Linear.product_with_carrier`.

    Args:
        states: ``(N, C)``.
        weight: ``(D, C)``.
        bias: ``(D,)`` or None.
        peak: largest absolute value of ``states``, or None.
        has_carrier: whether the gradient of the carrier will be the peak of the product's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, peak: Tensor | None, has_carrier: bool
    ) -> tuple[Tensor, Tensor]:
        scale = scale_of(peak_of(states) if peak is None else peak, FORMAT)
        weight_scale = scale_of(peak_of(weight), FORMAT)
        states_8, states_8_transposed = cast_both(states, scale, FORMAT)
        weight_8 = (weight.float() * weight_scale).to(FORMAT)
        ctx.save_for_backward(states_8_transposed, scale, weight, weight_scale)
        ctx.has_carrier = has_carrier
        product = scaled_product(states_8, scale, weight_8, weight_scale, states.dtype, bias, is_fast=True)
        return product, scale.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, peak: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        states_8_transposed, scale, weight, weight_scale = ctx.saved_tensors
        grad_scale = scale_of(peak if ctx.has_carrier else peak_of(grad), GRADIENT_FORMAT)
        grad_8, grad_8_transposed = cast_both(grad, grad_scale, GRADIENT_FORMAT)
        weight_8_transposed = cast_transposed(weight, weight_scale, FORMAT)
        grad_states = scaled_product(grad_8, grad_scale, weight_8_transposed, weight_scale, grad.dtype)
        grad_weight = scaled_product(grad_8_transposed, grad_scale, states_8_transposed, scale, weight.dtype)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_states, grad_weight, grad_bias, None, None


def peak_of(matrix: Tensor) -> Tensor:
    """Return the largest absolute value, float32 ``()``; NaN if there is a NaN."""
    return matrix.abs().amax().float()


def scale_of(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor, float32 ``()``, that maps a peak to the largest number of a dtype.

    For an infinite peak it is 0, so that the products, which are divided by it, are not finite, and
    training stops. A NaN remains NaN through the cast and the products.
    """
    return LARGEST[dtype] / peak.clamp(min=SMALLEST_PEAK)


def cast_both(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``scale × matrix`` ``(N, C)`` in float8, and its transpose, both contiguous."""
    if matrix.is_cuda and kernel is not None:
        return kernel.cast_float8(matrix.contiguous(), scale, dtype)
    rounded = (matrix.float() * scale).to(dtype)
    return rounded, rounded.t().contiguous()


def cast_transposed(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``scale × matrix`` ``(N, C)`` in float8, transposed ``(C, N)`` and contiguous."""
    if matrix.is_cuda and kernel is not None:
        return kernel.cast_float8_transposed(matrix.contiguous(), scale, dtype)
    return (matrix.float() * scale).to(dtype).t().contiguous()


def scaled_product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    is_fast: bool = False,
) -> Tensor:
    """Return ``left @ right.T / (left_scale × right_scale) + bias`` ``(N, M)``.

    Args:
        left: float8, ``(N, C)``, contiguous.
        right: float8, ``(M, C)``, contiguous: float8 tensor cores read both factors along C.
        left_scale, right_scale: what the factors were multiplied by.
        is_fast: accumulate with fewer bits than float32 on Hopper. Gradients are not, as in torchao
            and Transformer Engine.
    """
    return torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale.reciprocal(),
        scale_b=right_scale.reciprocal(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=is_fast,
    )
