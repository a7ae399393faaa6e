"""The extras: imports are declared where they are used, and errors name the missing extra."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.main import get_command

from sinklm import extras
from sinklm.cli import main as cli

from .eval.checkpoints import small_model, write_checkpoint

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_IMPORTED = {"jinja2"}  # transformers imports it when a chat template is applied
OPTIONAL = {"accelerate", "cudnn", "wandb"}  # installed by an extra, but the part works without them
OF_COMMANDS = {
    "checkpoints": {"gguf"},
    "eval": {"torchao"},
}  # imported in the function that needs it, after `require_extra`
WITH_TORCH = {"triton"}  # installed by CUDA builds of torch
PARTS = ("models", "streaming", "checkpoints", "data", "train", "eval", "cli")


def modules(requirements: list[str]) -> set[str]:
    """Return the modules that a list of requirements installs, without sinklm's own extras."""
    names = {"pyyaml": "yaml"}
    found = {Requirement(text).name for text in requirements} - {"sinklm"}
    return {names.get(name, name.replace("-", "_")) for name in found}


BASE = modules(PROJECT["dependencies"])


@pytest.mark.parametrize("name", extras.EXTRAS)
def test_the_extras_are_those_of_the_project(name):
    requirements = PROJECT["optional-dependencies"][name]
    with_data = name in ("train", "eval")
    included = set(extras.DATA) if with_data else set()
    assert set(extras.EXTRAS[name]) == (modules(requirements) | included) - OPTIONAL
    assert ("sinklm[data]" in requirements) == with_data


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_what_its_extra_installs(part):
    allowed = BASE | WITH_TORCH | OPTIONAL | set(extras.EXTRAS.get(part, ())) | OF_COMMANDS.get(part, set())
    for path in (ROOT / part).rglob("*.py"):
        assert foreign_imports(path) <= allowed, path.relative_to(ROOT)


def test_nothing_is_required_that_is_not_imported():
    paths = [*(ROOT / "src" / "sinklm").glob("*.py"), *(path for part in PARTS for path in (ROOT / part).rglob("*.py"))]
    imported = set().union(*map(foreign_imports, paths))
    assert BASE | {module for names in extras.EXTRAS.values() for module in names} <= imported | NOT_IMPORTED


def foreign_imports(path: Path) -> set[str]:
    """Return the packages that a file imports, without the standard library and sinklm."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names - {"sinklm"}


def test_the_error_for_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(
        extras.MissingExtraError, match=r'^sinklm\.train requires omegaconf, .* run: pip install "sinklm\[train\]"$'
    ):
        extras.require_extra("train")
    extras.require_extra("eval")


def commands(group: Any, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        yield prefix + name
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")


# numpy and pydantic are not blocked: transformers and typer require them.
BLOCKED = sorted({module for names in extras.EXTRAS.values() for module in names} - {"numpy", "pydantic"})
RUN_COMMANDS = """
import json, sys
for name in [*{blocked!r}, "accelerate", "peft", "wandb"]:
    sys.modules[name] = None
from sinklm.cli.main import main
results = []
for line in {lines!r}:
    sys.argv = ["sinklm", *line.split()]
    try:
        main()
    except SystemExit as error:
        results.append(error.code)
print(json.dumps(results))
"""


HELP = ["--version", "--help", *(f"{command} --help" for command in commands(get_command(cli.app)))]
WITHOUT_EXTRA = {
    "prepare text --output store": "data",
    "tokenizer train text --vocab-size 300": "data",
    "train pythia-14m": "train",
    "eval zero-shot model": "eval",
    "eval streaming model --text text": "eval",
    "eval stream-eval model": "eval",
    "eval sinks model --text text": "eval",
    "eval quantization model --data text": "eval",
    "bench decode model": "eval",
    "export model out.gguf --to gguf": "gguf",
}
IN_THE_BASE = [
    "generate model word --max-new-tokens 3",  # before all that imports the model
    "export model exported",
    "generate exported word --max-new-tokens 3",
    "generate exported word --stream --max-new-tokens 3",
    "chat exported --max-new-tokens 3",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, int | str]:
    """Exit status or error message of each command, run in one process without the extras."""
    folder = tmp_path_factory.mktemp("without")
    write_checkpoint(folder / "model", small_model(num_sinks=1))
    (folder / "text").write_text("some words")
    lines = [*HELP, *IN_THE_BASE, *WITHOUT_EXTRA]
    command = [sys.executable, "-c", RUN_COMMANDS.format(blocked=BLOCKED, lines=lines)]
    result = subprocess.run(command, input="word\n", capture_output=True, text=True, cwd=folder, check=True)
    return dict(zip(lines, json.loads(result.stdout.splitlines()[-1]), strict=True))


def test_the_help_of_every_command_needs_no_extra(results):
    assert len(HELP) > 12
    assert {line: results[line] for line in HELP} == dict.fromkeys(HELP, 0)


def test_a_command_without_its_extra_names_it_in_one_line(results):
    for line, extra in WITHOUT_EXTRA.items():
        assert re.fullmatch(
            rf'error: sinklm\.{extra} requires \w+, which is not installed; run: pip install "sinklm\[{extra}\]"',
            str(results[line]),
        )


def test_export_generate_and_chat_need_no_extra(results):
    assert {line: results[line] for line in IN_THE_BASE} == dict.fromkeys(IN_THE_BASE, 0)


def test_the_module_that_launchers_start_names_its_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['omegaconf'] = None")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "sinklm.train", "pythia-14m"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 1
    assert (
        result.stderr
        == 'error: sinklm.train requires omegaconf, which is not installed; run: pip install "sinklm[train]"\n'
    )
