"""The small trained models that are shipped show what they are shipped for."""

from pathlib import Path

import pytest
from sinklm.eval.streaming import configurations, measure, read_stream
from sinklm.models import load_model, load_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "num_sinks", "least", "most"), [("learnable-sink", 1, 1.3, 2), ("vanilla", 0, 1, 1.1)]
)
def test_what_losing_the_first_tokens_costs(name, num_sinks, least, most):
    model, tokenizer = load_model(FOLDER / name), load_tokenizer(FOLDER / name)
    assert model.config.num_sinks == num_sinks
    stream = read_stream([FOLDER / "pioneer_days.txt"], tokenizer, 4000)
    chosen = configurations(("window", "streaming"), [(0, 128), (1, 127), (4, 124)], num_sinks)
    window, one, four = (measure(model, stream, configuration).perplexity for configuration in chosen)
    assert least < window / one < most
    assert one == pytest.approx(four, rel=0.01)
