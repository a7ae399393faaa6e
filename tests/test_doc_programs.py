"""The Python on the pages runs, with the shipped model and fewer tokens.

README.md is in `test_readme`. All programs of a guide are one.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklm import StreamingCache

from .test_doc_commands import blocks
from .test_docs import ROOT

MODEL = ROOT / "examples" / "checkpoints" / "learnable-sink"
NUM_PRINTED = 5  # after which a program that prints without end is stopped


class EnoughError(Exception):
    """Ends a program that would run until Ctrl-C."""


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """What the pages have introduced before a program."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    turns = [tokenizer(text, return_tensors="pt") for text in ("Once upon a time", " there was a river")]
    ids = tokenizer((MODEL.parent / "book.txt").read_text()[:2000], return_tensors="pt").input_ids
    names: dict[str, Any] = {"StreamingCache": StreamingCache}
    names["cache"] = StreamingCache.for_model(model, num_kept=1, window=60)
    names |= {"first_turn": turns[0], "second_turn_ids": turns[1].input_ids[:, 1:], "inputs": turns[0], "ids": ids}
    return {"model": model, "tokenizer": tokenizer, "torch": torch, **names}


def shortened(program: str) -> str:
    """Fewer tokens, and a cache that the small model has positions for."""
    program = re.sub(r"max_new_tokens=[\d_]+", "max_new_tokens=3", program)
    return program.replace("window=1020", "window=60").replace("block_size=64", "block_size=16")


def printing(lines: list[str]) -> Any:
    def stop_early(*values: object, **_: Any) -> None:
        lines.append(" ".join(map(str, values)))
        if len(lines) >= NUM_PRINTED:
            raise EnoughError

    return stop_early


def programs() -> list:
    found = [block for block in blocks("python") if not block.id.startswith("README.md")]
    guides: dict[str, list[str]] = {}
    for block in found:
        if block.id.startswith("docs/guides/"):
            guides.setdefault(block.id.partition(":")[0], []).append(block.values[0])
    others = [block for block in found if not block.id.startswith("docs/guides/")]
    return [*others, *(pytest.param("\n".join(parts), id=page) for page, parts in guides.items())]


PROGRAMS = programs()
GRADIENTS = "docs/guides/check-attention-gradients.md"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_a_page_runs(program, objects, tmp_path, monkeypatch):
    for name in ("exported", "examples"):  # in the checkout, and beside an export
        os.symlink(MODEL if name == "exported" else ROOT / "examples", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    cache = StreamingCache.for_model(objects["model"], num_kept=1, window=60)
    names = {**objects, "cache": cache, "print": printing(lines)}
    with contextlib.suppress(EnoughError):
        exec(shortened(program), names)
    made = [value for name, value in names.items() if isinstance(value, torch.Tensor) and name not in objects]
    assert all(value.numel() > 3 and value.isfinite().all() for value in made)
    assert bool(lines) == ("print(" in program)


def test_the_errors_that_the_guide_to_gradients_names_are_found():
    program = next(block.values[0] for block in PROGRAMS if block.id == GRADIENTS)
    page = (ROOT / GRADIENTS).read_text()
    number = int(re.search(r"With `distance < window` it yields (\d+) lines", page)[1])
    end = re.search(r"the first ends with `(.*?)`", page, flags=re.DOTALL)[1].replace("\n", " ")
    for code, num_errors in ((program, 0), (program.replace("distance <= window", "distance < window"), number)):
        names: dict[str, Any] = {}
        exec(code, names)
        assert len(names["errors"]) == num_errors
    assert names["errors"][0].endswith(end)


def test_the_number_of_programs():
    """If a page gets another program, it runs here; this notices if none is found."""
    assert len(PROGRAMS) >= 7
    assert {Path(block.id.partition(":")[0]).name for block in PROGRAMS} >= {"streaming.md", "export.md", "README.md"}
