"""The sink's column: fused kernels and the explicit softmax, compared with one plain softmax."""

import pytest
import torch

from sinklm.models.fused_attention import CPU, CUDNN, EFFICIENT, FLASH, kernel_for
from sinklm.models.sink_column import FusedAttention, SinkColumn, attention_with_column, explicit_attention

SCALING = 0.3
# Scores of a column, from negligible to one that dominates every softmax.
SCORES = {"zero": 0.0, "small": -3.0, "large": 8.0, "larger than any key's": 40.0}


def plain(query, key, value, visible, score, sink_value):
    """One softmax over keys and column, ``(B, H, T, D)``; without ``sink_value`` it is zero."""
    scores = (query @ key.transpose(-1, -2) * SCALING).masked_fill(~visible, float("-inf"))
    scores = torch.cat((scores, score.expand(scores.shape[:-1])[..., None]), dim=-1)
    if sink_value is None:
        sink_value = torch.zeros_like(value[0, :, 0])
    column = sink_value[:, None].expand(value.shape[0], -1, -1, -1)
    return scores.softmax(-1) @ torch.cat((value, column), dim=2)


def states(num_queries=7, num_keys=None, batch_size=2, num_heads=3, head_size=8, dtype=torch.float64, device="cpu"):
    """Queries, keys and values in the memory layout of a projection's output."""
    shapes = ((batch_size, length, num_heads, head_size) for length in (num_queries, *[num_keys or num_queries] * 2))
    return [torch.randn(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for shape in shapes]


def causal(num_queries, device="cpu"):
    return torch.ones(num_queries, num_queries, dtype=torch.bool, device=device).tril()


def columns(score: float, num_heads: int = 3, num_queries: int = 7, head_size: int = 8, batch_size: int = 2):
    """Columns as in the arms: a constant, a score per head, and a score per query with a value."""
    like = {"dtype": torch.float64}
    per_head = torch.full((num_heads, 1), score, **like) + torch.randn(num_heads, 1, **like)
    per_query = torch.full((batch_size, num_heads, num_queries), score, **like)
    per_query = per_query + torch.randn_like(per_query)
    value = torch.randn(num_heads, head_size, **like, requires_grad=True)
    yield SinkColumn(torch.tensor(score, **like))
    yield SinkColumn(per_head.requires_grad_())
    yield SinkColumn(per_query.requires_grad_(), value)


def gradients(out, inputs, weights):
    return torch.autograd.grad((out * weights).sum(), [x for x in inputs if x is not None and x.requires_grad])


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_the_fused_kernel_equals_a_plain_softmax_forward_and_backward(score):
    for column in columns(score):
        inputs = [*states(), *column]
        expected, out = plain(*inputs[:3], causal(7), *column), FusedAttention.apply(*inputs, SCALING, CPU)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        weights = torch.randn_like(out)
        for ours, theirs in zip(gradients(out, inputs, weights), gradients(expected, inputs, weights), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    for column in columns(4.0, num_queries=4):
        assert torch.autograd.gradcheck(
            lambda *inputs: FusedAttention.apply(*inputs, SCALING, CPU), (*states(4), *column)
        )


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_any_mask(kind):
    visible = torch.rand(2, 1, 7, 9) < 0.5
    visible[1, :, 2] = False  # a query that sees only the sink
    mask = (
        visible if kind == "boolean" else torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e300)
    )
    for column in columns(1.0):
        inputs = [*states(7, 9), *column]
        expected = plain(*inputs[:3], visible, *column)
        out = attention_with_column(*inputs[:3], mask, column, SCALING)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
        weights = torch.randn_like(out)
        for ours, theirs in zip(gradients(out, inputs, weights), gradients(expected, inputs, weights), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (7, 7), (7, 9)])
def test_no_mask_is_causal_and_shows_all_keys_to_a_single_query(num_queries, num_keys):
    """Keys after those of several queries are the empty slots of a static cache."""
    visible = torch.arange(num_keys) <= torch.arange(num_queries)[:, None]
    visible = visible if num_queries > 1 else torch.ones(1, num_keys, dtype=torch.bool)
    for column in columns(1.0, num_queries=num_queries):
        query, key, value = states(num_queries, num_keys)
        out = attention_with_column(query, key, value, None, column, SCALING)
        torch.testing.assert_close(out, plain(query, key, value, visible, *column), rtol=0, atol=1e-13)


def test_probabilities_of_keys_and_sink_sum_to_one():
    column = SinkColumn(torch.tensor([[2.0], [0.0], [-2.0]]), torch.ones(3, 8))
    query, key, _ = states(dtype=torch.float32)
    out, weights = explicit_attention(query, key, torch.zeros_like(key), causal(7), column, SCALING)
    torch.testing.assert_close(weights.sum(-1) + out[..., 0], torch.ones(2, 3, 7))


