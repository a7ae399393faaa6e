"""Segments of a sample with carried keys, compared with one pass over the whole sample."""

import pytest
import torch

from sinklm.models import CarriedKeys
from sinklm.models.arms import ARMS

from .test_windows import assert_near, windowed_model
from .tiny import text


def in_segments(model, sample, length, window=None):
    """Return the logits of all tokens, the summed loss and the last carried keys."""
    carried, logits, losses = CarriedKeys(), [], []
    for start in range(0, sample.shape[1] - 1, length):
        segment = sample[:, start : start + length + 1]
        output = model(segment[:, :-1], labels=segment, carried=carried, window=window, num_items_in_batch=1)
        carried = output.carried
        logits.append(output.logits)
        losses.append(output.loss)
    return torch.cat(logits, dim=1), sum(losses), carried


@pytest.mark.parametrize(
    ("kind", "num_sinks"),
    [("none", 0), *(("token", num_sinks) for num_sinks in (1, 2, 4)), *((kind, 0) for kind in ARMS)],
)
@pytest.mark.parametrize(("windows", "length"), [([5, 5], 4), ([3, 9], 6), ([30, 30], 4)], ids=str)
@pytest.mark.parametrize("window", [None, torch.tensor(2)], ids=["fixed", "drawn"])
def test_segments_equal_one_pass(kind, num_sinks, windows, length, window):
    model, sample = windowed_model(kind, windows, num_sinks=num_sinks), text(2, 17)
    logits, loss, carried = in_segments(model, sample, length, window)
    whole = model(sample[:, :-1], labels=sample, window=window, num_items_in_batch=1)
    assert_near(logits, whole.logits)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-6, atol=0)  # losses are float32
    assert carried.num_tokens == 16
    lengths = [keys.shape[1] for keys, values in carried.layers]
    assert lengths == [min(window, 16) for window in windows]


def test_gradients_are_those_of_one_pass_with_detached_keys():
    """Without carried keys in reach, gradients are exact; carried keys have none."""
    model, sample = windowed_model("token", [4, 4]), text(1, 13)
    _, loss, carried = in_segments(model, sample, 12)
    loss.backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(sample[:, :-1], labels=sample, num_items_in_batch=1).loss.backward()
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        assert_near(mine, parameter.grad)
    assert not any(states.requires_grad for layer in carried.layers for states in layer)

    model.zero_grad()
    embedded = model.get_input_embeddings()(sample[:, :12]).detach().requires_grad_()
    first = model(inputs_embeds=embedded, carried=CarriedKeys())
    model(sample[:, :6], carried=first.carried).logits.sum().backward()
    assert embedded.grad is None


def test_gradient_checkpointing_changes_no_gradient_of_a_segment():
    model, sample = windowed_model("token", [4, 4]), text(1, 13)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        in_segments(model, sample, 6)[1].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"windows": [4, None]}, {}, "layer 1 has full attention: process whole samples, or set layer_windows"),
        ({"num_kept": 2}, {}, "num_kept is 2 and the model has 1 sink tokens"),
        ({}, {"attention_mask": torch.ones(1, 5).long()}, "carried keys do not support the argument attention_mask"),
        ({}, {"output_attentions": True}, "do not support the argument output_attentions"),
        ({"attn_implementation": "flex_attention"}, {}, "'flex_attention' does not support carried keys"),
    ],
)
def test_segments_that_would_not_equal_one_pass_are_an_error(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        windowed_model(**settings)(text(1, 5), carried=CarriedKeys(), **arguments)


def test_carried_keys_of_another_batch_are_an_error():
    model = windowed_model()
    carried = model(text(2, 5), carried=CarriedKeys()).carried
    with pytest.raises(ValueError, match="carried has 2 samples, but the batch has 1"):
        model(text(1, 5), carried=carried)


@pytest.mark.slow
def test_later_segments_do_not_recompile():
    model, sample = windowed_model("token", [4], dtype=torch.float32), text(2, 25)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    carried, whole = CarriedKeys(), model(sample[:, :-1]).logits
    for start in range(0, 24, 4):
        segment = sample[:, start : start + 5]
        with torch.compiler.set_stance("default" if start < 8 else "fail_on_recompile"):
            output = compiled(segment[:, :-1], labels=segment, carried=carried, window=torch.tensor(4))
        carried = output.carried
        output.loss.backward()
        torch.testing.assert_close(output.logits, whole[:, start : start + 4], rtol=1e-4, atol=1e-4)
