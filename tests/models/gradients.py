"""Checks the output and the gradients of an attention function against float64.

The oracle materializes the whole mask and all probabilities, and gradients are those of autograd.
This file needs only torch and can be copied into another project;
docs/guides/check-attention-gradients.md shows how. The function under test is called as

    attention(query, key, value, *, window, num_kept, rotation, scaling,
              sink_logit, sink_key, sink_value)

with states ``(B, H, T, D)``, and returns ``(B, H, T, D)``. Query t sees the keys ``t - window … t``
(all up to t if ``window`` is None) and the first ``num_kept`` keys. The sink is one more key of the
same softmax: its score is ``sink_logit`` ``(H,)``, or the scaled product of the query and
``sink_key`` ``(H, D)``, and its value is ``sink_value`` ``(H, D)``, or zero if that is None.
``rotation`` is None, or tables ``(T, R)`` of cosines and sines: the query is rotated by the
negative angle before its product with a kept key outside of the window.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attention = Callable[..., Tensor]
SINK_STATES = ("sink_logit", "sink_key", "sink_value")


class Case(NamedTuple):
    """Sizes of a case.

    Args:
        sink: "none", "zero" (a logit of 0), "logit" or "key and value".
        sink_score: size of the sink's scores. Large ones show an error in the log-sum-exp.
        num_rotated: rotated dimensions R; 0 for no rotation.
    """

    num_queries: int
    window: int | None
    num_kept: int = 0
    sink: str = "none"
    sink_score: float = 1.0
    num_rotated: int = 0
    batch_size: int = 2
    num_heads: int = 3
    head_size: int = 16
    scaling: float = 0.3


# Without windows, windows that divide the length and that do not, texts shorter than the window.
WINDOWS = [(13, None), (12, 4), (13, 5), (13, 1), (7, 9)]
SINKS = [("none", 1.0), ("zero", 1.0), ("logit", 1.0), ("logit", 9.0), ("key and value", 3.0)]
CASES = [
    Case(num_queries, window, num_kept, sink, score, num_rotated)
    for num_queries, window in WINDOWS
    for num_kept in ((0, 1, 4) if window else (0,))
    for sink, score in SINKS
    for num_rotated in ((0, 6) if num_kept else (0,))
]


def make_inputs(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """Return the differentiable inputs by name, in float64 on the CPU, and the other arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    states = (case.batch_size, case.num_heads, case.num_queries, case.head_size)
    inputs = {name: normal(*states) for name in ("query", "key", "value")}
    if case.sink == "zero":
        inputs["sink_logit"] = torch.zeros(case.num_heads, dtype=torch.float64)
    elif case.sink == "logit":
        inputs["sink_logit"] = case.sink_score + normal(case.num_heads)
    elif case.sink == "key and value":
        inputs["sink_key"] = case.sink_score * normal(case.num_heads, case.head_size)
        inputs["sink_value"] = normal(case.num_heads, case.head_size)
    rotation = None
    if case.num_rotated:
        turn = (torch.arange(case.num_queries) - case.num_kept - (case.window or 0)).clamp(min=0)
        angles = turn[:, None] * 10000.0 ** (-torch.arange(0, case.num_rotated, 2).double() / case.num_rotated)
        angles = torch.cat((angles, angles), dim=-1)
        rotation = (angles.cos(), angles.sin())
    others = {"window": case.window, "num_kept": case.num_kept, "rotation": rotation, "scaling": case.scaling}
    return inputs, others | {name: None for name in SINK_STATES if name not in inputs}


def visible_keys(num_queries: int, window: int | None, num_kept: int) -> tuple[Tensor, Tensor]:
    """Return the masks ``(T, T)`` of the keys in the window, and of the kept ones outside of it."""
    query, key = torch.arange(num_queries)[:, None], torch.arange(num_queries)
    if window is None:
        return key <= query, torch.zeros(num_queries, num_queries, dtype=torch.bool)
    return (key <= query) & (key >= query - window), (key < num_kept) & (key < query - window)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    num_kept: int,
    rotation: tuple[Tensor, Tensor] | None,
    sink_logit: Tensor | None,
    sink_key: Tensor | None,
    sink_value: Tensor | None,
    scaling: float,
) -> Tensor:
    """The oracle. Sinks may also have a value for each query, ``(B, H, T, …)``."""
    in_window, is_kept = visible_keys(query.shape[2], window, num_kept)
    turned = query if rotation is None else _rotated_back(query, *rotation)
    scores = torch.where(is_kept, turned @ key.mT, query @ key.mT) * scaling
    scores = scores.masked_fill(~(in_window | is_kept), float("-inf"))
    if sink_logit is None and sink_key is None:
        return scores.softmax(-1) @ value
    sink_logit, sink_key, sink_value = (_of_each_query(sink, query) for sink in (sink_logit, sink_key, sink_value))
    sink_score = sink_logit if sink_key is None else (query * sink_key).sum(-1) * scaling
    probabilities = torch.cat((scores, sink_score[..., None]), dim=-1).softmax(-1)
    out = probabilities[..., :-1] @ value
    return out if sink_value is None else out + probabilities[..., -1:] * sink_value


