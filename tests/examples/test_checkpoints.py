"""The trained models in examples/checkpoints: they load as they are, and show what they are there to show."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.perplexity import configurations, measure, read_text_files

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
NUM_TOKENS = 2000


def perplexities(name: str) -> list[float]:
    """On the shipped text, with 0, 1 and 4 of 128 cached tokens kept from its beginning."""
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


def test_without_its_sink_the_token_model_breaks_and_with_it_alone_it_does_not():
    without, sink_alone, four = perplexities("learnable-sink")
    assert without > 1.2 * sink_alone
    assert sink_alone == pytest.approx(four, rel=0.01)


def test_the_plain_model_loses_little():
    without, _, four = perplexities("vanilla")
    assert without < 1.1 * four
