"""The notebooks run, and the output that is stored in them is the one that they produce."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from examples.notebooks.execute import FOLDER, execute

from ..checkpoints.llama_cpp import HAS_LLAMA_CPP, TIE, distance_to_greedy

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def shape_of(notebook: dict[str, Any]) -> list[list[Any]]:
    """The output of each code cell: text without its numbers, and the types of pictures."""

    def text_of(output: dict[str, Any]) -> Any:
        if "text" in output:
            return re.sub(r"\d[\d,.]*", "#", "".join(output["text"]))
        return sorted(output["data"])

    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[text_of(output) for output in cell["outputs"]] for cell in cells]


def run(name: str, *, varying: tuple[int, ...] = ()) -> dict[str, Any]:
    """Execute a notebook, compare its output with the stored one, and return its variables.

    Args:
        varying: indices of code cells whose output may differ.
    """
    path = FOLDER / f"{name}.ipynb"
    executed, names = execute(path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    shapes = zip(shape_of(executed), shape_of(stored), strict=True)
    assert all(new == old for i, (new, old) in enumerate(shapes) if i not in varying)
    return names


def test_every_notebook_is_tested_and_listed():
    tested = re.findall(r'run\("([\w-]+)"', Path(__file__).read_text())
    readme = (FOLDER / "README.md").read_text()
    assert sorted(tested) == [path.stem for path in NOTEBOOKS]
    assert all(f"({path.name})" in readme for path in NOTEBOOKS)


def test_the_streaming_cache_does_not_grow():
    dense, streaming = run("stream-a-llama")["sizes"].values()
    assert len(set(streaming)) == 1
    assert dense == [dense[0] * (i + 1) for i in range(len(dense))]
    assert dense[-1] > 10 * streaming[-1]


@pytest.mark.slow
def test_the_trained_model_has_a_sink():
    names = run("pre-train-with-a-sink")
    short, trained = (mass[:, :, 0] for mass in names["mass"].values())
    assert short.mean() == pytest.approx(names["alike"], abs=0.03)
    assert trained.max() > 0.9
    assert names["records"][-1]["loss"] < names["records"][0]["loss"]


def test_llama_cpp_writes_what_transformers_writes():
    pytest.importorskip("gguf")
    # Another processor may generate another text, and without the engine the last cell says so.
    names = run("export-to-llama-cpp", varying=(2, 3))
    sink = names["model"].config.sink["first_token_id"]
    assert names["content"].fields["tokenizer.ggml.bos_token_id"].contents() == sink
    assert (names["answer"] is not None) == HAS_LLAMA_CPP
    if HAS_LLAMA_CPP:
        assert names["answer"]["tokens"] == names["ids"]
        for ids, generated in zip(names["ids"], names["answer"]["generated"], strict=True):
            assert len(generated) == names["NUM_TOKENS"]
            assert distance_to_greedy(names["model"], ids, generated) < TIE