def errors(attention: Attention, case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Return the relative errors of the output and of each gradient by name.

    An error is the norm of the difference from the oracle over the norm of the oracle's tensor. The
    gradient of a sink is a sum over all queries. Its error is divided by the norm of the terms, if
    that is larger: the terms may cancel, but not their rounding errors. The inputs are rounded to
    ``dtype`` first, so their rounding is no error.
    """
    inputs, others = make_inputs(case)
    inputs = {name: states.to(_dtype_of(name, dtype)) for name, states in inputs.items()}
    exact = {name: states.double() for name, states in inputs.items()}
    exact |= {name: _of_each_query(exact[name], exact["query"]) for name in SINK_STATES if name in exact}
    exact = {name: states.requires_grad_() for name, states in exact.items()}
    ours = {name: states.to(device).requires_grad_() for name, states in inputs.items()}
    expected = exact_attention(**exact, **others)
    rotation = others["rotation"]
    if rotation is not None:
        others["rotation"] = tuple(table.to(device, torch.promote_types(dtype, torch.float32)) for table in rotation)
    out = attention(**ours, **others)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected_grads = torch.autograd.grad(expected, list(exact.values()), weights.double())
    grads = torch.autograd.grad(out, list(ours.values()), weights.to(out.device), allow_unused=True)
    pairs = zip(("output", *inputs), (out, *grads), (expected, *expected_grads), strict=True)
    return {name: _relative_error(mine, theirs) for name, mine, theirs in pairs}


def sdpa_errors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Return the errors of PyTorch's own attention with a mask, without sink and rotation."""

    def attention(query, key, value, *, window, num_kept, scaling, **_):
        mask = torch.logical_or(*visible_keys(query.shape[2], window, num_kept)).to(query.device)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)

    return errors(attention, case._replace(sink="none", num_rotated=0), dtype, device)


def failures(
    attention: Attention,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    cases: list[Case] | None = None,
    allowance: float = 2.0,
) -> Iterator[str]:
    """Yield a line for each tensor of a case that is further from the oracle than allowed.

    Args:
        cases: default: `CASES`.
        allowance: in half precision, how often the largest error of PyTorch's attention is allowed;
            twice as often with a sink, which that does not have. In float64 errors may be 1e-9, in
            float32 1e-5.
    """
    for case in CASES if cases is None else cases:
        allowed = 1e-9 if dtype == torch.float64 else 1e-5
        if dtype.itemsize == 2:
            of_sdpa = max(sdpa_errors(case, dtype, device).values())
            allowed = allowance * of_sdpa * (1 if case.sink == "none" else 2)
        for name, error in errors(attention, case, dtype, device).items():
            if not error <= allowed:
                yield f"{case}: relative error of {_tensor(name)} is {error:.2g}, allowed is {allowed:.2g}"


def _tensor(name: str) -> str:
    return name if name == "output" else f"the gradient of {name}"


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Sinks are parameters, which usually have at least float32."""
    return torch.promote_types(dtype, torch.float32) if name in SINK_STATES else dtype


def _of_each_query(sink: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a sink ``(H, …)`` as ``(B, H, T, …)``."""
    if sink is None or sink.dim() > 2:
        return sink
    batch_size, _, num_queries, _ = query.shape
    return sink[None, :, None].repeat(batch_size, 1, num_queries, *[1] * (sink.dim() - 1))


def _relative_error(mine: Tensor | None, theirs: Tensor) -> float:
    if mine is None:
        return float("inf")  # no gradient
    scale = theirs.norm()
    if theirs.dim() > mine.dim():  # the terms of a sum over queries
        theirs = theirs.sum((0, 2))
        scale = torch.maximum(scale, theirs.norm())
    difference = (mine.detach().cpu().double() - theirs).norm()
    return (difference / scale.clamp(min=1e-30)).item()


def _rotated_back(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    cos, sin = cos[:, :half], sin[:, :half]
    first, second, rest = query.split([half, half, query.shape[-1] - 2 * half], dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)
