"""Options that several commands share."""

import ast
import io
import sys
from pathlib import Path

import pytest

from sinklm import cli
from sinklm.checkpoints.export import export_model
from sinklm.cli import evaluate, main
from sinklm.cli.chat import chat
from sinklm.cli.generate import generate
from sinklm.cli.options import (
    LARGEST_PENALTY,
    MemorySize,
    check_memory,
    check_sampling,
    memory_options,
    parse_cache,
    parse_caches,
    parse_memory,
    placement,
    print_results,
)
from sinklm.console import Console
from sinklm.eval import perplexity
from sinklm.streaming import MemoryOptions, sampling

from ..eval.checkpoints import small_model, write_checkpoint


def test_caches_are_read_and_refused():
    assert parse_cache("4+1020") == (4, 1020)
    assert parse_caches("0+1024, 4+1020,0+1024") == [(0, 1024), (4, 1020)]
    for wrong in ("1024", "4+", "4+0", "4+1020,", "-1+5", "", "1" * 20 + "+1", "٤+1"):
        with pytest.raises(ValueError, match=r"--caches: .* is not a cache: write kept tokens"):
            parse_caches(wrong)


def test_the_home_folder_of_an_option_is_found(tmp_path, monkeypatch):
    """A shell replaces `~` in `--output ~/x`, but not in `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(sys, "argv", ["sinklm", "prepare", "a.txt", "--tokenizer=~/tokenizer.json", "--output=~/store"])
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/tokenizer.json: not a tokenizer.json"):
        main.main()
    assert not (tmp_path / "~").exists()


def test_memories_are_blocks_x_tokens():
    assert parse_memory(" 8x64") == MemorySize(8, 64)
    assert parse_memory(None) is memory_options(None) is None
    assert memory_options(parse_memory("2x16")) == MemoryOptions(num_blocks=2, block_size=16)
    assert memory_options(parse_memory("2x16/16 ")) == MemoryOptions(num_blocks=2, block_size=16, interval=16)
    assert str(parse_memory("8x64/2")) == "8x64/2"
    check_memory(MemorySize(2, 16), [(0, 16), (4, 100)])
    check_memory(None, [(0, 1)])
    with pytest.raises(ValueError, match=r"--memory 2x16: blocks of 16 tokens are longer than the window .* 4\+15:"):
        check_memory(MemorySize(2, 16), [(0, 16), (4, 15)])
    for wrong in ("", "8", "0x64", "8x0", "8x12", "8x64x2", "-1x8", "8+64", "8x64/", "8x64/-1"):
        with pytest.raises(ValueError, match=r"--memory: .* is not a memory: write blocks x tokens of a block"):
            parse_memory(wrong)
    for interval in (0, 65):
        with pytest.raises(
            ValueError, match=f"--memory: '8x64/{interval}' chooses blocks every {interval} tokens: .* 64$"
        ):
            parse_memory(f"8x64/{interval}")


def test_options_of_sampling_have_an_effect_or_the_value_that_has_none():
    assert LARGEST_PENALTY == sampling.MAX_PENALTY
    check_sampling(0.8, top_k=5, top_p=0.9, min_p=0.1, seed=3)
    check_sampling(0.0, top_k=1, top_p=1.0, min_p=0.0, seed=0)  # what greedy decoding does anyway
    unused = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    names = "--top-k and --top-p and --min-p and --seed"
    with pytest.raises(ValueError, match=f"{names} have no effect with --temperature 0, .*: leave it out, or raise"):
        check_sampling(0.0, **unused)


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


def called_names(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_every_command_that_loads_a_model_tells_its_windows():
    loads_with_notes = 0
    for path in Path(cli.__file__).parent.glob("*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for tree in module.body if path.stem == "evaluate" else [module]:  # which has several commands
            called = called_names(tree)
            if called & {"load_model", "load_causal_model"}:
                assert "note_windows" in called, path
                loads_with_notes += 1
    assert loads_with_notes >= 10


def test_the_windows_of_a_model_and_those_before_its_export_are_told(tmp_path, capfd, monkeypatch):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    trained = write_checkpoint(tmp_path / "model", small_model(1, layer_windows=[3, 3], rope_parameters=rope))
    with pytest.warns(UserWarning, match="full attention"):
        export = export_model(trained, tmp_path / "export", full_attention=True)
    shown = {
        (trained, None): "windows of the model: 2 of 2 layers 1+3 (kept and recent tokens)\n",
        (trained, "1+9"): "windows of the model: 2 of 2 layers 1+3 (kept and recent tokens); larger caches do not",
        (export, None): "export was trained with windows 1+3 and now has full attention\n",
    }
    for (model, cache), note in shown.items():
        generate(str(model), ["a"], max_new_tokens=1, cache=cache)
        assert note in capfd.readouterr().err
        generate(str(model), ["a"], max_new_tokens=1, cache=cache, quiet=True)
        assert note not in capfd.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    chat(str(export))
    assert shown[export, None] in capfd.readouterr().err
