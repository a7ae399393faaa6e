"""The loss in chunks, compared with the plain loss of all logits."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from sinklm.models import loss as module
from sinklm.models.loss import linear_cross_entropy

NUM_TOKENS, WIDTH, VOCABULARY = 50, 8, 96


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_CHUNK", 16)  # the last of four chunks is a short one


def plain(hidden_states, weight, targets, num_items=None):
    logits = linear(hidden_states, weight).to(torch.promote_types(weight.dtype, torch.float32))
    loss = cross_entropy(logits, targets, reduction="mean" if num_items is None else "sum")
    return loss if num_items is None else loss / num_items


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_states, weight = torch.randn(NUM_TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    targets = torch.randint(0, VOCABULARY, (NUM_TOKENS,))
    targets[[0, 7]] = -100
    return hidden_states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def results(function, hidden_states, weight, targets, num_items=None) -> list[torch.Tensor]:
    """The loss and its gradients, from a scaled loss as in float16 training."""
    loss = function(hidden_states, weight, targets, num_items)
    return [loss.detach(), *torch.autograd.grad(4 * loss, (hidden_states, weight))]


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
)
def test_loss_and_gradients_equal_the_plain_ones(dtype, tolerance, num_items):
    given = inputs(dtype)
    ours, expected = results(linear_cross_entropy, *given, num_items), results(plain, *given, num_items)
    for value, twin in zip(ours, expected, strict=True):
        assert value.dtype == twin.dtype
        scale = twin.double().abs().max()
        torch.testing.assert_close(value.double() / scale, twin.double() / scale, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_is_as_near_to_float64_as_the_plain_ones(dtype, compiled, monkeypatch):
    """The vocabulary spans several blocks, the last one shorter. Results are deterministic."""
    monkeypatch.setattr(module, "TOKENS_PER_CHUNK", 40)
    hidden_states, weight = torch.randn(100, 64, device="cuda"), torch.randn(50_304, 64, device="cuda")
    targets = torch.randint(0, 50_304, (100,), device="cuda")
    targets[[0, 7]] = module.IGNORED
    given = [hidden_states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    function = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else linear_cross_entropy
    exact = results(plain, *(states.detach().double().requires_grad_() for states in given), targets)
    ours, again, rounded = (results(f, *given, targets) for f in (function, function, plain))
    for value, repeated, twin, true in zip(ours, again, rounded, exact, strict=True):
        assert torch.equal(value, repeated)
        assert (value.double() - true).norm() <= 1.5 * (twin.double() - true).norm() + 1e-6 * true.norm()


@pytest.mark.slow
def test_compiled_it_is_one_graph_and_the_same():
    given = inputs(torch.float64)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for value, twin in zip(results(compiled, *given), results(plain, *given), strict=True):
        torch.testing.assert_close(value, twin, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_torch_can_cache_the_traced_loss(is_autocast):
    """A context such as `torch.autocast` in the graph would prevent it."""
    from torch._functorch import config
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        compiled(*inputs(torch.float32))
    (graph,) = graphs
    with config.patch(autograd_cache_allow_custom_autograd_functions=True):
        check_cacheable(graph)  # an error otherwise


def test_without_gradients():
    given = inputs(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*given), plain(*given))


def test_autocast_affects_only_the_matrix_products():
    given = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = results(linear_cross_entropy, *given), results(plain, *given)
    assert [value.dtype for value in ours] == [torch.float32] * 3
    for value, twin in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, twin, rtol=0, atol=float(2e-2 * twin.abs().max()))


def test_a_weight_s_gradient_is_added_up_in_float32():
    """400 chunks of the same tokens: in bfloat16 the sum would stop growing at 256 summands."""
    hidden_states, weight, targets = inputs(torch.bfloat16)
    once = results(linear_cross_entropy, hidden_states[:16].detach().requires_grad_(), weight, targets[:16], 1)
    hidden_states = hidden_states[:16].detach().repeat(400, 1).requires_grad_()
    often = results(linear_cross_entropy, hidden_states, weight, targets[:16].repeat(400), 400)
    torch.testing.assert_close(often[2], once[2], rtol=1e-2, atol=1e-3)


def test_the_logits_never_exist_as_a_whole():
    """No intermediate tensor is larger than the logits of one chunk."""
    hidden_states, weight, targets = inputs(torch.float32)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for value in output if isinstance(output, tuple | list) else [output]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.numel())
            return output

    with Largest():
        results(linear_cross_entropy, hidden_states, weight, targets)
    assert largest == 16 * VOCABULARY
