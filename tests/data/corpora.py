"""Small corpora for the tests, and the stores expected from them."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import zstandard
from tokenizers import Tokenizer

from sinklm.data import MegatronReader
from sinklm.data.manifest import Manifest

WORDS = ["sink", "token", "window", "the", "a", "of", "cache", "naïve", "漢字", "🙂", "\n", "  ", "def f(x):", "3.14"]


def random_text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) * rng.randrange(2) for _ in range(num_words))


def records(seed: int, count: int, num_words: int = 60, set_names: tuple[str, ...] = ("A", "B")) -> list[dict]:
    """Records in the Pile's form."""
    rng = random.Random(seed)
    texts = [random_text(rng, rng.randrange(1, num_words)) for _ in range(count)]
    return [{"text": text, "meta": {"pile_set_name": rng.choice(set_names)}} for text in texts]


def write_json_lines(path: Path, rows: list[dict]) -> Path:
    """Write ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst`` (several frames), by the suffix."""
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    if path.suffix == ".zst":
        middle = len(lines) // 2
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        path.write_bytes(b"".join(compressor.compress(b"".join(part)) for part in (lines[:middle], lines[middle:])))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(b"".join(lines)))
    else:
        path.write_bytes(b"".join(lines))
    return path


def expected_documents(texts: list[str], tokenizer_file: Path) -> list[list[int]]:
    """Reference: encode each text as a whole and append the end-of-document id 0."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in texts]


def stored_documents(store: Path, manifest: Manifest, split: str) -> list[list[int]]:
    """All documents of a split, read through the indexes."""
    if split not in manifest.splits:
        return []
    readers = [MegatronReader(store / shard) for shard in manifest.splits[split].shards]
    return [np.asarray(reader[i]).tolist() for reader in readers for i in range(len(reader))]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, except the record of verified files."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".verified.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
