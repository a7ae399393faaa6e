"""Finds the inputs named on a command line: files, folders, patterns and Hub data sets."""

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .readers import (
    FOLDER_SUFFIXES,
    JSON_LINES_SUFFIXES,
    PARQUET_SUFFIX,
    Document,
    HubShard,
    JsonLinesShard,
    ParquetShard,
    Shard,
    TextShard,
    stem,
)

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
ARCHIVES = (".tar", ".tar.gz", ".tar.zst", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".json", ".arrow", ".bin", ".idx")


class Inputs(NamedTuple):
    """The shards in order, and the number of files ignored, by suffix or by another reason."""

    shards: list[Shard]
    num_ignored: Counter[str]


def find_inputs(names: list[str]) -> Inputs:
    """Expand the inputs of a command line into shards.

    A name is a file, a folder (its files of known types, at any depth), a pattern (``src/**/*.c``;
    quote it) or a Hub data set (``EleutherAI/the_pile_deduplicated`` or ``owner/name:config``).
    Inputs keep their order; the files of a folder or pattern are sorted by path. A file of an
    unknown type is read as text. Consecutive text files form one shard; every other file is one
    shard.

    Raises:
        FileNotFoundError: a name is none of these.
        ValueError: a folder or pattern has no usable file, a file is named twice, or a file is an
            archive.
    """
    shards: list[Shard] = []
    seen: set[Path] = set()
    num_ignored: Counter[str] = Counter()
    for name in names:
        path = Path(name)
        if path.is_dir():
            _add_files(shards, _files_of_folder(path, num_ignored), seen, set_name=path.resolve().name)
        elif path.is_file():
            _add_files(shards, [path], seen, set_name=stem(path))
        elif glob.has_magic(name):
            _add_files(shards, _files_of_pattern(name, num_ignored), seen, set_name=_fixed_folder(name).name)
        elif HUB_NAME.fullmatch(name) and not name.endswith((*FOLDER_SUFFIXES, *ARCHIVES)):
            shards.extend(hub_shards(name))
        else:
            raise FileNotFoundError(f"{name}: no such file or folder; check the path")
    return Inputs(shards, num_ignored)


def _files_of_folder(folder: Path, num_ignored: Counter[str]) -> list[Path]:
    files = []
    for file in _without_double_links(folder.rglob("*"), num_ignored):
        if file.name.endswith(FOLDER_SUFFIXES) and not file.name.endswith(ARCHIVES):
            files.append(file)
        else:
            num_ignored[file.suffix or "no suffix"] += 1
    if not files:
        raise ValueError(
            f"{folder}: contains no file that ends in {' '.join(FOLDER_SUFFIXES)}; "
            "use a pattern to select files of other types"
        )
    return files


def _files_of_pattern(pattern: str, num_ignored: Counter[str]) -> list[Path]:
    files = _without_double_links(map(Path, glob.iglob(pattern, recursive=True)), num_ignored)
    if not files:
        raise ValueError(f"{pattern}: no file matches this pattern; check the path and quote the pattern")
    return files


def _without_double_links(paths: Iterable[Path], num_ignored: Counter[str]) -> list[Path]:
    """Return the sorted files of ``paths``, without symbolic links to other files among them."""
    files = sorted(path for path in paths if path.is_file())
    originals = {file.resolve() for file in files if not file.is_symlink()}
    chosen = [file for file in files if not (file.is_symlink() and file.resolve() in originals)]
    if len(chosen) < len(files):
        num_ignored["link to another input file"] += len(files) - len(chosen)
    return chosen


def _add_files(shards: list[Shard], files: list[Path], seen: set[Path], set_name: str) -> None:
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"{file}: given twice as input, so its documents would be duplicated; name it once")
        seen.add(file.resolve())
        if file.name.endswith(ARCHIVES):
            raise ValueError(
                f"{file}: this file type is not supported; use {', '.join(JSON_LINES_SUFFIXES)}, parquet or text files"
            )
        if file.name.endswith(JSON_LINES_SUFFIXES):
            shards.append(JsonLinesShard(file))
        elif file.name.endswith(PARQUET_SUFFIX):
            shards.append(ParquetShard(file))
        else:
            last = shards[-1] if shards else None
            if not isinstance(last, TextShard):
                last = TextShard(set_name)
                shards.append(last)
            last.add(file, set_name)


def read_documents(shards: list[Shard]) -> Iterator[Document]:
    """Yield all documents of the shards, in this process.

    Raises:
        ValueError: a record is not a document, or a shard contains no document.
    """
    for shard in shards:
        is_empty = True
        for record in shard.read():
            if document := record.document():
                is_empty = False
                yield document
        if is_empty:
            raise no_document(shard)


def no_document(shard: Shard) -> ValueError:
    """Return the error for a shard without documents."""
    if isinstance(shard, TextShard):
        others = f" and the {len(shard.files) - 1} text files after it" if len(shard.files) > 1 else ""
        return ValueError(f"{shard.files[0][0]}{others}: contains no documents; remove it from the inputs")
    return ValueError(f"{getattr(shard, 'path', shard.name)}: contains no documents; remove it from the inputs")


def _fixed_folder(pattern: str) -> Path:
    """Return the part of a pattern before the first component with a wildcard."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]).resolve()


def hub_shards(name: str) -> list[Shard]:
    """Return one shard for each file of a data set's train split.

    Args:
        name: Hub name, ``owner/name:config``, or a local folder that ``datasets`` can load.

    Raises:
        ValueError: ``datasets`` cannot load it.
    """
    from datasets import load_dataset

    match = HUB_NAME.fullmatch(name)
    path, config = match.groups() if match else (name, None)
    try:
        dataset = load_dataset(path, config, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: no such file or folder, and it could not be loaded as a Hub data set ({error})"
        ) from error
    count = dataset.num_shards
    return [HubShard(dataset.shard(count, i), f"{name}, file {i + 1} of {count}", name) for i in range(count)]
