"""The components of streaming, each compared with a simple reference."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklm.models import banded_attention, fused_windows
from sinklm.models.banded_attention import attention, flash_two_phase_attention, merge_kept
from sinklm.models.fused_attention import EFFICIENT, can_flash, kernel_for
from sinklm.streaming.encodings import Rotary
from sinklm.streaming.rule import StreamShape

from . import oracle


@given(num_kept=st.integers(0, 9), window=st.integers(1, 9), num_seen=st.integers(0, 60))
def test_slots_contain_the_same_tokens_as_a_list(num_kept, window, num_seen):
    shape = StreamShape(num_kept, window)
    slots = [-1] * shape.num_slots
    for token in range(num_seen):
        slots[int(shape.slot_of(torch.tensor(token)))] = token
    assert shape.tokens_in_slots(torch.tensor([num_seen]))[0].tolist() == slots


@given(num_kept=st.integers(0, 9), window=st.integers(1, 9), token=st.integers(0, 60))
def test_slots_contain_exactly_the_keys_that_the_query_sees(num_kept, window, token):
    shape = StreamShape(num_kept, window)
    held = shape.tokens_in_slots(torch.tensor([token + 1]))[0].tolist()
    seen = [key for key, _ in oracle.contract_keys(token, num_kept, window)]
    assert sorted(t for t in held if t >= 0) == seen


def test_a_cache_has_no_more_tokens_than_an_int32_counts():
    assert StreamShape(2, 2**31 - 3).num_cached == torch.iinfo(torch.int32).max
    with pytest.raises(ValueError, match=r"a cache of 2\+2147483646 tokens is too large: use at most 2,147,483,647"):
        StreamShape(2, 2**31 - 2)


def test_turning_is_rotating_and_adds_up():
    inv_freq = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    states = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    steps = torch.randint(-50, 50, (2, 5))
    for interleaved in (False, True):
        rotary = Rotary(lambda: inv_freq, interleaved=interleaved)
        turned = rotary.turn(states, rotary.phases(steps, states))
        for b in range(2):
            for t in range(5):
                expected = oracle.rotate(states[b, :, t], float(steps[b, t]), inv_freq, interleaved)
                torch.testing.assert_close(turned[b, :, t], expected)
        torch.testing.assert_close(rotary.turn(turned, rotary.phases(-steps, states)), states)


def test_merging_kept_keys_is_one_softmax_over_all():
    query, key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    visible = torch.rand(7, 9) < 0.6
    visible[:, 4] = True  # the band always shows the query itself
    visible[3, :4] = False  # a query that sees no kept key
    scores = (query @ key.transpose(-1, -2) * 0.4).masked_fill(~visible, float("-inf"))
    band, kept = scores[..., 4:], scores[..., :4]
    merged = merge_kept(band.softmax(-1) @ value[:, :, 4:], band.logsumexp(-1), kept, value[:, :, :4])
    torch.testing.assert_close(merged, scores.softmax(-1) @ value)


@pytest.mark.parametrize("value_dim", [64, 48])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_kept_keys_are_not_rounded_before_they_are_scaled(dtype, value_dim, monkeypatch):
    """Kept keys can have large norms, as those of sinks do: in float16 unscaled scores overflow."""

    def exact_band(query, key, value, window, scaling):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]  # as FlashAttention requires
        scores = query.double() @ key.double().mT * scaling
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril().logical_not(), float("-inf"))
        return (scores.softmax(-1) @ value.double()).to(query.dtype), scores.logsumexp(-1).float()

    monkeypatch.setattr(banded_attention, "flash_band", exact_band)
    query = (300 + torch.randn(1, 2, 5, 64)).to(dtype)
    key, value = (100 + torch.randn(1, 2, 8, 64)).to(dtype), torch.randn(1, 2, 8, value_dim).to(dtype)
    visible = torch.tensor([[False] * 3, *[[True] * 3] * 4])
    inputs = (query, query, key[:, :, :3], value[:, :, :3], visible, key[:, :, 3:], value[:, :, 3:], 5, 1e-3)
    out = flash_two_phase_attention(*inputs)
    mask = torch.cat((visible, torch.ones(5, 5).tril().bool()), dim=1)
    exact = attention(query.double(), key.double(), value.double(), mask, 1e-3)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_flash_attention_is_used_only_for_supported_inputs(monkeypatch):
    monkeypatch.setattr(fused_windows, "kernels", "Triton's")
    rule = SimpleNamespace(is_dense=True)

    def takes(head_dim, dtype=torch.bfloat16, capability=(9, 0), is_trained=False):
        device = SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        shape, on = (1, 2, 3, head_dim), SimpleNamespace(type="cuda")
        query = SimpleNamespace(device=on, dtype=dtype, shape=shape, requires_grad=is_trained)
        if head_dim % 8 == 0 and capability >= (8, 0) and dtype == torch.bfloat16:  # what all predicates can refuse
            assert fused_windows.is_fused(query, rule, 0.0) == can_flash(query)
            assert capability == (9, 0) or (kernel_for(query) is EFFICIENT) != can_flash(query)
        return can_flash(query)

    assert [takes(head_dim) for head_dim in (8, 64, 256)] == [True] * 3
    assert [takes(head_dim) for head_dim in (4, 12, 264)] == [False] * 3
    assert [takes(64, capability=capability) for capability in ((7, 5), (8, 0), (8, 6))] == [False, True, True]
    assert not takes(64, dtype=torch.float32)
    for capability, largest in (((8, 0), 256), ((8, 6), 192), ((12, 0), 192)):
        sizes = [head_dim for head_dim in range(8, 272, 8) if takes(head_dim, capability=capability, is_trained=True)]
        assert sizes == list(range(8, largest + 1, 8))
        assert takes(256, capability=capability)


def test_grouped_heads_equal_repeated_heads():
    key, value = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    for num_queries in (1, 4):
        query = torch.randn(2, 6, num_queries, 8)
        for mask in (torch.rand(2, 1, num_queries, 9) < 0.7, torch.randn(2, 6, num_queries, 9)):
            grouped = attention(query, key, value, mask, 0.3)
            repeated = (states.repeat_interleave(3, dim=1) for states in (key, value))
            expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
            torch.testing.assert_close(grouped, expected)
