"""The kernels of `fused_windows` in plain torch, for any dtype on a CPU."""

from types import SimpleNamespace

import torch

from sinklm.models import fused_windows
from sinklm.models.windowed_attention import turn_back


def use_plain_kernels(monkeypatch) -> None:
    """Replace the band's kernels and the Triton kernels."""
    monkeypatch.setattr(fused_windows, "band_forward", plain_forward)
    monkeypatch.setattr(fused_windows, "band_backward", plain_backward)
    kernels = SimpleNamespace(merge_kept_=plain_merge_, add_kept_gradients_=plain_add_)
    monkeypatch.setattr(fused_windows, "kernels", kernels)


def band(query, key, window):
    index = torch.arange(query.shape[2])[:, None] + key.shape[2] - query.shape[2]
    keys = torch.arange(key.shape[2])
    return (keys <= index) & (keys >= index - window), (keys < index - window)


def plain_forward(query, key, value, window, scaling, by_cudnn):
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    scores = (query @ key.mT * scaling).masked_fill(~band(query, key, window)[0], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), scores.logsumexp(-1)


def plain_gradients(grad, query, key, value, out, lse, visible, scaling):
    """The backward pass of a fused kernel: it recomputes the probabilities from ``lse``."""
    scores = (query @ key.mT * scaling).masked_fill(~visible, float("-inf"))
    probabilities = (scores - lse[..., None]).exp()
    grad_scores = probabilities * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scaling
    return grad_scores @ key, grad_scores.mT @ query, probabilities.mT @ grad


def plain_backward(grad, query, key, value, out, lse, window, scaling, by_cudnn):
    states = [states.transpose(1, 2) for states in (grad, query, key, value, out)]
    grads = plain_gradients(*states, lse, band(states[1], states[2], window)[0], scaling)
    return tuple(gradient.transpose(1, 2).contiguous() for gradient in grads)


def plain_merge_(query, key, value, out, lse, cos, sin, window, num_kept, scaling):
    visible = band(query.transpose(1, 2), key.transpose(1, 2), window)[1][:, :num_kept]
    turned = turn_back(query.transpose(1, 2), cos[None], sin[None])
    kept_key, kept_value = (states[:, :num_kept].transpose(1, 2) for states in (key, value))
    scores = (turned @ kept_key.mT * scaling).masked_fill(~visible, float("-inf"))
    total = torch.logaddexp(lse, scores.logsumexp(-1))
    kept = (scores - total[..., None]).exp() @ kept_value
    out.copy_((out.transpose(1, 2) * (lse - total).exp()[..., None] + kept).transpose(1, 2))
    lse.copy_(total)


def plain_add_(grad, query, key, value, out, lse, grads, cos, sin, window, num_kept, scaling):
    visible = band(query.transpose(1, 2), key.transpose(1, 2), window)[1][:, :num_kept]
    turned = turn_back(query.transpose(1, 2), cos[None], sin[None])
    kept_key, kept_value = (states[:, :num_kept].transpose(1, 2) for states in (key, value))
    states = (grad.transpose(1, 2), turned, kept_key, kept_value, out.transpose(1, 2))
    of_query, *of_kept = plain_gradients(*states, lse, visible, scaling)
    grads[0].add_(turn_back(of_query, cos[None], -sin[None]).transpose(1, 2))
    for gradient, added in zip(grads[1:], of_kept, strict=True):
        gradient[:, :num_kept] += added.transpose(1, 2)
