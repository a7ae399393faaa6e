"""The kernels of the layer in a compiled training pass, compared with plain torch."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from sinklm.models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM, attention, float8, fused_layer, layer
from sinklm.models.attention import rotated
from sinklm.models.float8 import peak_of, use_float8
from sinklm.models.fused_layer import BiasedGelu, RotatedHeads, linear_but_bias_gradient

KINDS = ["none", "token", "zero", "logit", "kv_bias", "gate", "head_gate"]


def peaks_of(states):
    return states.abs().float().amax(-1).flatten()


def plain_gelu(states):
    out = gelu(states)
    return out, peaks_of(out)


def plain_gelu_backward(grad, states):
    grad_states = torch.ops.aten.gelu_backward(grad, states)
    return grad_states, torch.stack([grad_states[::2].sum(0), grad_states[1::2].sum(0)]), peaks_of(grad_states)


def plain_rotate(heads, cos, sin):
    query, key, _ = heads.chunk(3, dim=-1)
    return rotated(query, cos[None], sin[None]), rotated(key, cos[None], sin[None])


def plain_rotate_backward(grad_query, grad_key, grad_value, cos, sin):
    query, key = (rotated(grad, cos[None], -sin[None]) for grad in (grad_query, grad_key))
    grad_heads = torch.cat([query, key, grad_value], dim=-1)
    return grad_heads, grad_heads.sum(1), peaks_of(grad_heads)


PLAIN = SimpleNamespace(
    gelu=plain_gelu,
    gelu_backward=plain_gelu_backward,
    rotate_heads=plain_rotate,
    rotate_heads_backward=plain_rotate_backward,
)


def tiny_model(kind: str, **settings) -> SinkGPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = SinkGPTNeoXConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        max_position_embeddings=32,
        attn_implementation="sdpa",
        sink={"kind": kind, "first_token_id": 90},
        **settings,
    )
    model = SinkGPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0, which would hide errors
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def loss_and_gradients(model, ids) -> list[torch.Tensor]:
    torch.manual_seed(1)  # for dropout
    model.zero_grad()
    loss = model(input_ids=ids[:, :-1], labels=ids, skip_logits=True, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, {}) for kind in KINDS), ("token", {"use_parallel_residual": False}), ("none", {"hidden_dropout": 0.5})],
)
def test_every_gradient_equals_that_of_the_plain_model(kind, settings, monkeypatch):
    """Including those of the biases, which the kernels compute. Here plain torch replaces them."""
    model, ids = tiny_model(kind, **settings).train(), torch.randint(0, 90, (2, 20))
    expected = loss_and_gradients(model, ids)
    monkeypatch.setattr(fused_layer, "kernels", PLAIN)
    used = []
    for module in (layer, attention):
        monkeypatch.setattr(module, "is_fused", lambda states, name=module.__name__: used.append(name) or True)
    ours = loss_and_gradients(model, ids)
    assert set(used) == {"sinklm.models.layer", "sinklm.models.attention"}
    for value, twin in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, twin, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"use_parallel_residual": False}])
def test_float8_products_get_the_peaks_of_their_inputs_from_the_kernels(settings, monkeypatch):
    """With them, the results are those of products that compute the peaks themselves."""
    model, ids = tiny_model("token", **settings).bfloat16().train(), torch.randint(0, 90, (2, 24))
    use_float8(model)
    expected = loss_and_gradients(model, ids)
    monkeypatch.setattr(fused_layer, "kernels", PLAIN)
    for module in (layer, attention):
        monkeypatch.setattr(module, "is_fused", lambda states: True)
    passes = []
    monkeypatch.setattr(float8, "peak_of", lambda matrix: passes.append(matrix) or peak_of(matrix))
    ours = loss_and_gradients(model, ids)
    # in each layer: four weights, three inputs and the gradients of dense and dense_4h_to_h
    assert len(passes) == model.config.num_hidden_layers * (4 + 3 + 2)
    for value, twin in zip(ours, expected, strict=True):
        assert (value.double() - twin.double()).norm() <= 0.02 * twin.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 100, 96), (2, 700, 300)])
def test_gelu_on_a_gpu(shape, dtype):
    linear = nn.Linear(32, shape[-1], device="cuda", dtype=dtype)
    given = torch.randn(*shape[:-1], 32, device="cuda", dtype=dtype)
    grad = torch.randn(shape, device="cuda", dtype=dtype)

    def fused(linear, given):
        return BiasedGelu.apply(linear_but_bias_gradient(linear, given)[0], linear.bias)[0]

    assert_near_float64(fused, lambda linear, given: gelu(linear(given)), linear, given, (grad,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "num_rotated"), [(64, 16), (80, 20), (64, 64), (256, 64)])
def test_rotated_heads_on_a_gpu(head_size, num_rotated, dtype):
    linear = nn.Linear(32, 3 * 3 * head_size, device="cuda", dtype=dtype)
    given = torch.randn(2, 150, 32, device="cuda", dtype=dtype)
    angles = torch.rand(150, num_rotated // 2, device="cuda").repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    grads = tuple(torch.randn(2, 150, 3, head_size, device="cuda", dtype=dtype) for _ in range(3))

    def fused(linear, given):
        heads = linear_but_bias_gradient(linear, given)[0].unflatten(-1, (3, -1))
        return RotatedHeads.apply(heads, linear.bias, cos, sin)

    def plain(linear, given):
        query, key, value = linear(given).unflatten(-1, (3, -1)).chunk(3, dim=-1)
        its_cos, its_sin = cos[None].to(given.dtype), sin[None].to(given.dtype)
        return rotated(query, its_cos, its_sin), rotated(key, its_cos, its_sin), value

    assert_near_float64(fused, plain, linear, given, grads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaks_on_a_gpu(dtype):
    """The largest peak is the largest absolute value of the result, as it is stored."""
    kernels = fused_layer.kernels
    states, grad = (torch.randn(700, 300, device="cuda", dtype=dtype) for _ in range(2))
    heads = [torch.randn(2, 150, 3, 80, device="cuda", dtype=dtype) for _ in range(3)]
    angles = torch.rand(150, 10, device="cuda").repeat(1, 2) * 6
    for results in (
        kernels.gelu(states),
        kernels.gelu_backward(grad, states),
        kernels.rotate_heads_backward(*heads, angles.cos(), angles.sin()),
    ):
        assert results[-1].max() == results[0].abs().max().float()


def assert_near_float64(fused, plain, module, given, grads) -> None:
    """Outputs and gradients are as close to float64 as with plain torch, and are deterministic."""

    def results(function, module, given, grads):
        given = given.detach().requires_grad_()
        out = function(module, given)
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad(out, [given, *module.parameters()], grads)]

    exact = results(plain, deepcopy(module).double(), given.double(), tuple(grad.double() for grad in grads))
    compiled = torch.compile(fused, fullgraph=True)
    ours, again, rounded = (results(f, module, given, grads) for f in (compiled, compiled, plain))
    for value, repeated, twin, true in zip(ours, again, rounded, exact, strict=True):
        assert torch.equal(value, repeated)
        assert (value.double() - true).norm() <= 1.5 * (twin.double() - true).norm() + 1e-6 * true.norm()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_on_a_gpu(kind, checkpointing):
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    model, ids = tiny_model(kind).float().cuda(), torch.randint(0, 90, (2, 20), device="cuda")
    expected = loss_and_gradients(model, ids)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train().compile(dynamic=False)
    for value, twin in zip(loss_and_gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(value, twin, rtol=2e-3, atol=1e-5)