def test_dropout_drops_probabilities_of_keys_and_sink_and_keeps_their_mean():
    query, key, value = (x.detach() for x in states())
    column = SinkColumn(torch.zeros((), dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64))
    whole = attention_with_column(query, key, value, None, column, SCALING)
    dropped = [attention_with_column(query, key, value, None, column, SCALING, dropout=0.5) for _ in range(3000)]
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(torch.stack(dropped).mean(0), whole, rtol=0, atol=0.12)


def worst_error(attend, inputs, column):
    """The largest relative error of output and gradients against the plain softmax in float64."""
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = plain(*exact, causal(inputs[0].shape[2]), *(None if x is None else x.cpu().double() for x in column))
    out, weights = attend(*inputs), torch.randn_like(expected)
    ours, theirs = gradients(out, inputs, weights.to(out)), gradients(expected, exact, weights)
    pairs = zip((out, *ours), (expected, *theirs), strict=True)
    return max(((x.cpu().double() - y).norm() / y.norm()).item() for x, y in pairs)


def check_accuracy(kernel, dtype, device, score, head_size, num_queries):
    """Check that a column does not reduce accuracy, except for the float32 rounding of its score.

    On a GPU slightly more error is allowed: the output is rounded by the kernel and again with the
    column.
    """
    inputs = states(num_queries, head_size=head_size, dtype=dtype, device=device)
    column = SinkColumn(torch.tensor(score, device=device), torch.randn(3, head_size, device=device))
    none = SinkColumn(torch.tensor(float("-inf"), device=device))
    ours, theirs = (
        worst_error(lambda *inputs, its=its: FusedAttention.apply(*inputs, *its, SCALING, kernel), inputs, its)
        for its in (column, none)
    )
    allowance = 2 if device == "cuda" else 1.5
    assert ours <= allowance * theirs + 2 * abs(score) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_half_precision_is_as_accurate_as_without_a_column(score):
    """Scores of 8 and 40 reveal a wrong log-sum-exp; in bfloat16 a score of 0 has no effect."""
    check_accuracy(CPU, torch.bfloat16, "cpu", score, head_size=64, num_queries=33)


@pytest.mark.gpu
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(
    ("kernel", "dtype", "head_size"),
    [
        (FLASH, torch.bfloat16, 64),
        (FLASH, torch.float16, 192),
        (CUDNN, torch.bfloat16, 64),
        (CUDNN, torch.bfloat16, 80),
        (CUDNN, torch.float16, 128),
        (EFFICIENT, torch.bfloat16, 256),
        (EFFICIENT, torch.float16, 80),
        (EFFICIENT, torch.float32, 64),
    ],
)
@pytest.mark.parametrize("num_queries", [33, 512])
def test_every_cuda_kernel(kernel, dtype, head_size, score, num_queries):
    if kernel is CUDNN and torch.cuda.get_device_properties(0).major < 9:
        pytest.skip("cuDNN is only used from Hopper on")
    if dtype == torch.float16 and score > 16:
        pytest.skip("with such a large score the gradients of keys underflow float16")
    check_accuracy(kernel, dtype, "cuda", score, head_size, num_queries)


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [12, 64, 256])
def test_every_shape_works_with_or_without_a_kernel(num_queries, dtype, head_size):
    query, key, value = states(num_queries, 7, head_size=head_size, dtype=dtype, device="cuda")
    column = SinkColumn(torch.tensor(4.0, device="cuda", dtype=torch.promote_types(dtype, torch.float32)))
    out = attention_with_column(query, key, value, None, column, SCALING)
    visible = causal(7)[-num_queries:]
    expected = plain(
        *(x.detach().cpu().double() for x in (query, key, value)), visible, column.score.cpu().double(), None
    )
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=2e-2 if dtype.itemsize == 2 else 1e-5)
    out.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("kernel", [FLASH, CUDNN, EFFICIENT], ids=["flash", "cudnn", "efficient"])
def test_cuda_kernels_are_called_as_pytorch_declares_them(kernel):
    """Uses meta tensors, which need no GPU."""
    query, key, value = states(33, head_size=64, dtype=torch.bfloat16, device="meta")
    out, lse = kernel.forward(query, key, value, True, SCALING)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, query.shape[:-1], torch.float32)
    grads = kernel.backward(torch.empty_like(out), query, key, value, out, lse.clone(), True, SCALING)
    assert [x.shape for x in grads] == [query.shape] * 3


def test_a_cpu_has_a_kernel_for_every_input():
    assert all(kernel_for(torch.empty(1, 1, 1, 5, dtype=dtype)) is CPU for dtype in (torch.float64, torch.bfloat16))
