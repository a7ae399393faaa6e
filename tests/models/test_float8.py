import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sinklm.models import float8
from sinklm.models.float8 import (
    FORMAT,
    GRADIENT_FORMAT,
    LARGEST,
    Float8Linear,
    cast_both,
    peak_of,
    scale_of,
    use_float8,
)
from sinklm.models.fused_layer import linear_but_bias_gradient

from .tiny import tiny_model

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix in float64, with values rounded to float8 with one scale."""
    scale = (LARGEST[dtype] / matrix.abs().max().float()).item()
    return (matrix.float() * scale).to(dtype).double() / scale


def without_bias_gradient(layer: Float8Linear, states: Tensor) -> Tensor:
    """Apply a layer as before a kernel that computes the bias gradient and the gradient's peak."""
    out, carrier = linear_but_bias_gradient(layer, states)
    return GivenPeak.apply(out, carrier)


class GivenPeak(torch.autograd.Function):
    """The identity; its backward pass gives the carrier the peak of the gradient."""

    @staticmethod
    def forward(ctx, states, carrier):
        return states.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.abs().max().float()


def float8_layer(num_inputs: int, num_outputs: int, device: str, dtype: torch.dtype) -> Float8Linear:
    model = nn.ModuleDict({"dense": nn.Linear(num_inputs, num_outputs)}).to(device, dtype)
    use_float8(model)
    return model["dense"]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("has_bias_gradient", [True, False])
def test_products_equal_exact_ones_of_rounded_values(device, has_bias_gradient):
    torch.manual_seed(0)
    layer = float8_layer(48, 80, device, torch.bfloat16)
    states = torch.randn(2, 16, 48, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = 1e-6 * torch.randn(2, 16, 80, device=device, dtype=torch.bfloat16) ** 3
    out = layer(states) if has_bias_gradient else without_bias_gradient(layer, states)
    out.backward(grad)

    states_8, weight_8 = rounded(states.detach().flatten(0, 1), FORMAT), rounded(layer.weight.detach(), FORMAT)
    grad_8 = rounded(grad.flatten(0, 1), GRADIENT_FORMAT)
    expected = {
        "out": (out.flatten(0, 1), states_8 @ weight_8.T + layer.bias.double()),
        "states": (states.grad.flatten(0, 1), grad_8 @ weight_8),
        "weight": (layer.weight.grad, grad_8.T @ states_8),
    }
    if has_bias_gradient:
        expected["bias"] = (layer.bias.grad, grad.flatten(0, 1).double().sum(0))
    else:
        assert layer.bias.grad is None
    for name, (found, exact) in expected.items():
        assert found.dtype == torch.bfloat16
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-8, name  # half a unit in the last place of bfloat16 is 2**-9


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [FORMAT, GRADIENT_FORMAT])
@settings(max_examples=20)
@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 300)), exponent=st.integers(-40, 40))
def test_casts_round_once_and_reach_the_largest_number(device, dtype, shape, exponent):
    torch.manual_seed(shape[0])
    matrix = (torch.randn(*shape, device=device) * 2.0**exponent).bfloat16()
    scale = scale_of(peak_of(matrix), dtype)
    plain, transposed = cast_both(matrix, scale, dtype)
    assert torch.equal(plain.float(), (matrix.float() * scale).to(dtype).float())
    assert torch.equal(plain.t().float(), transposed.float())
    assert torch.equal(float8.cast_transposed(matrix, scale, dtype).float(), transposed.float())
    assert plain.float().abs().max() == LARGEST[dtype]
    assert transposed.is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["states", "weight", "grad"])
def test_values_that_are_not_finite_are_not_hidden(value, place):
    layer = float8_layer(16, 16, "cpu", torch.bfloat16)
    states = torch.ones(16, 16, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.ones(16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        {"states": states, "weight": layer.weight, "grad": grad}[place][3, 5] = value
    out = layer(states)
    out.backward(grad)
    assert out.isfinite().all() == (place == "grad")
    assert not layer.weight.grad.isfinite().any() or place == "weight"
    assert not states.grad.isfinite().any() or place == "states"


def test_zeros_have_finite_products():
    layer = float8_layer(16, 16, "cpu", torch.bfloat16)
    states = torch.zeros(16, 16, dtype=torch.bfloat16, requires_grad=True)
    out = layer(states)
    out.backward(torch.zeros_like(out))
    assert torch.equal(out, layer.bias.expand_as(out))
    assert not states.grad.any()
    assert not layer.weight.grad.any()


def test_a_layer_without_bias_has_the_products_of_one_with_zeros():
    layers = [float8_layer(16, 16, "cpu", torch.bfloat16) for _ in range(2)]
    layers[1].weight = layers[0].weight
    layers[0].bias, layers[1].bias.data = None, torch.zeros(16, dtype=torch.bfloat16)
    states = torch.randn(16, 16, dtype=torch.bfloat16)
    outputs = [layer(states) for layer in layers]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(out.sum(), layers[0].weight)[0] for out in outputs]
    assert torch.equal(*gradients)


def test_a_given_peak_is_not_computed_again():
    layer = float8_layer(16, 16, "cpu", torch.bfloat16)
    assert not layer(torch.ones(16, 16, dtype=torch.bfloat16), peak=torch.tensor(float("inf"))).isfinite().any()


def test_the_linear_layers_of_the_blocks_are_in_float8_and_not_the_head():
    model = tiny_model()
    model.gpt_neox.layers[0].attention.dense = nn.Identity()
    use_float8(model)
    in_float8 = {name for name, module in model.named_modules() if type(module) is Float8Linear}
    products = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
    expected = {f"gpt_neox.layers.{i}.{name}" for i in range(2) for name in products}
    assert in_float8 == expected - {"gpt_neox.layers.0.attention.dense"}


def test_evaluation_is_that_of_a_plain_layer():
    layer = float8_layer(32, 48, "cpu", torch.float32).eval()
    states = torch.randn(7, 32)  # not a multiple of 16
    assert torch.equal(layer(states), nn.functional.linear(states, layer.weight, layer.bias))
