"""`sinklm generate`: output on stdout and stderr, the end of the text, and errors."""

import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.cli.generate import generate
from sinklm.cli.prompts import read_prompts
from sinklm.streaming import Generator

from ..eval.checkpoints import small_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A model that does not generate the end-of-text token."""
    torch.manual_seed(0)
    model = small_model(1)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0
    return str(write_checkpoint(tmp_path_factory.mktemp("generate") / "model", model))


def test_a_stream_is_text_on_stdout_and_speed_on_stderr(checkpoint, capfd):
    generate(checkpoint, ["def main"], stream=True, max_new_tokens=30, cache="1+9")
    shown = capfd.readouterr()
    assert shown.out.startswith("def main")
    assert len(shown.out) > len("def main\n")
    assert "30 tokens, " in shown.err
    assert "tokens/s; cache 1+9" in shown.err


def test_a_text_beyond_the_trained_length_is_named_before_it(checkpoint, capfd):
    length = load_model(checkpoint).config.max_position_embeddings
    generate(checkpoint, ["import os"], max_new_tokens=length, temperature=0)
    shown = capfd.readouterr()
    assert f"it is longer than the {length:,} that the model was trained on" in " ".join(shown.err.split())
    assert f"use --stream --max-new-tokens {length}" in " ".join(shown.err.split())
    assert "friendly reminder" not in shown.err
    generate(checkpoint, ["import os"], max_new_tokens=5)
    assert "trained on" not in capfd.readouterr().err


def test_text_that_fits_the_cache_equals_that_of_dense_attention(checkpoint, capfd):
    for options in ({}, {"stream": True}, {"cache": "1+100"}):
        generate(checkpoint, ["import os"], max_new_tokens=25, temperature=0, **options)
    dense, *streamed = capfd.readouterr().out.split("import os")[1:]
    assert [text.strip() for text in streamed] == [dense.strip()] * 2


def test_a_temperature_near_0_equals_greedy_decoding(checkpoint, capfd):
    for temperature in (0, 1e-40):
        generate(checkpoint, ["import os"], max_new_tokens=25, temperature=temperature)
    greedy, sampled = capfd.readouterr().out.split("import os")[1:]
    assert sampled == greedy


def test_ctrl_c_ends_the_stream_with_its_speed(checkpoint, capfd, monkeypatch):
    forward = Generator.sample

    def interrupted(self, logits, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return forward(self, logits)

    monkeypatch.setattr(Generator, "sample", interrupted)
    generate(checkpoint, ["a"], stream=True)
    assert "7 tokens, " in capfd.readouterr().err


def test_only_a_stream_continues_after_the_end_of_the_text(checkpoint, capfd, monkeypatch):
    end = load_tokenizer(checkpoint).eos_token_id
    monkeypatch.setattr(Generator, "sample", lambda self, logits: torch.tensor([[end]]))
    for options in ({"cache": "1+9"}, {"stream": True, "max_new_tokens": 12}):
        generate(checkpoint, ["a"], **options)
    without, stream = [line for line in capfd.readouterr().err.splitlines() if "cache 1+" in line]
    assert without.startswith("0 tokens")
    assert stream.startswith("12 tokens")


def test_a_memory_has_a_cache(checkpoint, capfd):
    generate(checkpoint, ["import os"], max_new_tokens=40, temperature=0, cache="1+9", memory="2x8")
    generate(checkpoint, ["import os"], max_new_tokens=1, memory="2x8")
    given, default = (line for line in capfd.readouterr().err.splitlines() if " tokens" in line and "cache" in line)
    assert "cache 1+9, " in given
    assert "; memory 2x8, " in given
    assert "cache 1+" in default  # less by a block than without a memory
    assert "too large" not in default


def test_an_incomplete_cache_and_an_empty_prompt_are_an_error(checkpoint):
    with pytest.raises(ValueError, match="--cache: '4' is not a cache"):
        generate(checkpoint, ["a"], cache="4")
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(checkpoint, [""])


def test_a_model_may_have_several_end_of_text_tokens(checkpoint, capfd, monkeypatch):
    model = load_model(checkpoint)
    model.config.eos_token_id = model.generation_config.eos_token_id = [0, 5]
    monkeypatch.setattr("sinklm.checkpoints.load_model", lambda name, **options: model)
    generate(checkpoint, ["import os"], max_new_tokens=5)
    assert capfd.readouterr().out.startswith("import os")


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_with_nan_outputs_is_an_error(checkpoint, monkeypatch, stream):
    model = load_model(checkpoint)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    monkeypatch.setattr("sinklm.checkpoints.load_model", lambda name, **options: model)
    with pytest.raises(ValueError, match="outputs are not finite"):
        generate(checkpoint, ["import os"], stream=stream)


def test_a_prompt_can_come_from_standard_input(checkpoint, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\n" * 100))
    generate(checkpoint, ["-"], stream=True, max_new_tokens=1)
    assert capfd.readouterr().out.startswith("import os\n" * 100)
    with pytest.raises(ValueError, match="the prompt is not valid UTF-8"):
        generate(checkpoint, ["a\udcff"])


def test_a_cache_larger_than_the_trained_length_gives_a_warning(checkpoint):
    trained = load_model(checkpoint).config.max_position_embeddings
    with warnings.catch_warnings(action="error"):
        generate(checkpoint, ["a"], stream=True, max_new_tokens=2, cache=f"1+{trained - 2}")
    with pytest.warns(UserWarning, match=f"the cache 1.{trained - 1} is too large for the {trained} positions"):
        generate(checkpoint, ["a"], stream=True, max_new_tokens=2, cache=f"1+{trained - 1}")


def test_more_tokens_than_the_model_has_positions_are_an_error(tmp_path, capfd):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, n_positions=12))
    folder = str(write_checkpoint(tmp_path / "gpt2", model))
    num_tokens = len(load_tokenizer(folder)("import os")["input_ids"])
    generate(folder, ["import os"], max_new_tokens=12 - num_tokens)
    with pytest.raises(ValueError, match="exceed the 12 positions of this model: lower --max-new-tokens"):
        generate(folder, ["import os"], max_new_tokens=13 - num_tokens)


def test_several_prompts_are_lines_of_json_that_do_not_depend_on_each_other(checkpoint, tmp_path, capfd):
    (tmp_path / "prompts.txt").write_text("def main\n\nimport os\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def main"}\n"import os"\n')
    lines = {}
    for name in ("prompts.txt", "prompts.jsonl"):
        for cache in (None, "1+9"):
            generate(checkpoint, prompts_file=tmp_path / name, cache=cache, max_new_tokens=7, top_p=0.9, as_json=True)
            lines[name, cache] = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    for cache in (None, "1+9"):
        assert lines["prompts.txt", cache] == lines["prompts.jsonl", cache]
        assert [line["prompt"] for line in lines["prompts.txt", cache]] == ["def main", "import os"]
        assert all((line["num_tokens"], line["finish_reason"]) == (7, "length") for line in lines["prompts.txt", cache])
        generate(checkpoint, ["import os"], cache=cache, max_new_tokens=7, top_p=0.9)
        assert capfd.readouterr().out == "import os" + lines["prompts.txt", cache][1]["text"] + "\n"


def test_byte_order_marks_and_line_ends_are_not_part_of_a_prompt(tmp_path):
    for name, content in (("a.txt", "one\ntwo\n"), ("a.JSONL", '"one"\n{"prompt": "two"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig", newline="\r\n")
        assert read_prompts([], tmp_path / name) == ["one", "two"]


def test_quiet_leaves_only_the_text(checkpoint, capfd):
    generate(checkpoint, ["def main"], cache="1+9", max_new_tokens=3, quiet=True)
    shown = capfd.readouterr()
    assert shown.out.startswith("def main")
    assert shown.err == ""


def test_wrong_prompts_are_one_error(checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('"a"\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2 has no prompt: write"):
        generate(checkpoint, prompts_file=tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('"\\ud800"\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1 has half of a surrogate pair"):
        generate(checkpoint, prompts_file=tmp_path / "prompts.jsonl")
    with pytest.raises(FileNotFoundError, match="--prompts-file no cannot be read: No such file"):
        generate(checkpoint, prompts_file=Path("no"))
    with pytest.raises(ValueError, match="there is no prompt: pass one"):
        generate(checkpoint)
    with pytest.raises(ValueError, match="--stream never ends the first of 2 prompts: set --max-new-tokens"):
        generate(checkpoint, ["a", "b"], stream=True)
