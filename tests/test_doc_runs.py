"""The commands on the pages run on small files of the same names, or `NOT_RUN` says why not.

`test_doc_commands` parses them all.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import zstandard
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.data import find_inputs, prepare_store
from sinklm.data.recall import make_record, write_records

from .cli.test_examples import EXAMPLES
from .eval.checkpoints import small_model, small_tokenizer, write_checkpoint
from .test_doc_commands import blocks, commands
from .test_docs import ROOT

# Why a command with this text is not run. The first match counts.
NOT_RUN = {
    r"\b(deepspeed|torchrun|sbatch)\b": "needs several GPUs or hosts; tests/train runs ranks, tests/cluster launchers",
    r"\b(EleutherAI|HuggingFaceTB|bigcode)/|SmolLM2|original\.py": "needs a model or data of the Hub",
    r"\bpile\b|\bstores?/|pg19|\d\dB?_tokenizer|imported/|corpus/\*": "needs files that the reader has",
    r"^sinklm train (?!.*--dry-run)": "trains for minutes to weeks; tests/train trains small models",
    r"^sinklm train wide|layer-logit|learnable-sink --store|--include-path": "needs what the reader of the guide made",
    r"--stream\b": "runs until Ctrl-C; tests/cli/test_generate.py",
    r"^sinklm eval zero-shot": "downloads benchmarks; tests/eval/test_zero_shot.py runs local tasks",
    r"^sinklm eval quantization": "needs the extra quantization; tests/eval/test_quantization.py",
    r"^sinklm eval compare": "needs the results of several evaluations; tests/eval/test_compare.py",
    r"--data-dir benchmarks": "needs benchmarks; tests/eval/test_stream_qa.py",
    r"^sinklm chat": "reads a terminal; tests/cli/test_chat.py",
    r"--checkpoints$|--recipe": "needs a run with checkpoints; tests/eval/test_sinks.py, tests/cli/test_data.py",
    r"pythia-6\.9b": "needs a GPU",
    r"(benchmarks|study)/": "runs for minutes to days, most of them on GPUs",
    r"^(make|git|\.ci/|.*\bpytest\b)": "CI runs it, or a developer",
    r"^(?!sinklm )": "another program",
}
SHORTER = {
    r"--tokens \d+": "--tokens 300",
    r"--num-documents \d+": "--num-documents 20",
    r"--num-tokens \d+": "--num-tokens 3000",
    r"^(sinklm eval stream-eval .*)": r"\1 --num-samples 1 --num-lines 25 --distances 20 --caches 1+127",
    r"^(sinklm eval sinks .*)": r"\1 --num-sequences 4",
    r"^(sinklm bench decode .*)": r"\1 --num-steps 2",
    r"1\+1023,1\+4095": "1+63",
    r"/data/runs": "runs",
}
BOOK = ROOT / "examples" / "checkpoints" / "book.txt"


def reason_not_run(line: str) -> str | None:
    return next((pattern for pattern in NOT_RUN if re.search(pattern, line)), None)


LINES = sorted({shlex.join(words) for block in blocks("bash") + blocks("sh") for words in commands(block.values[0])})
# Once for all runs, which are copies of one checkpoint here, and once for all models in examples/.
MODELS = r"\b(runs|examples/checkpoints)/[\w-]+(?!\.)\b"
RUN = {re.sub(MODELS, r"\1", line): line for line in LINES if reason_not_run(line) is None}
EXAMPLES_OF_HELP = {re.sub(MODELS, r"\1", line) for line in EXAMPLES}  # `test_every_example_runs` runs them
RUN = [line for alike, line in RUN.items() if alike not in EXAMPLES_OF_HELP]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with what the pages call ``corpus``, ``text``, ``book.txt``, ``runs/…`` …"""
    folder = tmp_path_factory.mktemp("reader")
    text = BOOK.read_text(encoding="utf-8")
    (folder / "book.txt").write_text(text[:4000])
    small_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "corpus").mkdir()
    lines = "".join(f'{{"text": "{i} {"word " * 40}"}}\n' for i in range(40))
    (folder / "corpus" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(text[:4000])
    write_records(folder / "recall.jsonl.zst", (make_record(0, number, 0, 9) for number in range(20)))
    inputs = find_inputs([str(folder / "corpus")]).shards
    prepare_store(inputs, folder / "store", tokenizer=folder / "tokenizer.json", validation_fraction=0.5)
    run = write_checkpoint(folder / "runs" / "learnable-sink", small_model(1, hidden_size=64))
    for name in {name for line in RUN for name in re.findall(r"\bruns/([\w-]+)", line)} - {run.name}:
        shutil.copytree(run, folder / "runs" / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", RUN)
def test_a_command_of_a_page_runs(line, files, tmp_path, monkeypatch):
    folder = tmp_path / "reader"
    shutil.copytree(files, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for pattern, shorter in SHORTER.items():
        line = re.sub(pattern, shorter, line)
    if made := re.search(r"--output (\S+)", line):  # of a command before it
        path = folder / made[1]
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if "train" in line and "--dry-run" in line:
        shutil.rmtree(folder / "runs")  # it is about a run that is still to come
    result = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_every_command_runs_or_has_a_reason():
    assert all(line.startswith("sinklm ") for line in RUN), RUN
    assert len(RUN) > 15
    used = {reason_not_run(line) for line in LINES}
    assert used >= set(NOT_RUN), f"no command needs {set(NOT_RUN) - used}"
