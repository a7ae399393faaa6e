"""Time and memory with which a rank opens a store of 300 billion tokens.

The store is made of sparse files, so it needs no space: 30 shards, 22 sets, 200 million documents.

    python benchmarks/data_start.py             # all documents in an order
    python benchmarks/data_start.py --split-sets  # with weights by set

The first line is of rank 0, which also looks for changed files. The others only check sizes.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sinklm.data import SampleOrder, SetWindows, TokenStore, TokenWindows, WeightedOrder, batch_indices
from sinklm.data.manifest import Counts, FileInfo, Manifest, Source, Split, TokenizerInfo, sha256_of
from sinklm.data.megatron import DTYPE_CODES, HEADER, MAGIC, VERSION
from sinklm.data.store import note_verified
from sinklm.data.tokenizer import train_tokenizer
from sinklm.files import write_json

NUM_TOKENS, NUM_DOCUMENTS = 300 * 10**9, 200 * 10**6
NUM_SHARDS, NUM_SETS = 30, 22
BATCH, TOKENS_PER_SAMPLE = 1024, 2048


def make_store(folder: Path, *, split_sets: bool) -> None:
    """Write a manifest and sparse files; all tokens are 0."""
    folder.mkdir()
    train_tokenizer(["a b"], vocab_size=258).save(str(folder / "tokenizer.json"))
    names = [f"set {i}" for i in range(NUM_SETS)]
    units = [[name] for name in names] if split_sets else [names]
    per_set = Counts(
        documents=NUM_DOCUMENTS // NUM_SHARDS // NUM_SETS, tokens=NUM_TOKENS // NUM_SHARDS // NUM_SETS, bytes=1
    )
    tokenizer_sha256 = sha256_of(folder / "tokenizer.json")
    files = {"tokenizer.json": FileInfo(bytes=(folder / "tokenizer.json").stat().st_size, sha256=tokenizer_sha256)}
    split = Split(total=Counts(), sets={name: Counts() for name in names}, shards=[])
    (folder / "train").mkdir()
    for number in range(NUM_SHARDS):
        for i, unit in enumerate(units):
            shard = f"train/{number:05d}.{i:02d}" if split_sets else f"train/{number:05d}"
            split.shards.append(shard)
            split.shard_sets[shard] = {name: per_set.model_copy() for name in unit}
            for name in unit:
                split.sets[name].add(per_set)
                split.total.add(per_set)
            num_documents = per_set.documents * len(unit)
            with open(folder / f"{shard}.idx", "wb") as index:
                index.write(
                    HEADER.pack(MAGIC, VERSION, DTYPE_CODES[np.dtype(np.uint16)], num_documents, num_documents + 1)
                )
                index.truncate(HEADER.size + num_documents * 20 + 8)
            with open(folder / f"{shard}.bin", "wb") as tokens:
                tokens.truncate(2 * per_set.tokens * len(unit))
            for suffix in (".idx", ".bin"):
                sha256 = hashlib.sha256(f"{shard}{suffix}".encode()).hexdigest()
                files[shard + suffix] = FileInfo(bytes=(folder / (shard + suffix)).stat().st_size, sha256=sha256)
    manifest = Manifest(
        tokenizer=TokenizerInfo(sha256=tokenizer_sha256, size=258, eod_id=0),
        dtype="uint16",
        validation_fraction=0,
        split_sets=split_sets,
        sources=[Source(name=f"{i:02d}.jsonl.zst", bytes=1) for i in range(NUM_SHARDS)],
        splits={"train": split},
        files=files,
    )
    write_json(folder / "manifest.json", manifest.model_dump())
    note_verified(folder, files)


def memory() -> float:
    """Largest resident memory of this process in MB (`getrusage` would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def open_as_rank(folder: Path, rank: int, *, split_sets: bool) -> None:
    """Open the store and read the first batch of step 100,000, as a rank of 8 does."""
    before, began = memory(), time.perf_counter()
    store = TokenStore(folder, verify="size" if rank else "auto")
    sizes = {"tokens_per_sample": TOKENS_PER_SAMPLE, "stride": TOKENS_PER_SAMPLE}
    if split_sets:
        weights = {name: float(1 + i) for i, name in enumerate(store.manifest.splits["train"].sets)}
        windows = SetWindows(store, "train", sorted(weights), **sizes)
        order = WeightedOrder(windows.num_windows, weights, 1234)
    else:
        windows = TokenWindows(store, "train", **sizes)
        order = SampleOrder(len(windows), 1234)
    opened = time.perf_counter()
    for number in order(batch_indices(100_000, BATCH, rank, 8)).tolist():
        windows[number]
    read = time.perf_counter()
    print(
        f"rank {rank}: {len(store.manifest.files)} files, {len(windows):,} samples; open {opened - began:.2f} s, "
        f"{BATCH // 8} samples {read - opened:.3f} s, memory +{memory() - before:.0f} MB (of {memory():.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split-sets", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.store:
        open_as_rank(options.store, options.rank, split_sets=options.split_sets)
        return
    folder = Path(tempfile.mkdtemp())
    try:
        make_store(folder / "store", split_sets=options.split_sets)
        used = sum(path.stat().st_blocks * 512 for path in (folder / "store").rglob("*"))
        size = sum(path.stat().st_size for path in (folder / "store").rglob("*"))
        print(f"{size / 1e9:,.0f} GB, of which {used / 1e6:.1f} MB are on disk")
        for rank in (0, 1):
            arguments = [*sys.argv[1:], "--store", str(folder / "store"), "--rank", str(rank)]
            subprocess.run([sys.executable, os.path.abspath(__file__), *arguments], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
