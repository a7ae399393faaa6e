"""The trained models in examples/checkpoints load, and do what their cards say."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.perplexity import configurations, measure, read_text_files
from sinklm.eval.stream_eval import ask
from sinklm.eval.tasks.stream_eval.records import make_records
from sinklm.streaming import MemoryOptions

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
NUM_TOKENS = 2000


def perplexities(name: str) -> list[float]:
    """Perplexities on the shipped text with 0, 1 and 4 kept tokens in a cache of 128."""
    model = load_model(CHECKPOINTS / name, device="cpu")
    tokenized = read_text_files([CHECKPOINTS / "book.txt"], load_tokenizer(CHECKPOINTS / name), NUM_TOKENS)
    chosen = configurations(("window", "streaming"), [(0, 128), (1, 127), (4, 124)], num_sinks=0)
    return [measure(model, tokenized, configuration).perplexity for configuration in chosen]


@pytest.mark.parametrize("name", ["vanilla", "learnable-sink", "recall"])
def test_plain_transformers_loads_it(name):
    model, info = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, output_loading_info=True)
    assert type(model) is GPTNeoXForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_token_model_degrades_without_its_sink_and_needs_only_the_sink():
    without, sink_alone, four = perplexities("learnable-sink")
    assert without > 1.2 * sink_alone
    assert sink_alone == pytest.approx(four, rel=0.01)


def shares_of_right_answers(distances: tuple[int, ...], memory: MemoryOptions | None = None) -> dict[int, float]:
    """Answers of the recall model in StreamEval with a cache of 1+255, by distance in lines."""
    model, tokenizer = load_model(CHECKPOINTS / "recall", device="cpu").float(), load_tokenizer(CHECKPOINTS / "recall")
    records = make_records(2 if memory is None else 1, 41, seed=0)
    answers = list(ask(model, tokenizer, records, num_kept=1, window=255, memory=memory, distances=distances))
    found = {distance: [a.is_right for a in answers if a.distance == distance] for distance in distances}
    return {distance: sum(rights) / len(rights) for distance, rights in found.items()}


def test_the_recall_model_finds_all_lines_in_its_cache_and_no_others():
    assert shares_of_right_answers((0, 5, 20)) == {0: 1, 5: 1, 20: 0}


def test_with_a_memory_the_recall_model_finds_lines_that_have_left_its_cache():
    assert shares_of_right_answers((20,), MemoryOptions(interval=1))[20] > 0.5


def test_the_plain_model_loses_little():
    without, _, four = perplexities("vanilla")
    assert without < 1.1 * four
