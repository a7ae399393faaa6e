"""Checks of ids and outputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinklm.checkpoints.checks import first_nonfinite
from sinklm.models.checked import check_ids, checked_passes, refuse_nonfinite_logits, refuse_nonfinite_losses

from .tiny import FIRST_SINK, VOCABULARY, tiny_model

ANY = st.sampled_from((0.0, -3.5, float("nan"), float("inf"), -float("inf")))


@given(st.lists(st.lists(ANY, min_size=3, max_size=3), min_size=1, max_size=4))
def test_logits_are_refused_if_a_row_has_no_largest_value(rows):
    logits = torch.tensor(rows)
    is_bad = (logits.isnan() | (logits == torch.inf)).any() or (logits == -torch.inf).all(-1).any()
    if is_bad:
        with pytest.raises(ValueError, match="outputs are not finite"):
            refuse_nonfinite_logits(logits)
    else:
        assert refuse_nonfinite_logits(logits) is logits


@given(st.lists(ANY, min_size=1, max_size=5))
def test_losses_are_refused_unless_all_are_finite(losses):
    losses = torch.tensor(losses)
    if losses.isfinite().all():
        assert refuse_nonfinite_losses(losses) is losses
    else:
        with pytest.raises(ValueError, match="outputs are not finite"):
            refuse_nonfinite_losses(losses)


@given(st.data(), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
def test_one_bad_weight_anywhere_is_found(data, dtype):
    model = tiny_model(1, dtype=dtype, num_hidden_layers=1)
    name, parameter = data.draw(st.sampled_from(list(model.named_parameters())))
    assert first_nonfinite(model) is None
    with torch.no_grad():
        value = data.draw(st.sampled_from((float("nan"), float("inf"), -float("inf"))))
        parameter.view(-1)[data.draw(st.integers(0, parameter.numel() - 1))] = value
    assert first_nonfinite(model) == name


def test_weights_of_eight_bits_are_not_searched():
    """torch cannot find their largest value. A weight in another type after them is still found."""
    model = torch.nn.Module()
    model.scaled = torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    model.packed = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    model.empty = torch.nn.Parameter(torch.ones(0))
    model.scale = torch.nn.Parameter(torch.ones(1))
    assert first_nonfinite(model) is None
    model.scale.data.fill_(torch.inf)
    assert first_nonfinite(model) == "scale"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (-1, f"token id -1 is outside of the model's vocabulary of {VOCABULARY}: use the tokenizer"),
        (VOCABULARY, f"token id {VOCABULARY} is outside"),
        (FIRST_SINK, f"contains the sink token with id {FIRST_SINK}, which the model puts in front .*: remove it"),
    ],
)
def test_wrong_ids_are_refused_before_the_pass(wrong, message):
    model, ids = tiny_model(1), torch.tensor([[1, 2, wrong]])
    with pytest.raises(ValueError, match=message):
        check_ids(ids, model)
    with checked_passes(model), pytest.raises(ValueError, match=message):
        model(ids)
    check_ids(torch.tensor([[0, VOCABULARY - 1, FIRST_SINK - 1]]), model)


def test_outputs_are_checked_in_the_context_only():
    model, ids = tiny_model(0), torch.tensor([[1, 2]])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
        with checked_passes(model), pytest.raises(ValueError, match="outputs are not finite"):
            model(ids)
        assert model(ids).logits.isnan().any()
