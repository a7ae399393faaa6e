"""Text from outside is printed as it is: no markup, no control codes, in any encoding."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.table import Table

from sinklm.cli.store_summary import print_summary
from sinklm.console import Console
from sinklm.data.manifest import Counts, Manifest, Split
from sinklm.eval import decode_speed, perplexity, stream_eval, zero_shot
from sinklm.eval.plots import plot_decoding
from sinklm.text import LONGEST, one_line, printable

ROOT = Path(__file__).parent.parent
HOSTILE = (
    "[/bold]",
    "[red]x",
    "[link=x]x[/link]",
    "[/b]:smile:",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "[",
)
COMMAND = [sys.executable, "-W", "ignore", "-c", "from sinklm.cli.main import main; main()"]


def shown(*things: object, **options) -> str:
    console = Console(file=io.StringIO(), width=300, **options)
    for thing in things:
        console.print(thing)
    return console.file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_every_output_of_a_command_shows_a_name_as_it_is(name):
    visible = printable(name)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    assert shown(table).count(visible) == 3
    assert visible in shown(f"Results: {name}")
    results = {"tasks": {name: {name: 0.5}}, "groups": {}, "num_samples": {}}
    assert shown(zero_shot.results_table(results, name)).count(visible) == 3
    assert visible in shown(perplexity.results_table([], name, name))
    result = {"configuration": name, "distances": [{"lines": name, "accuracy": 0.5}]}
    assert shown(stream_eval.results_table([result], name)).count(visible) == 3
    counts = Counts(documents=1, bytes=1, tokens=1)
    manifest = Manifest.model_construct(
        splits={name: Split(total=counts, sets={name: counts}, shards=[])}, sources=[], validation_fraction=0.1
    )
    timed = [
        {"method": m, "milliseconds": 1.0, "num_kept": 1, "window": 1, "batch_size": 1} for m in decode_speed.METHODS
    ]
    assert visible in shown(decode_speed.results_table(timed, name))
    console = Console(file=io.StringIO(), width=300)
    print_summary(console, manifest, Path(name))
    assert console.file.getvalue().count(visible) >= 3
    with Console(file=io.StringIO()).status(name):
        pass


@pytest.mark.parametrize("is_terminal", [False, True])
def test_only_a_terminal_gets_line_breaks(is_terminal):
    console, text = Console(file=io.StringIO(), width=20, force_terminal=is_terminal), " ".join(["a/long/name"] * 3)
    console.print(text, highlight=False)
    assert (text in console.file.getvalue()) != is_terminal
    console.print(text, highlight=False, soft_wrap=True)
    assert text in console.file.getvalue()


def test_a_title_with_dollars_is_no_formula(tmp_path):
    sizes = {"cache_size": 1, "batch_size": 1, "peak_bytes": None}
    results = [{"method": method, "milliseconds": 1.0, **sizes} for method in decode_speed.METHODS]
    plot_decoding({"results": results}, tmp_path / "a.png", title="runs/$a{$")
    assert (tmp_path / "a.png").exists()


@given(st.text())
def test_printable_text_moves_no_cursor_and_keeps_the_rest(text):
    assert all(character in "\t\n" or character.isprintable() or ord(character) > 0x9F for character in printable(text))
    assert printable("é[x]\t世界\n") == "é[x]\t世界\n"


@given(st.text(), st.sampled_from((ValueError, OSError, RuntimeError, KeyError)))
def test_an_error_is_one_short_line(text, kind):
    line = one_line(kind(text))
    assert len(line.splitlines()) == 1
    assert len(line) <= LONGEST + len("RuntimeError: ")


def test_no_module_uses_the_console_of_rich_or_reads_markup():
    for path in [*ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        if path.parts[-2] in ("tests", "build") or "tests" in path.parts or ".venv" in path.parts:
            continue
        source = path.read_text()
        imported = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert "rich.console.Console" not in imported, path
        assert "rich.print" not in imported, path
        assert "from_markup" not in source, path
        assert source.count("TextColumn(") == source.count("markup=False)"), path


def sinklm(*arguments: str, **environment: str) -> subprocess.Popen:
    settings = {**os.environ, **environment}
    return subprocess.Popen([*COMMAND, *arguments], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_text_that_stdout_cannot_encode_is_replaced_and_a_reader_that_ends_first_ends_the_command(valid_model):
    process = sinklm(
        *("generate", str(valid_model), "世界 é", "--stream"),  # without an end
        LC_ALL="C",
        PYTHONIOENCODING="latin-1",
        PYTHONUTF8="0",
    )
    assert process.stdout.read(4) == "?? é".encode("latin-1")
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert b"Traceback" not in process.stderr.read()


def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        result = subprocess.run([*COMMAND, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == "error: cannot write to standard output or a file: No space left on device; free space on this device\n"
    )


@pytest.mark.parametrize("is_terminal", [False, True])
def test_only_in_a_terminal_a_table_breaks_names(is_terminal):
    name = "runs/" + 40 * "a/long-name/"
    table = Table()
    table.add_row(name)
    console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
    console.print(table)
    assert (name in console.file.getvalue()) is not is_terminal
    assert (len(console.file.getvalue().splitlines()[0]) == 80) is is_terminal
    assert console.width == 80
