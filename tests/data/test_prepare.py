import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from sinklm.cli.prepare import describe
from sinklm.cli.prepare import prepare as prepare_command
from sinklm.cli.store_summary import print_summary
from sinklm.data import TokenStore, find_inputs, open_store, prepare_store, tokenizing
from sinklm.data import prepare as prepare_module
from sinklm.data.inputs import read_documents
from sinklm.data.job import ShardJob
from sinklm.data.manifest import Counts, Manifest
from sinklm.data.prepare import PrepareProgress, has_saved_work
from sinklm.data.readers import Shard
from sinklm.data.records import JsonLine, Record
from sinklm.data.tokenizer import load_tokenizer_file
from sinklm.data.tokenizing import DocumentTokenizer, is_held_out

from .corpora import content, expected_documents, records, stored_documents, write_json_lines
from .processes import InProcessPool


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Three shards: two of JSON lines and one of text files."""
    (tmp_path / "texts").mkdir()
    for i, row in enumerate(records(3, 5)):
        (tmp_path / "texts" / f"{i}.txt").write_text(row["text"])
    (tmp_path / "texts" / "empty.txt").touch()
    first = write_json_lines(tmp_path / "first.jsonl.zst", records(1, 40))
    second = write_json_lines(tmp_path / "second.jsonl", records(2, 30, set_names=("B", "C")))
    return [str(first), str(second), str(tmp_path / "texts")]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, each one committed, and no processes."""
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", InProcessPool)
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 4000)
    monkeypatch.setattr(prepare_module, "COMMIT_SECONDS", 0.0)


def prepare(corpus: list[str], output: Path, tokenizer_file: Path, **changes: object) -> Manifest:
    arguments = {"validation_fraction": 0.3, "num_processes": 2, **changes}
    return prepare_store(find_inputs(corpus).shards, output, tokenizer=tokenizer_file, **arguments)


def test_a_store_holds_every_document_once_in_order(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    manifest = prepare(corpus, tmp_path / "store", tokenizer_file)
    documents = list(read_documents(find_inputs(corpus).shards))
    assert len(documents) == 75
    for split in ("train", "validation"):
        chosen = [document for document in documents if held_out_by_hand(document.text, 0.3) == (split == "validation")]
        expected = expected_documents([document.text for document in chosen], tokenizer_file)
        assert stored_documents(tmp_path / "store", manifest, split) == expected
        for name in ("A", "B", "C", "texts"):
            pairs = [(d.text, ids) for d, ids in zip(chosen, expected, strict=True) if d.set_name == name]
            counts = manifest.splits[split].sets[name]
            assert counts.documents == len(pairs)
            assert counts.tokens == sum(len(ids) for _, ids in pairs)
            assert counts.bytes == sum(len(text.encode()) for text, _ in pairs)
        assert manifest.splits[split].total.tokens == sum(map(len, expected))
    assert [(source.name, source.num_empty_files) for source in manifest.sources] == [
        ("first.jsonl.zst", 0),
        ("second.jsonl", 0),
        ("texts", 1),
    ]
    TokenStore(tmp_path / "store", verify="sha256")
    assert not (tmp_path / "store" / ".prepare").exists()


def held_out_by_hand(text: str, fraction: float) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) / 2**64 < fraction


