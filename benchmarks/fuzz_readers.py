"""Give damaged files to every reader, and report what is not refused in one line.

    python benchmarks/fuzz_readers.py --seconds 600 --output findings.json [READER ...]

Valid files are mutated at random: bytes and numbers are replaced, parts are removed, repeated and
moved. A reader may succeed, or raise a ValueError or OSError. Everything else is a finding: another
exception, a message of several lines, more than 20 s or 6 GB for one input, or the end of the
process. Inputs that cause findings are kept in the folder given with --keep.
"""

import argparse
import gzip
import json
import math
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
import zstandard

MEMORY, SECONDS = 6 * 2**30, 20.0  # limits for one input
NUMBERS = ("0", "-1", "1", "2147483648", "18446744073709551615", "1e308", "NaN", "Infinity", "-0.5", "1" * 400, "null")
PIECES = (
    "[",
    "]",
    "{",
    "}",
    '"',
    ",",
    ":",
    "\n",
    "\0",
    "null",
    "true",
    '"a"',
    "[[[[",
    "{}",
    "&a",
    "*a",
    "!!",
    "- ",
    "é",
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Reader(NamedTuple):
    """A reader: the file to mutate, and a function that reads it."""

    file: Path
    read: Callable[[], object]
    is_text: bool = True


def mutate(data: bytes, chance: random.Random, *, is_text: bool) -> bytes:
    """Return a copy of ``data`` with one to four random changes."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        change = chance.choice(TEXT_CHANGES if is_text else BINARY_CHANGES)
        data = change(data, chance)
    return data


def _replace_number(data: bytes, chance: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?(e-?\d+)?", data))
    if not found:
        return data
    match = chance.choice(found)
    return data[: match.start()] + chance.choice(NUMBERS).encode() + data[match.end() :]


def _insert_piece(data: bytes, chance: random.Random) -> bytes:
    i = chance.randrange(len(data) + 1)
    return data[:i] + chance.choice(PIECES).encode() * chance.choice((1, 1, 1, 3000)) + data[i:]


def _flip_bit(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return data
    i = chance.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << chance.randrange(8))]) + data[i + 1 :]


def _set_bytes(data: bytes, chance: random.Random) -> bytes:
    """Overwrite up to 8 bytes, mostly near the beginning, where headers are."""
    i = chance.randrange(min(len(data), chance.choice((16, 64, 10**9))) + 1)
    new = chance.choice((b"\0", b"\xff", b"\x7f")) * chance.choice((1, 4, 8))
    return data[:i] + new + data[i + len(new) :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _remove(data: bytes, chance: random.Random) -> bytes:
    i = chance.randrange(len(data) + 1)
    return data[:i] + data[i + chance.choice((1, 4, 50, 1000)) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    i, length = chance.randrange(len(data) + 1), chance.choice((1, 8, 100))
    return data[:i] + data[i : i + length] * chance.choice((2, 50)) + data[i + length :]


def _move(data: bytes, chance: random.Random) -> bytes:
    i, j, length = chance.randrange(len(data) + 1), chance.randrange(len(data) + 1), chance.choice((4, 30))
    return data[:j] + data[i : i + length] + data[j:]


BINARY_CHANGES = (_flip_bit, _set_bytes, _set_bytes, _cut, _remove, _repeat, _move)
TEXT_CHANGES = (_replace_number, _replace_number, _insert_piece, _flip_bit, _cut, _remove, _repeat, _move)


def make_readers(folder: Path) -> dict[str, Reader]:
    """Write a valid file for each reader."""
    from sinklm.checkpoints import load_model, load_tokenizer
    from sinklm.checkpoints.folders import CheckpointState, read_state
    from sinklm.data import MegatronReader, open_store
    from sinklm.data.inputs import find_inputs, read_documents
    from sinklm.streaming.chat import TemplateTurns
    from sinklm.train.recipe import load_config

    model, store = _small_model(folder / "model"), _store(folder)
    template, recipe = folder / "template.jinja", folder / "recipe.yaml"
    template.write_text(TEMPLATE)
    recipe.write_text(yaml.safe_dump(load_config("pythia-14m").model_dump()))
    (folder / "state.json").write_text(CheckpointState(1, 1, "a", 1, 1, "bf16").to_json())
    text = (folder / "text.jsonl").read_bytes()
    (folder / "text.jsonl.zst").write_bytes(zstandard.compress(text))
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(text))
    _write_parquet(text, folder / "text.parquet")
    index = next(store.rglob("*.idx"))

    def chat() -> None:
        tokenizer.chat_template = template.read_text(errors="replace")
        TemplateTurns(tokenizer).first("hello", "system")

    def documents(name: str) -> Callable[[], object]:
        return lambda: sum(1 for _ in read_documents(find_inputs([str(folder / name)]).shards))

    def sequences() -> list:
        reader = MegatronReader(index.with_suffix(""))
        return [reader[i].sum() for i in range(len(reader))]

    tokenizer = load_tokenizer(model)
    return {
        "recipe": Reader(recipe, lambda: load_config(str(recipe))),
        "config.json": Reader(model / "config.json", lambda: load_model(model, device="cpu")),
        "model.safetensors": Reader(model / "model.safetensors", lambda: load_model(model, device="cpu"), False),
        "tokenizer.json": Reader(model / "tokenizer.json", lambda: load_tokenizer(model)("a text of 7 words")),
        "tokenizer_config.json": Reader(model / "tokenizer_config.json", lambda: load_tokenizer(model)("a text")),
        "chat template": Reader(template, chat),
        "state.json": Reader(folder / "state.json", lambda: read_state(folder)),
        "manifest.json": Reader(store / "manifest.json", lambda: open_store(store, verify="size")),
        ".idx": Reader(index, sequences, False),
        ".jsonl": Reader(folder / "text.jsonl", documents("text.jsonl")),
        ".jsonl.zst": Reader(folder / "text.jsonl.zst", documents("text.jsonl.zst"), False),
        ".jsonl.gz": Reader(folder / "text.jsonl.gz", documents("text.jsonl.gz"), False),
        ".parquet": Reader(folder / "text.parquet", documents("text.parquet"), False),
    }


def _small_model(folder: Path) -> Path:
    """Write a model of few weights with a tokenizer of 400 tokens."""
    from sinklm.data.tokenizer import tokenizer_size, train_tokenizer
    from sinklm.models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM

    tokenizer = train_tokenizer([Path(__file__).read_text()], 400)
    size = tokenizer_size(tokenizer)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = SinkGPTNeoXConfig(vocab_size=size + 8, **sizes, sink={"kind": "token", "first_token_id": size})
    SinkGPTNeoXForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 128}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _store(folder: Path) -> Path:
    from sinklm.data import find_inputs, prepare_store

    rows = ({"text": f"text {i} " * 9, "meta": {"pile_set_name": "Books"}} for i in range(50))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards = find_inputs([str(folder / "text.jsonl")]).shards
    tokenizer = str(folder / "model" / "tokenizer.json")
    prepare_store(shards, folder / "store", tokenizer=tokenizer, validation_fraction=0.1, num_processes=1)
    return folder / "store"


def _write_parquet(jsonl: bytes, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in jsonl.splitlines()]), path)


def problem(read: Callable[[], object]) -> str | None:
    """Read once and return what is wrong with the outcome, None if nothing is."""
    try:
        read()
    except (ValueError, OSError) as error:
        lines = str(error).splitlines()
        is_list = all(re.match(r"[\w.]+( is |: )|unknown key ", line) for line in lines)  # of mistakes in a recipe
        if not lines or (len(lines) > 1 and not is_list):
            return f"{type(error).__name__} of {len(lines)} lines: {str(error)[:200]}"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
    return None


def work(name: str, seed: int, folder: Path, state: list, seconds: float, keep: Path) -> None:
    """Mutate and read until the time is over, in a process of its own."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    reader, chance = make_readers(folder)[name], random.Random(seed)
    valid, end = reader.file.read_bytes(), time.monotonic() + seconds
    if found := problem(reader.read):
        raise RuntimeError(f"{name}: the valid file is refused: {found}")
    num_tried, begun, findings = state
    while time.monotonic() < end:
        data = mutate(valid, chance, is_text=reader.is_text)
        reader.file.write_bytes(data)
        begun.value = time.monotonic()
        found = problem(reader.read)
        begun.value = 0.0
        num_tried.value += 1
        if found and found not in findings:
            findings[found] = _keep(data, name, keep)


def _keep(data: bytes, name: str, keep: Path) -> str:
    keep.mkdir(parents=True, exist_ok=True)
    path = keep / f"{name.strip('.').replace(' ', '-')}-{abs(hash(data)):x}"
    path.write_bytes(data)
    return str(path)


def fuzz(name: str, seconds: float, keep: Path, first_seed: int) -> dict:
    """Fuzz one reader; start another process after each hang or crash."""
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        num_tried, findings = context.Value("q", 0), manager.dict()
        started, seed = time.monotonic(), first_seed
        while (left := seconds - (time.monotonic() - started)) > 0:
            begun = context.Value("d", 0.0)
            with tempfile.TemporaryDirectory() as folder:
                state = [num_tried, begun, findings]
                process = context.Process(target=work, args=(name, seed, Path(folder), state, left, keep))
                process.start()
                while process.is_alive() and time.monotonic() - (begun.value or math.inf) < SECONDS:
                    process.join(0.2)
                is_hanging = process.is_alive()
                process.kill()
                process.join()
                if is_hanging or process.exitcode:
                    what = f"more than {SECONDS:.0f} s" if is_hanging else f"exit status {process.exitcode}"
                    files = [path for path in Path(folder).rglob("*") if path.is_file()]
                    newest = max(files, key=lambda path: path.stat().st_mtime)
                    findings[what] = _keep(newest.read_bytes(), name, keep)
            seed += 1
        elapsed = time.monotonic() - started
        return {"reader": name, "inputs": num_tried.value, "seconds": round(elapsed), "findings": dict(findings)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="names of readers; default: all")
    parser.add_argument("--seconds", type=float, default=60, help="time for each reader")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--seed", type=int, default=0, help="of the changes; another one gives other inputs")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for inputs with findings")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        names = list(make_readers(Path(folder)))
    results = []
    for name in arguments.readers or names:
        results.append(fuzz(name, arguments.seconds, arguments.keep, arguments.seed))
        print(json.dumps(results[-1]), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(result["findings"] for result in results))


if __name__ == "__main__":
    main()
