"""The trained models in examples/checkpoints load, and show the effect of a sink token."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.perplexity import configurations, measure, read_text_files

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
NUM_TOKENS = 2000


def perplexities(name: str) -> list[float]:
    """Perplexities on the shipped text with 0, 1 and 4 kept tokens in a cache of 128."""
    model = load_model(CHECKPOINTS / name, device="cpu")
    tokenized = read_text_files([CHECKPOINTS / "book.txt"], load_tokenizer(CHECKPOINTS / name), NUM_TOKENS)
    chosen = configurations(("window", "streaming"), [(0, 128), (1, 127), (4, 124)], num_sinks=0)
    return [measure(model, tokenized, configuration).perplexity for configuration in chosen]


@pytest.mark.parametrize("name", ["vanilla", "learnable-sink"])
def test_plain_transformers_loads_it(name):
    model, info = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, output_loading_info=True)
    assert type(model) is GPTNeoXForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_token_model_degrades_without_its_sink_and_needs_only_the_sink():
    without, sink_alone, four = perplexities("learnable-sink")
    assert without > 1.2 * sink_alone
    assert sink_alone == pytest.approx(four, rel=0.01)


def test_the_plain_model_loses_little():
    without, _, four = perplexities("vanilla")
    assert without < 1.1 * four
