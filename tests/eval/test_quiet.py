"""Libraries are silent during an evaluation, except for the progress of its requests."""

import logging

import pytest
from lm_eval.api.task import tqdm
from transformers.utils import logging as transformers_logging

from sinklm.eval.quiet import quiet_libraries


def chatter() -> None:
    """What lm-eval and the libraries under it do."""
    for name in ("lm_eval.evaluator", "datasets.builder", "transformers.tokenization"):
        logging.getLogger(name).warning("a warning of %s", name)
    print("bootstrapping for stddev: perplexity")
    assert list(tqdm(range(3), desc="building contexts")) == [0, 1, 2]
    with tqdm(total=3, desc="Running loglikelihood requests") as bar:
        bar.update(3)


@pytest.mark.parametrize("shows_progress", [True, False])
def test_only_the_requests_have_a_bar(shows_progress, capfd):
    logging.getLogger("lm_eval").setLevel(logging.INFO)
    verbosity = transformers_logging.get_verbosity()
    with quiet_libraries(shows_progress=shows_progress):
        chatter()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert [line.split(":")[0] for line in shown.err.replace("\r", "\n").split("\n") if "100%" in line] == (
        ["Running loglikelihood requests"] if shows_progress else []
    )
    assert "warning of" not in shown.err
    assert transformers_logging.get_verbosity() == verbosity
    assert logging.getLogger("lm_eval").level == logging.INFO
    chatter()
    shown = capfd.readouterr()
    assert "bootstrapping" in shown.out
    assert "building contexts" in shown.err