@pytest.mark.usefixtures("in_process")
def test_processes_and_batches_change_nothing(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(corpus, tmp_path / "one", tokenizer_file)
    monkeypatch.undo()
    prepare(corpus, tmp_path / "three", tokenizer_file, num_processes=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


@given(st.binary(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_documents_and_more(text: bytes, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert not is_held_out(text, 0)
    assert is_held_out(text, 1)
    assert is_held_out(text, high) or not is_held_out(text, low)


def test_the_held_out_share_is_the_one_asked_for() -> None:
    held_out = sum(is_held_out(str(i).encode(), 0.1) for i in range(20000))
    assert abs(held_out - 2000) < 6 * (20000 * 0.1 * 0.9) ** 0.5


@pytest.mark.usefixtures("in_process")
def test_the_split_depends_on_neither_order_nor_file(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = records(5, 60)
    doubled = write_json_lines(tmp_path / "doubled.jsonl", [*rows, *rows])
    turned = write_json_lines(tmp_path / "turned.jsonl", rows[::-1])
    one = prepare([str(doubled)], tmp_path / "a", tokenizer_file)
    other = prepare([str(turned)], tmp_path / "b", tokenizer_file)
    validation = stored_documents(tmp_path / "b", other, "validation")
    assert stored_documents(tmp_path / "a", one, "validation") == validation[::-1] * 2
    assert 0 < len(validation) < 60


@pytest.mark.usefixtures("in_process")
def test_with_a_fraction_of_zero_there_is_no_validation_split(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path
) -> None:
    manifest = prepare(corpus, tmp_path / "store", tokenizer_file, validation_fraction=0.0)
    assert list(manifest.splits) == ["train"]
    assert manifest.splits["train"].total.documents == 75


def test_a_long_document_is_encoded_in_pieces_to_the_same_ids(
    tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "PIECE_LENGTH", 50)
    text = "the sink  token of\n a cache " * 100
    work = DocumentTokenizer(load_tokenizer_file(tokenizer_file), 0, np.dtype(np.uint16), 0.0)
    assert [work.encode(text, "here").tolist()] == expected_documents([text], tokenizer_file)


@pytest.mark.usefixtures("in_process")
def test_key_of_the_text_and_end_of_document_can_be_named(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = [{"content": "a sink"}, {"content": "the token"}]
    path = str(write_json_lines(tmp_path / "x.jsonl", rows))
    found, named = find_inputs([path], text_key="content").shards, {"eod_token": "<|padding|>"}
    settings = {"tokenizer": tokenizer_file, "validation_fraction": 0.0}
    manifest = prepare_store(found, tmp_path / "store", **settings, **named)
    expected = [[*ids[:-1], 1] for ids in expected_documents([row["content"] for row in rows], tokenizer_file)]
    assert stored_documents(tmp_path / "store", manifest, "train") == expected
    assert (manifest.text_key, TokenStore(tmp_path / "store").eod_id) == ("content", 1)
    assert prepare_store(found, tmp_path / "store", **settings, **named) == manifest
    with pytest.raises(ValueError, match=r"other settings \(eod_id: 1 then, 0 now\)"):
        prepare_store(found, tmp_path / "store", **settings)
    with pytest.raises(ValueError, match=r"other settings \(text_key: content then, text now\)"):
        prepare_store(find_inputs([path]).shards, tmp_path / "store", **settings, **named)
    with pytest.raises(ValueError, match="has no token <end>; pass --eod-token with the name of one that it has"):
        prepare_store(found, tmp_path / "other", **settings, eod_token="<end>")


@pytest.mark.usefixtures("in_process")
def test_the_command_points_out_what_is_lost_or_unprotected(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(5)
    token = "<|padding|>"
    tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in "ab":
        (tmp_path / f"{name}.zst").write_bytes(zstandard.compress(b'{"body": "the sink"}\n'))
    options = {"tokenizer": str(tmp_path), "text_key": "body", "eod_token": None, "processes": 1}
    prepare_command([str(tmp_path / "a.zst"), str(tmp_path / "b.zst")], tmp_path / "s", **options)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "no checksums, so damage may go unnoticed, in 2 of the inputs: a.zst, b.zst" in said
    for what in ("truncation", "the template that adds <|padding|>"):
        assert f"the store's tokenizer is without {what}, which training does not use" in said


WORDS = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
WORD_LEVEL = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
WORD_LEVEL_ENDS = Tokenizer(WordLevel(WORDS, unk_token="</s>"))
WORD_UNIGRAM = Tokenizer(Unigram([(word, -1.0) for word in WORDS], 0))
for words in (WORD_LEVEL, WORD_LEVEL_ENDS, WORD_UNIGRAM):
    words.pre_tokenizer = WhitespaceSplit()


@given(st.lists(st.lists(st.sampled_from(["a", "b", "x", "漢"]), min_size=1).map(" ".join), max_size=5))
@pytest.mark.parametrize("tokenizer", [WORD_LEVEL, WORD_LEVEL_ENDS, WORD_UNIGRAM])
def test_unknown_tokens_are_counted(tokenizer: Tokenizer, texts: list[str]) -> None:
    lines = [JsonLine("here", "set", json.dumps({"text": text}).encode()) for text in texts]
    work = DocumentTokenizer(tokenizer, 1, np.dtype(np.uint16), 0.5)
    assert work(lines).num_unknown == sum(text.count("x") + text.count("漢") for text in texts)


@pytest.mark.usefixtures("in_process")
def test_text_that_the_tokenizer_cannot_represent_is_pointed_out(
    tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = [str(write_json_lines(tmp_path / f"{name}.jsonl", [{"text": f"a {name} x b"}] * 50)) for name in "aby"]
    WORD_LEVEL.save(str(tmp_path / "words.json"))
    lossy = Tokenizer(BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))
    lossy.save(str(tmp_path / "lossy.json"))
    said = {}
    for name, tokenizer in {
        "words": tmp_path / "words.json",
        "lossy": tmp_path / "lossy.json",
        "x": tokenizer_file,
    }.items():
        prepare_command(corpus, tmp_path / name, tokenizer=str(tokenizer), eod_token=None, text_key="text", processes=1)
        said[name] = "".join(capsys.readouterr())
    assert "200 of 750 tokens (26.667%) are the unknown token" in said["words"]
    assert "lossy.json has no unknown token and not all bytes, so characters" in said["lossy"]
    assert ["unknown token" in said[name] for name in ("words", "lossy", "x")] == [True, True, False]
    sources = json.loads((tmp_path / "words" / "manifest.json").read_text())["sources"]
    assert [source.get("num_unknown") for source in sources] == [50, 50, 100]
    assert [source.num_unknown for source in TokenStore(tmp_path / "words").manifest.sources] == [50, 50, 100]
    assert "num_unknown" not in (tmp_path / "x" / "manifest.json").read_text()  # older versions read it


class Crash(BaseException):
    """The process stops here."""


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch, output: Path, left: Path) -> None:
    """Stop at the n-th call that changes the disk; ``left`` is a copy of the folder then."""
    counter = itertools.count(1)

    def crashing(function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            number = next(counter)
            if number == call:
                subprocess.run(["cp", "-a", str(output), str(left)], check=True)
            if number >= call:
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (shutil, "copyfile"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, crashing(getattr(module, name)))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.long])])
def test_after_a_crash_at_any_moment_the_same_command_ends_in_the_same_bytes(
    every: int, corpus: list[str], tmp_path: Path, tokenizer_file: Path
) -> None:
    prepare(corpus, tmp_path / "whole", tokenizer_file)
    whole = content(tmp_path / "whole")
    for call in itertools.count(1, every):
        output, left = tmp_path / f"crashed-{call}", tmp_path / f"left-{call}"
        with pytest.MonkeyPatch.context() as patch:
            crash_at(call, patch, output, left)
            try:
                prepare(corpus, output, tokenizer_file)
                break  # it finished: there is no later call
            except Crash:
                pass
        prepare(corpus, left, tokenizer_file)
        assert content(left) == whole, f"crashed at call {call}"
        shutil.rmtree(output)
        shutil.rmtree(left)
    assert call > 40


@pytest.mark.usefixtures("in_process")
def test_a_second_run_does_not_tokenize_what_the_first_had_committed(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = JsonLine.document

    def stop_late(progress: PrepareProgress) -> None:
        if progress.shard_name == "second.jsonl":
            raise Crash

    with pytest.raises(Crash):
        prepare(corpus, tmp_path / "store", tokenizer_file, report=stop_late)
    monkeypatch.setattr(JsonLine, "document", lambda self: seen.append(self.place) or original(self))
    prepare(corpus, tmp_path / "store", tokenizer_file)
    assert len(seen) < 30
    assert all("second.jsonl" in place for place in seen)
    assert not any("line 1:" in place for place in seen)
    seen.clear()
    prepare(corpus, tmp_path / "store", tokenizer_file)
    assert seen == []


KILLED = """
import multiprocessing, os, signal, sys
from importlib import import_module
from sinklm.data import find_inputs, prepare_store
module = import_module("sinklm.data.prepare")
module.BATCH_BYTES, module.COMMIT_SECONDS = 4000, 0.0
def kill_late(progress):
    if progress.shard_name == "second.jsonl":
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    output, tokenizer, *corpus = sys.argv[1:]
    prepare_store(find_inputs(corpus).shards, output, tokenizer=tokenizer, validation_fraction=0.3, num_processes=2,
                  report=kill_late)
"""


def is_running(pid: int) -> bool:
    """Whether a process has not ended. In a container, nobody may wait for one that has."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_process_leaves_no_helpers_and_a_store_that_goes_on(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path / "store"), str(tokenizer_file), *corpus]
    with open(tmp_path / "helpers", "w") as pids:  # no pipe: surviving helpers would keep it open
        assert subprocess.run(command, stdout=pids, check=False).returncode == -signal.SIGKILL
    helpers = [int(pid) for pid in (tmp_path / "helpers").read_text().split()]
    assert len(helpers) == 2
    deadline = time.monotonic() + 120
    while (alive := [pid for pid in helpers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert alive == []

    assert json.loads((tmp_path / "store/.prepare/00001.json").read_text())["num_records"] > 0
    prepare(corpus, tmp_path / "store", tokenizer_file)
    prepare(corpus, tmp_path / "whole", tokenizer_file)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.usefixtures("in_process")
def test_the_command_says_that_it_goes_on_only_if_it_does(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture
) -> None:
    def crash(progress: PrepareProgress) -> None:
        raise Crash

    store, settings = tmp_path / "store", {"tokenizer": str(tokenizer_file), "processes": 2, "eod_token": None}
    settings["text_key"] = "text"
    with pytest.raises(Crash):
        prepare(corpus, store, tokenizer_file, report=crash)
    for said in ("Resuming the interrupted work", "is already complete; nothing to do"):
        with pytest.raises(ValueError, match="other settings"):
            prepare_command(corpus, store, validation_fraction=0.2, **settings)
        assert not capsys.readouterr().out.strip()  # rich before 14.3 ends a hidden bar with an empty line
        prepare_command(corpus, store, validation_fraction=0.3, **settings)
        assert said in "".join(capsys.readouterr())


def run_command(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess:
    """Run ``sinklm prepare`` as a user does, optionally with a limit on the size of files."""
    command = [sys.executable, "-c", "from sinklm.cli.main import main; main()", "prepare", *map(str, arguments)]
    preexec = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=preexec)


def wait_until_it_tokenizes(pid: int) -> None:
    """Wait until a tokenizing process has worked for two seconds; half of that are imports."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with suppress(psutil.Error):
            children = psutil.Process(pid).children(recursive=True)
            if any("spawn_main" in " ".join(one.cmdline()) and one.cpu_times().user > 2 for one in children):
                return
        time.sleep(0.05)
    raise TimeoutError("no process tokenizes")


def test_ctrl_c_ends_the_command_in_the_middle_of_a_document(tmp_path: Path, tokenizer_file: Path) -> None:
    words = random.Random(0).choices([f"word{i}" for i in range(1000)], k=1_000_000)
    (tmp_path / "x.txt").write_text(" ".join(words))
    command = [sys.executable, "-c", "from sinklm.cli.main import main; main()", "prepare", str(tmp_path / "x.txt")]
    command += ["--tokenizer", str(tokenizer_file), "--output", str(tmp_path / "store"), "--processes", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until_it_tokenizes(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Interrupted. Run the same command again to resume." in said
    # The document was not finished first: the file of its batch still has the records.
    (batch,) = (tmp_path / "store/.prepare").glob("batch-*")
    assert isinstance(pickle.loads(batch.read_bytes()), list)


@pytest.mark.usefixtures("in_process")
def test_few_large_documents_are_read_ahead(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise many processes would hold many documents of the largest size."""
    path = write_json_lines(tmp_path / "x.jsonl", [{"text": "sink " * 10_000}] * 30)
    waiting = largest = 0
    submit, take = InProcessPool.submit, prepare_module.take_result

    def submitted(self: InProcessPool, *arguments: object) -> object:
        nonlocal waiting, largest
        waiting += 1
        largest = max(largest, waiting)
        return submit(self, *arguments)

    def taken(batch: Path) -> object:
        nonlocal waiting
        waiting -= 1
        return take(batch)

    monkeypatch.setattr(InProcessPool, "submit", submitted)
    monkeypatch.setattr(prepare_module, "take_result", taken)
    prepare([str(path)], tmp_path / "store", tokenizer_file, num_processes=8)
    assert largest == -(-2 * 4000 * 18 // 50_012)  # 18 batches of twice 4000 bytes


def test_a_text_that_cannot_be_cut_has_a_limit(tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "PIECE_LENGTH", 50)
    monkeypatch.setattr(tokenizing, "MAX_PIECE_LENGTH", 200)
    work = DocumentTokenizer(load_tokenizer_file(tokenizer_file), 0, np.dtype(np.uint16), 0.0)
    work.encode("the sink " * 1000, "here")
    with pytest.raises(ValueError, match=r"here: \d+ characters in which this tokenizer allows no cut"):
        work.encode("the sink " * 5 + "a" * 201, "here")


def test_a_full_disk_is_one_error_and_loses_nothing(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    big = write_json_lines(tmp_path / "big.jsonl", records(9, 400, num_words=400))
    options = ["--tokenizer", tokenizer_file, "--output", tmp_path / "store", "--processes", 1]
    result = run_command(corpus[0], big, *options, limit=2**18)
    assert result.returncode == 1
    note, error = filter(None, result.stderr.splitlines())  # rich before 14.3 ends a hidden bar with an empty line
    assert note == "reading the list of inputs …"
    assert error.startswith(f"error: {tmp_path}/store: no space left to write")
    kept = tmp_path / "store/train/00000.bin"
    stamp = kept.stat().st_mtime_ns
    result = run_command(corpus[0], big, *options)
    assert result.returncode == 0, result.stderr
    assert kept.stat().st_mtime_ns == stamp
    run_command(corpus[0], big, *options[:2], "--output", tmp_path / "whole")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_a_bad_record_is_one_line_on_stderr_and_keeps_the_shards_before_it(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txet": "misspelt"}\n')
    options = [corpus[0], bad, "--tokenizer", tokenizer_file, "--output", tmp_path / "store", "--processes", 1]
    result = run_command(*options)
    assert result.returncode == 1
    note, error = filter(None, result.stderr.splitlines())
    assert note == "reading the list of inputs …"
    assert error == (
        f'error: {bad}, line 2: the record has no text (key "text" is missing); fix or remove it, or name another '
        "key with --text-key"
    )
    assert (tmp_path / "store/train/00000.bin").exists()
    assert not (tmp_path / "store/manifest.json").exists()
    bad.write_text('{"text": "fine"}\n{"text": "fixed"}\n')
    result = run_command(*options)
    assert result.returncode == 0, result.stderr
    assert TokenStore(tmp_path / "store").manifest.splits["train"].sets["bad"].documents == 2


@pytest.mark.usefixtures("in_process")
def test_what_was_read_before_a_truncated_file_is_kept(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    path = Path(corpus[0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"first\.jsonl\.zst: truncated \.zst file"):
        prepare([corpus[1], corpus[0]], tmp_path / "store", tokenizer_file)
    assert (tmp_path / "store/train/00000.bin").exists()
    path.write_bytes(whole)
    prepare([corpus[1], corpus[0]], tmp_path / "store", tokenizer_file)
    prepare([corpus[1], corpus[0]], tmp_path / "whole", tokenizer_file)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_batches_go_through_files(tmp_path: Path, tokenizer_file: Path) -> None:
    """The main process would wait indefinitely for a pipe in which one breaks off."""
    InProcessPool(1, None, None, (None, tokenizer_file, 0, np.dtype(np.uint16), 0.0))
    lines = [JsonLine("a", "a", json.dumps(row).encode()) for row in records(4, 30)]
    batch = tokenizing.tokenize(tokenizing.put_records(lines, tmp_path / "batch"))
    assert batch == tmp_path / "batch"
    assert tokenizing.take_result(batch).num_records == 30
    assert not batch.exists()


def test_a_killed_tokenizing_process_is_an_error(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_helpers(progress: PrepareProgress) -> None:
        """First they stop reading, so that what waits in a pipe has no reader."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in multiprocessing.active_children():
                os.kill(process.pid, number)
            time.sleep(0.3)

    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 2**18)  # more than the buffer of a pipe
    big = write_json_lines(tmp_path / "big.jsonl", records(9, 4000, num_words=400))
    with pytest.raises(OSError, match="a tokenizing process was killed"):
        prepare([str(big)], tmp_path / "store", tokenizer_file, report=kill_helpers)


@pytest.mark.usefixtures("in_process")
def test_an_interrupted_preparation_of_an_older_version_has_its_defaults(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path
) -> None:
    def stop(progress: PrepareProgress) -> None:
        raise Crash

    whole = prepare(corpus, tmp_path / "whole", tokenizer_file)
    with pytest.raises(Crash):
        prepare(corpus, tmp_path / "store", tokenizer_file, report=stop)
    path = tmp_path / "store/.prepare/settings.json"
    old = ("tokenizer_sha256", "validation_fraction", "sources")
    path.write_text(json.dumps({key: json.loads(path.read_bytes())[key] for key in old}))
    for settings, message in (
        ({"eod_token": "<|padding|>"}, "eod_id: 0 then, 1 now"),
        ({"split_sets": True}, "split_sets: False then, True now"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({message}\)"):
            prepare(corpus, tmp_path / "store", tokenizer_file, **settings)
    shards = find_inputs(corpus, text_key="body").shards
    with pytest.raises(ValueError, match=r"other settings \(text_key: text then, body now\)"):
        prepare_store(shards, tmp_path / "store", tokenizer=tokenizer_file, validation_fraction=0.3)
    assert prepare(corpus, tmp_path / "store", tokenizer_file) == whole


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("is_finished", [True, False])
def test_an_output_made_with_other_settings_is_refused(
    corpus: list[str], tmp_path: Path, tokenizer_file: Path, is_finished: bool
) -> None:
    def stop(progress: PrepareProgress) -> None:
        raise Crash

    if is_finished:
        prepare(corpus, tmp_path / "store", tokenizer_file)
    else:
        with pytest.raises(Crash):
            prepare(corpus, tmp_path / "store", tokenizer_file, report=stop)
    before = content(tmp_path / "store")
    with pytest.raises(ValueError, match=r"other settings \(validation_fraction: 0\.3 then, 0\.2 now\)"):
        prepare(corpus, tmp_path / "store", tokenizer_file, validation_fraction=0.2)
    with pytest.raises(ValueError, match=r"other settings \(sources: 3 inputs first.* then, 2 inputs first"):
        prepare(corpus[:2], tmp_path / "store", tokenizer_file)
    other_tokenizer = tmp_path / "other.json"
    other_tokenizer.write_text(tokenizer_file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"other settings \(tokenizer_sha256"):
        prepare(corpus, tmp_path / "store", other_tokenizer)
    assert content(tmp_path / "store") == before


@pytest.mark.usefixtures("in_process")
def test_settings_may_change_if_no_work_was_saved(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(ValueError, match="the record has no text"):
        prepare([str(bad)], tmp_path / "store", tokenizer_file)
    assert not has_saved_work(tmp_path / "store")
    prepare(corpus, tmp_path / "store", tokenizer_file, validation_fraction=0.2)
    prepare(corpus, tmp_path / "whole", tokenizer_file, validation_fraction=0.2)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.usefixtures("in_process")
def test_a_changed_input_is_done_again_or_refused(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    def stop_late(progress: PrepareProgress) -> None:
        if progress.shard_name == "second.jsonl":
            raise Crash

    with pytest.raises(Crash):
        prepare(corpus, tmp_path / "store", tokenizer_file, report=stop_late)
    write_json_lines(Path(corpus[1]), records(7, 30))  # its shard has been begun
    prepare(corpus, tmp_path / "store", tokenizer_file)
    prepare(corpus, tmp_path / "whole", tokenizer_file)
    assert content(tmp_path / "store") == content(tmp_path / "whole")
    write_json_lines(Path(corpus[1]), records(8, 31))
    with pytest.raises(ValueError, match=r"store: already complete, but second\.jsonl now has \d+ bytes"):
        prepare(corpus, tmp_path / "store", tokenizer_file)


@pytest.mark.usefixtures("in_process")
def test_a_changed_input_of_a_finished_one_is_refused(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    def stop_late(progress: PrepareProgress) -> None:
        if progress.shard_name == "second.jsonl":
            raise Crash

    with pytest.raises(Crash):
        prepare(corpus, tmp_path / "store", tokenizer_file, report=stop_late)
    write_json_lines(Path(corpus[0]), records(8, 31))
    with pytest.raises(ValueError, match=r"shard 00000 was made from first\.jsonl\.zst with \d+ bytes"):
        prepare(corpus, tmp_path / "store", tokenizer_file)


@pytest.mark.usefixtures("in_process")
def test_a_folder_that_is_not_ours_is_left_alone(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis: is neither empty nor a token store"):
        prepare(corpus, tmp_path / "thesis", tokenizer_file)
    assert content(tmp_path / "thesis") == {"chapter.tex": b"years of work"}


@pytest.mark.usefixtures("in_process")
def test_two_runs_do_not_write_into_one_folder(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    def start_another(progress: PrepareProgress) -> None:
        prepare(corpus, tmp_path / "store", tokenizer_file)

    with pytest.raises(ValueError, match="in use by another `sinklm prepare`"):
        prepare(corpus, tmp_path / "store", tokenizer_file, report=start_another)


def test_fractions_outside_of_0_to_1_are_refused(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction is"):
            prepare(corpus, tmp_path / "store", tokenizer_file, validation_fraction=fraction)


class EndlessShard(Shard):
    name, num_bytes = "endless", None

    def __init__(self) -> None:
        self.num_read = 0

    def read(self, skip: int = 0) -> Iterator[Record]:
        while True:
            self.num_read += 1
            yield JsonLine("endless", "endless", b'{"text": "' + b"x" * prepare_module.BATCH_BYTES + b'"}')


@pytest.mark.usefixtures("in_process")
def test_reading_is_never_further_ahead_than_the_limit(tmp_path: Path, tokenizer_file: Path) -> None:
    shard = EndlessShard()
    job = ShardJob(tmp_path, tmp_path, 0, shard, np.dtype(np.uint16))
    pool = InProcessPool(1, None, None, (None, tokenizer_file, 0, np.dtype(np.uint16), 0.0))
    results = prepare_module._tokenized(pool, [job], tmp_path, max_waiting=4)  # type: ignore[arg-type]
    for num_results in range(1, 20):
        next(results)
        assert shard.num_read <= num_results + 4


def test_the_progress_line_says_amounts_speeds_and_time_left() -> None:
    first = PrepareProgress("x", Counts(documents=100, tokens=10**6, bytes=4 * 10**6), 1000, 5000)
    later = PrepareProgress("x", Counts(documents=300, tokens=3 * 10**6, bytes=12 * 10**6), 2000, 5000)
    text = describe(later, first, seconds=10.0)
    assert text == "300 documents (20/s) · 12.0 MB (0.80 MB/s) · 3.0 M tokens · 0:30 left"
    assert describe(first, first, seconds=0.0) == "100 documents · 4.0 MB · 1.0 M tokens"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("fraction", "left"), [(1e-9, "No document was held out for validation"), (0.999999, "All documents were held out")]
)
def test_one_document_is_not_divided(tmp_path: Path, tokenizer_file: Path, fraction: float, left: str) -> None:
    (tmp_path / "book.txt").write_text("one long text")
    manifest = prepare([str(tmp_path / "book.txt")], tmp_path / "store", tokenizer_file, validation_fraction=fraction)
    console = Console(record=True, width=200)
    print_summary(console, manifest, tmp_path / "store")
    said = " ".join(console.export_text().split())
    assert left in said
    assert "A single document is not divided: divide the text into several files, or into lines of JSON." in said
    other = {"No": ("validation", "larger"), "All": ("train", "smaller")}[left.split()[0]]
    with pytest.raises(
        ValueError, match=rf"has no split '{other[0]}'.*with a {other[1]} --validation-fraction, or with"
    ):
        open_store(tmp_path / "store").split(other[0])


@pytest.mark.usefixtures("in_process")
def test_the_table_has_a_line_for_each_set(corpus: list[str], tmp_path: Path, tokenizer_file: Path) -> None:
    manifest = prepare(corpus, tmp_path / "store", tokenizer_file)
    console = Console(record=True, width=80)
    print_summary(console, manifest, tmp_path / "store")
    lines = console.export_text().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    documents = {name: int(rows[name][0]) for name in ("A", "B", "C", "texts", "all")}
    assert documents["all"] == 75 == sum(documents.values()) - 75
    assert int(rows["all"][-1]) == manifest.splits["validation"].total.documents
    assert "Skipped 1 empty text file." in lines
