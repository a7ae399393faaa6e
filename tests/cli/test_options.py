"""Options that several commands share."""

import io
from pathlib import Path

import pytest

from sinklm.cli import evaluate
from sinklm.cli.options import parse_cache, parse_caches, placement, print_results
from sinklm.console import Console
from sinklm.eval import perplexity


def test_caches_are_read_and_refused():
    assert parse_cache("4+1020") == (4, 1020)
    assert parse_caches("0+1024, 4+1020") == [(0, 1024), (4, 1020)]
    for wrong in ("1024", "4+", "4+0", "4+1020,", "-1+5", "", "1" * 20 + "+1", "٤+1"):
        with pytest.raises(ValueError, match=r"--caches: .* is not a cache: write kept tokens"):
            parse_caches(wrong)


def test_auto_is_the_dtype_that_load_model_chooses():
    assert placement(None, "auto") == {"device": None, "dtype": None}
    assert placement("cpu", "float16") == {"device": "cpu", "dtype": "float16"}
    with pytest.raises(ValueError, match="--device gpu:1 is not available on this machine: use cpu"):
        placement("gpu:1", "auto")


def test_the_methods_of_streaming_are_those_that_are_measured():
    assert evaluate.METHODS == perplexity.METHODS


def test_names_of_results_are_on_one_line():
    console, folder = Console(file=io.StringIO(), width=40), Path("results/a-long-name/of-a-model")
    print_results(console, [folder / "streaming.json", folder / "streaming.png", Path("elsewhere/a.png")])
    expected = "Results in results/a-long-name/of-a-model: streaming.json, streaming.png, elsewhere/a.png\n"
    assert console.file.getvalue() == expected
