"""The model, compared with transformers' GPT-NeoX with the sinks in its input."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

from sinklm.models import SinkGPTNeoXForCausalLM, tokens_per_sample

from .tiny import FIRST_SINK, plain_twin, sinks, text, tiny_config, tiny_model

SINKS = [0, 1, 3]


@pytest.mark.parametrize("num_sinks", SINKS)
@pytest.mark.parametrize("rotary", [0.25, 1.0])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(32, 2), (48, 4)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_equal_the_plain_model_fed_the_sinks(num_sinks, rotary, parallel, width, heads, attention):
    model = tiny_model(
        num_sinks,
        hidden_size=width,
        num_attention_heads=heads,
        use_parallel_residual=parallel,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary},
        attn_implementation=attention,
    )
    twin, ids = plain_twin(model), text(2, 11)

    logits = model(ids).logits
    expected = twin(torch.cat([sinks(model, 2), ids], dim=1)).logits[:, num_sinks:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)

    logits.square().mean().backward()
    expected.square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("num_sinks", SINKS)
@pytest.mark.parametrize("extra", [0, 1], ids=["labels T", "labels T+1"])
def test_the_loss_is_the_mean_over_the_targets_of_the_contract(num_sinks, extra):
    model = tiny_model(num_sinks)
    sample = text(2, 12)
    ids, labels = sample[:, : 12 - extra], sample.clone()
    labels[0, 5] = -100

    everything = torch.cat([sinks(model, 2), ids], dim=1)
    logits = plain_twin(model)(everything).logits
    losses = []
    for row in range(2):
        for j in range(labels.shape[1]):
            predictor = num_sinks + j - 1  # the position whose next token is label j
            if labels[row, j] != -100 and predictor >= 0:
                losses.append(cross_entropy(logits[row, predictor], labels[row, j]))

    for skip_logits in (False, True):
        output = model(ids, labels=labels, skip_logits=skip_logits)
        torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), rtol=1e-6, atol=0)
        assert (output.logits is None) == skip_logits
    summed = model(ids, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(summed.double(), torch.stack(losses).sum() / 10, rtol=1e-6, atol=0)


def test_a_training_sample_has_seq_length_positions_in_every_arm():
    assert [tokens_per_sample(2048, n) for n in (0, 1, 2)] == [2049, 2048, 2047]
    with pytest.raises(ValueError, match="leaves no room"):
        tokens_per_sample(4, 4)


@pytest.mark.parametrize("num_sinks", SINKS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(num_sinks, side):
    model, rows = tiny_model(num_sinks), [text(1, 9), text(1, 5)]
    ids, mask = pad(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    batch = model(ids, attention_mask=mask, labels=labels)

    targets, total = 0, 0.0
    for row, tokens in enumerate(rows):
        alone = model(tokens, labels=tokens)
        # Without sinks the padded row's positions are shifted, and rotary tables are float32.
        tolerance = 1e-9 if num_sinks else 1e-6
        torch.testing.assert_close(batch.logits[row][mask[row] == 1], alone.logits[0], rtol=0, atol=tolerance)
        count = tokens.shape[1] - (num_sinks == 0)
        targets, total = targets + count, total + alone.loss.item() * count
    if num_sinks or side == "right":  # by transformers' convention, padding predicts the first token without sinks
        assert batch.loss.item() == pytest.approx(total / targets, rel=1e-6)
    same = model(ids, attention_mask=mask.bool(), labels=labels)
    torch.testing.assert_close(same.loss, batch.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same.logits, batch.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_sinks", SINKS)
@pytest.mark.parametrize("num_labels", [3, 8])
def test_labels_of_another_length_are_an_error(num_sinks, num_labels):
    with pytest.raises(ValueError, match=f"labels cover {num_labels} tokens, but the text has 6"):
        tiny_model(num_sinks)(text(1, 6), labels=text(1, num_labels))


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("num_sinks", SINKS)
def test_a_cache_gives_the_logits_of_one_forward_pass(num_sinks):
    model, ids = tiny_model(num_sinks), text(2, 10)
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([4, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=1e-9)
    assert cache.get_seq_length() == 10 + num_sinks


@pytest.mark.parametrize("counts_sinks", [False, True])
def test_a_cache_with_a_left_padded_batch(counts_sinks):
    model, rows = tiny_model(2), [text(1, 9), text(1, 6)]
    ids, mask = pad(rows, "left")
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
    if counts_sinks:
        mask = torch.cat([torch.ones(2, 2, dtype=torch.long), mask], dim=1)
    logits = model(ids[:, 7:], attention_mask=mask, past_key_values=cache).logits
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(logits[row], model(tokens).logits[0, -2:], rtol=0, atol=1e-9)


def test_positions_count_from_the_first_text_token():
    model, ids = tiny_model(2), text(1, 6)
    explicit = model(ids, position_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(explicit, model(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_sinks", SINKS)
def test_embeddings_stand_for_ids(num_sinks):
    model, ids = tiny_model(num_sinks), text(2, 6)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("num_sinks", SINKS)
def test_generation_from_embeddings_is_that_from_ids(num_sinks, num_beams):
    model, ids = tiny_model(num_sinks, eos_token_id=None), text(2, 8)
    embeddings, mask = model.get_input_embeddings()(ids), torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    from_ids = model.generate(ids, **settings)[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), from_ids)


@pytest.mark.parametrize("num_sinks", SINKS)
def test_decoding_with_a_draft_is_greedy_decoding(num_sinks):
    """Rejected draft tokens are removed from the cache; the sinks stay in it."""
    model = tiny_model(num_sinks, eos_token_id=None)
    ids = text(1, 5).repeat(1, 3)  # repeated, so that the look-up finds drafts
    settings = {"max_new_tokens": 12, "do_sample": False}
    greedy = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), greedy)
    assert torch.equal(model.generate(ids, assistant_model=tiny_model(1, eos_token_id=None), **settings), greedy)


def test_resizing_keeps_the_sinks():
    model, ids = tiny_model(2), text(1, 6)
    before = model(ids).logits
    with pytest.raises(ValueError, match="301 rows would remove the sink token 301: keep at least 302"):
        model.resize_token_embeddings(301)
    model.resize_token_embeddings(302)
    torch.testing.assert_close(model(ids).logits, before[..., :302])


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(keep):
    model, ids = tiny_model(2), text(2, 6)
    kept = model(ids, logits_to_keep=keep).logits
    whole = model(ids).logits
    torch.testing.assert_close(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])


def test_a_tuple_on_request():
    model, ids = tiny_model(1), text(2, 6)
    loss, logits, *_ = model(ids, labels=ids, return_dict=False)
    output = model(ids, labels=ids)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = tiny_model(1), text(2, 9)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)
    assert model.get_input_embeddings().weight.grad[FIRST_SINK].abs().sum() > 0


@pytest.mark.parametrize("num_sinks", SINKS)
@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prefill_chunk_size": 4},
    ],
    ids=["greedy", "no cache", "sampling", "beams", "static cache", "chunked prefill"],
)
@pytest.mark.parametrize("unequal", [False, True], ids=["one length", "unequal lengths"])
def test_generate_equals_the_plain_model_fed_the_sinks(num_sinks, strategy, unequal):
    if unequal and "prefill_chunk_size" in strategy:
        pytest.skip("transformers' chunked prefill does not support padding")
    model = tiny_model(num_sinks, dtype=torch.float32)
    rows = [text(1, 9), text(1, 6 if unequal else 9)]
    ids, mask = pad(rows, "left")
    settings = {"max_new_tokens": 12, "eos_token_id": 7, "pad_token_id": 0, **strategy}
    twin = plain_twin(model)

    torch.manual_seed(1)
    ours = model.generate(ids, attention_mask=mask, **settings)
    # The plain twin gets a left-padded row as padding, sinks, text, as with an exported model.
    fed, fed_mask = pad([torch.cat([sinks(model, 1), row], dim=1) for row in rows], "left")
    suppress = {"suppress_tokens": model.config.sink_token_ids} if num_sinks else {}
    torch.manual_seed(1)
    theirs = twin.generate(fed, attention_mask=fed_mask, **settings, **suppress)
    assert torch.equal(ours[:, 9:], theirs[:, 9 + num_sinks :])


@pytest.mark.parametrize("num_sinks", SINKS)
def test_a_conversation_continues_on_its_cache(num_sinks):
    model = tiny_model(num_sinks, dtype=torch.float32)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(text(1, 6), **settings)
    second_prompt = torch.cat([first.sequences, text(1, 4)], dim=1)
    continued = model.generate(second_prompt, past_key_values=first.past_key_values, **settings)
    fresh = model.generate(second_prompt, **settings)
    assert torch.equal(continued.sequences, fresh.sequences)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_sinks", "checkpointing"),
    [(0, False), (1, True), *(pytest.param(*pair, marks=pytest.mark.long) for pair in ((0, True), (1, False)))],
)
def test_the_compiled_training_step_equals_the_eager_one(num_sinks, checkpointing):
    model, sample = tiny_model(num_sinks, dtype=torch.float32, num_hidden_layers=1), text(2, 12)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # tests the trace, not the kernels
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        forward(sample[:, :-1], labels=sample, skip_logits=True, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rotary", [0.25, 1.0])
def test_the_attention_equals_transformers_(rotary):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    model = tiny_model(0, rope_parameters=rope)
    attention, hidden_states = model.gpt_neox.layers[1].attention, torch.randn(2, 9, 48, dtype=torch.float64)
    theirs = GPTNeoXAttention(model.config, 1).double()
    theirs.load_state_dict(attention.state_dict())
    angles = model.gpt_neox.rotary_emb(hidden_states, position_ids=torch.arange(9)[None])
    results = []
    for module in (attention, theirs):
        given = hidden_states.clone().requires_grad_()
        output = module(given, attention_mask=None, position_embeddings=angles)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), (given, *module.parameters()))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_a_sink_is_never_sampled():
    model = tiny_model(2, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[FIRST_SINK : FIRST_SINK + 2] = 100 * model.lm_head.weight.abs().max()
    for settings in ({"do_sample": True}, {"num_beams": 2}, {"do_sample": False}):
        tokens = model.generate(text(2, 5), max_new_tokens=20, eos_token_id=None, **settings)
        assert not torch.isin(tokens, torch.tensor(model.config.sink_token_ids)).any()


def test_a_pythia_folder_loads_and_takes_a_sink(tmp_path):
    source = plain_twin(tiny_model(0, dtype=torch.float32))
    source.save_pretrained(tmp_path)
    sink = {"kind": "token", "num_tokens": 1, "first_token_id": FIRST_SINK}
    model = SinkGPTNeoXForCausalLM.from_pretrained(tmp_path, sink=sink).eval()
    ids = text(2, 7)
    expected = source(torch.cat([sinks(model, 2), ids], dim=1)).logits[:, 1:]
    torch.testing.assert_close(model(ids).logits, expected)


def test_saved_keys_are_those_of_a_pythia_checkpoint(tmp_path):
    from safetensors import safe_open

    model = tiny_model(1, dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    GPTNeoXForCausalLM.save_pretrained(plain_twin(model), tmp_path / "plain")
    keys = [set(safe_open(tmp_path / name / "model.safetensors", "pt").keys()) for name in ("ours", "plain")]
    assert keys[0] == keys[1]
    assert "embed_out.weight" in keys[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert isinstance(again, SinkGPTNeoXForCausalLM)
    ids = text(1, 5)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_pythia_initialisation():
    model = SinkGPTNeoXForCausalLM(tiny_config(1, hidden_size=128, num_hidden_layers=6, intermediate_size=512))
    small, wang = math.sqrt(2 / (5 * 128)), 2 / (6 * math.sqrt(128))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.all(parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)), name
            continue
        expected = wang if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else small
        # The standard deviation of n normal draws has a relative standard error of 1/√(2n).
        # Allow five of them.
        assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel())), name


def test_wrong_masks_are_an_error():
    model, ids = tiny_model(1), text(1, 5)
    with pytest.raises(ValueError, match="covers 4 tokens, but the text has 5"):
        model(ids, attention_mask=torch.ones(1, 4, dtype=torch.long))
    for shape in ((1, 1, 5, 5), (2, 5)):
        with pytest.raises(ValueError, match=r"requires a mask of shape \(batch, tokens\) for a batch of 1$"):
            model(ids, attention_mask=torch.ones(shape, dtype=torch.long))
    for wrong in (torch.full((1, 5), -torch.inf), torch.full((1, 5), 2)):
        with pytest.raises(ValueError, match="values other than 0 "):
            model(ids, attention_mask=wrong)
    with pytest.raises(ValueError, match=r"has shape \(0, 5\): pass \(batch, tokens\)"):
        model(ids[:0])
