"""Every example of every help text is executed, in the order of the work, in one folder.

The examples use the outputs of those before them: `sinklm train` makes the run ``runs/quickstart``
that the others evaluate, export and talk to.
"""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import typer

from sinklm.cli.main import STEPS, app, main

from ..checkpoints.pythia import put_pythia_in_cache
from ..data.processes import InProcessPool
from ..eval.benchmarks import write_benchmarks

ROOT = Path(__file__).parents[2]
# The first words of all commands, each after those whose outputs its examples use.
STAGES = [
    "tokenizer",
    "prepare",
    "data",
    "recipes",
    "train",
    "runs",
    "import",
    "export",
    "eval",
    "bench",
    "generate",
    "chat",
]
QUANTIZATION = (
    "sinklm eval quantization runs/quickstart --data book.txt --num-sequences 4",
    "sinklm eval quantization runs/quickstart --data store --formats w8,w8a8-tensor --num-sequences 4",
)
# Examples that are only parsed, and why.
NOT_RUN = {
    "sinklm prepare EleutherAI/the_pile_deduplicated -o stores/pile": "downloads",
    "sinklm eval zero-shot runs/quickstart --tasks lambada_openai,piqa --limit 100": "downloads",
    **dict.fromkeys(QUANTIZATION, "needs the extra quantization"),
    "sinklm bench decode pythia-6.9b --batch-sizes 1,8 --device cuda": "needs a GPU",
}
STEPS_20 = "train.num_steps=20"
# A smaller model, and an eighth of the work or less.
SMALLER = "model.hidden_size=64 model.num_hidden_layers=2"
SHORTER = {
    STEPS_20: f"{STEPS_20} {SMALLER} train.seq_length=128 train.batch_size_tokens=256 train.micro_batch_size=2",
    "--num-lines 210": "--num-lines 60 --distances 20,40",
    "--num-sequences 10": "--num-sequences 2",
    "--tokens 2000": "--tokens 500",
    "--max-new-tokens 200": "--max-new-tokens 150",  # longer than the cache and the model
    "--limit 20": "--limit 5",
}


def shortened(line: str) -> str:
    for text, shorter in SHORTER.items():
        line = line.replace(text, shorter)
    return line


def commands(group=None, name: str = "sinklm"):
    """Yield each command with its full name."""
    group = group or typer.main.get_command(app)
    for each, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {each}")
        else:
            yield f"{name} {each}", command


def examples_of(command) -> list[str]:
    return [line.removeprefix("$ ") for line in command.epilog.split("\n\n")[1:]]


COMMANDS = sorted(commands(), key=lambda item: STAGES.index(item[0].split()[1]))
EXAMPLES = [line for _, command in COMMANDS for line in examples_of(command)]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_each_help_has_two_examples_of_its_command(name, command):
    lines = examples_of(command)
    assert len(lines) >= 2
    assert f"{name} " in f"{lines[0]} "
    assert command.help
    assert all(param.help for param in command.params if param.param_type_name == "option")


def test_the_steps_of_the_first_help_are_examples_that_run():
    assert set(STEPS) <= set(EXAMPLES) - set(NOT_RUN)


@pytest.mark.parametrize("line", NOT_RUN)
def test_an_example_that_is_not_run_is_valid(line):
    assert line in EXAMPLES
    command = typer.main.get_command(app)
    words = line.split()[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("", words)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a corpus, a text, stores of parts, prompts, a task, and Pythia in a cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    put_pythia_in_cache(tmp_path / "cache")
    text = (ROOT / "examples" / "checkpoints" / "book.txt").read_text()
    documents = [text[i : i + 600] for start in (0, 200, 400) for i in range(start, len(text) - 600, 600)]
    Path("corpus").mkdir()
    for part in (0, 1):
        lines = (json.dumps({"text": document}) + "\n" for document in documents[part::2])
        Path(f"corpus/{part}.jsonl").write_text("".join(lines))
    Path("book.txt").write_text(text[-24_000:])
    Path("prompts.txt").write_text("Once upon a time\nThe sea\n")
    shutil.copytree(ROOT / "tests" / "eval" / "tasks", "tasks")
    task = Path("tasks/rooms.yaml")
    task.write_text(task.read_text().replace("FOLDER", str(Path("tasks").absolute())))
    write_benchmarks(tmp_path / "benchmarks")
    return tmp_path


def run(line: str, monkeypatch) -> int:
    """Run a line in this process, with what a pipe before it would send. Returns its status."""
    *sender, line = line.split(" | ")
    said = shlex.split(sender[0])[1] if sender else ""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_example_runs(folder, monkeypatch, capfd):
    for line in EXAMPLES:
        if line.startswith("sinklm data merge") and not Path("parts").exists():
            for part in (0, 1):
                prepare = f"sinklm prepare corpus/{part}.jsonl --tokenizer tokenizer.json -o parts/0{part} -q"
                assert run(prepare, monkeypatch) == 0
        if line not in NOT_RUN:
            status = run(shortened(line), monkeypatch)
            shown = capfd.readouterr()
            assert status == 0, f"{line}\n{shown.out}{shown.err}{status}"
    for made in ("store/manifest.json", "runs/quickstart/metrics.jsonl", "exports/quickstart/model.safetensors"):
        assert Path(made).exists()
    for name in ("zero_shot", "perplexity", "streaming", "stream_eval", "stream_qa", "sinks", "decode"):
        assert json.loads(Path(f"results/runs-quickstart/{name}.json").read_text())
    assert json.loads(Path("results/compare/compare.json").read_text())["rows"]
