"""The commands and programs on the pages: they parse, and the files and names that they use exist.

`test_doc_runs` executes those that are small, and `test_doc_programs` the Python.
"""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest
import typer

from sinklm.cli.main import app
from sinklm.train.recipe import load_config

from .test_docs import PAGES, ROOT

# Commands of other programs, by the beginning of the line, and why they are not checked further.
NOT_CHECKED = {
    "cat": "a shell command",
    "cp": "a shell command",
    "git": "changes the checkout",
    "jq": "a shell command",
    "llama-cli": "a program of llama.cpp",
    "lm-eval run": "the command line of lm-eval",
    "pip install": "downloads; `make` and `.ci/wheel` install the same",
    "pre-commit install": "changes the checkout",
    "printf": "a shell command",
    "python -c": "a program in one line; it is compiled below",
    "python -m build": "`.ci/wheel` runs it",
    "python -m twine": "publishes a release",
    "zensical serve": "runs until it is stopped",
    "zstd": "a shell command",
}
USAGE_ERROR = typer.BadParameter.__base__  # click's, or the one of the copy of click in newer versions of typer
LAUNCHERS = (
    "accelerate",
    "deepspeed",
    "torchrun",
    "srun",
    "python",
)  # of `sinklm.train`, with the same arguments as `sinklm train`


def blocks(language: str) -> list:
    """The fenced blocks of a language on all pages, as test parameters with page and line."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
    found = []
    for page in PAGES:
        if page.name.startswith("add-"):  # guides whose examples use and change files of the reader
            continue
        text = page.read_text()
        for match in fence.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            if match[2] == language:
                found.append(pytest.param(dedent(match[3]), id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command, without comments and redirections; loops run once."""
    for name, value in re.findall(r"^for (\w+) in (\S+)", block, flags=re.MULTILINE):
        block = block.replace(f"${name}", value)
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in ("|", "&&", ";"):
                words.append(word)
                continue
            if words and words[0] not in ("for", "do", "done"):
                yield words[: words.index("<")] if "<" in words else words
            words = []


@pytest.mark.parametrize("block", blocks("bash") + blocks("sh"))
def test_commands_are_valid(block):
    for words in commands(block):
        check(words)


def check(words: list[str]) -> None:
    while re.match(r"[A-Z_]+=", words[0]):  # a variable of the environment
        words = words[1:]
    line = shlex.join(words)
    program, *arguments = words
    program = program.removeprefix(".venv/bin/").removeprefix("original/bin/")
    if program == "sinklm":
        check_sinklm(arguments)
    elif program in LAUNCHERS and "sinklm.train" in arguments:
        check_sinklm(["train", *arguments[arguments.index("sinklm.train") + 1 :]])
    elif program in LAUNCHERS and "-m sinklm " in line:
        check_sinklm(arguments[arguments.index("sinklm") + 1 :])
    elif program == "sbatch":
        assert (ROOT / arguments[0]).is_file(), line
        check_sinklm(["train", *arguments[1:]])
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
        assert set(arguments) <= set(targets), line
    elif line.startswith("python -m benchmarks."):
        assert (ROOT / arguments[1].replace(".", "/")).with_suffix(".py").is_file(), line
    elif program.startswith((".ci/", "examples/")):
        assert (ROOT / program).is_file(), line
    elif program in ("bash", "pytest") or (program == "python" and (ROOT / arguments[0]).is_file()):
        assert any((ROOT / argument).exists() for argument in arguments), line
    else:
        assert line.startswith(tuple(NOT_CHECKED)), f"{line}: check it here, or say in NOT_CHECKED why not"
        if line.startswith("python -c"):
            compile(arguments[1], line, "exec")


def check_sinklm(arguments: list[str]) -> None:
    """Parse a command line without running it; check recipe and keys of `sinklm train`."""
    command = typer.main.get_command(app)
    name = "sinklm"
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, name
        command = command.commands[name]
    context = command.make_context(name, arguments)  # raises an error for a wrong option or argument
    if recipe := context.params.get("recipe"):
        recipe = re.sub(r"^runs/(.*?)(/config\.yaml)?$", r"\1", recipe)  # of a run of this recipe
        load_config(recipe.replace("RECIPE", "pythia-14m"), context.params["overrides"] or [])


@pytest.mark.parametrize(
    "line",
    [
        "sinklm evaluate model",
        "sinklm eval streaming model",  # --text is missing
        "sinklm generate model prompt --max-tokens 3",
        "sinklm bench decode model --num-steps 0",
        "sinklm train pythia-15m",
        "deepspeed --module sinklm.train pythia-14m train.micro_batch=3",
        "torchrun --module sinklm.train pythia-14m train.num_steps=0",
        "sbatch examples/slurm.sh pythia-14m train.micro_batch=3",
        "make everything",
        "python study/nothing.py",
        "rm -r /",
    ],
)
def test_invalid_commands_are_found(line):
    with pytest.raises((AssertionError, ValueError, OSError, USAGE_ERROR)):
        check(shlex.split(line))


@pytest.mark.parametrize("block", blocks("python"))
def test_programs_compile_and_their_imports_resolve(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "sinklm":
                    import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sinklm":
            for alias in node.names:
                assert hasattr(import_module(node.module), alias.name), ast.unparse(node)


@pytest.mark.parametrize("block", [block for block in blocks("yaml") if "base: " in block.values[0]])
def test_recipes_are_valid(block, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block)
    load_config(str(recipe))
