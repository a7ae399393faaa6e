"""What a user names as input (files, folders, patterns, a Hub data set), found and put in order."""

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
    """Shards in their order, and how many files of folders were left out, by suffix (or other reason)."""

    shards: list[Shard]
    num_ignored: Counter[str]


def find_inputs(names: list[str]) -> Inputs:
    """Expand the inputs of a command line, in their order; what a folder or a pattern holds is sorted by path.

    A name is a file, a folder (its files of known kinds, at any depth), a pattern (``src/**/*.c``; quote it) or a Hub
    data set (``EleutherAI/the_pile_deduplicated``, or ``owner/name:config``). A file of a kind not known is read as
    text. Text files that come behind each other form one shard, every other file one of its own.

    Raises:
        FileNotFoundError: a name is none of these.
        ValueError: a folder or pattern without a usable file, a file named twice, an archive.
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
            raise FileNotFoundError(f"{name}: no such file or folder")
    return Inputs(shards, num_ignored)


def _files_of_folder(folder: Path, num_ignored: Counter[str]) -> list[Path]:
    files = []
    for file in _without_double_links(folder.rglob("*"), num_ignored):
        if file.name.endswith(FOLDER_SUFFIXES) and not file.name.endswith(ARCHIVES):
            files.append(file)
        else:
            num_ignored[file.suffix or "no ending"] += 1
    if not files:
        raise ValueError(f"{folder}: no file in it ends in {' '.join(FOLDER_SUFFIXES)}; name others by a pattern")
    return files


def _files_of_pattern(pattern: str, num_ignored: Counter[str]) -> list[Path]:
    files = _without_double_links(map(Path, glob.iglob(pattern, recursive=True)), num_ignored)
    if not files:
        raise ValueError(f"{pattern}: no file matches this pattern")
    return files


def _without_double_links(paths: Iterable[Path], num_ignored: Counter[str]) -> list[Path]:
    """The files among the paths, sorted, without symbolic links to others of them."""
    files = sorted(path for path in paths if path.is_file())
    originals = {file.resolve() for file in files if not file.is_symlink()}
    chosen = [file for file in files if not (file.is_symlink() and file.resolve() in originals)]
    if len(chosen) < len(files):
        num_ignored["link to another of the files"] += len(files) - len(chosen)
    return chosen


def _add_files(shards: list[Shard], files: list[Path], seen: set[Path], set_name: str) -> None:
    for file in files:
        if file.resolve() in seen:
            raise ValueError(f"{file}: named twice among the inputs; its documents would be counted double")
        seen.add(file.resolve())
        if file.name.endswith(ARCHIVES):
            raise ValueError(f"{file}: cannot be read; give {', '.join(JSON_LINES_SUFFIXES)}, parquet or text files")
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
    """All documents of the shards, in this process.

    Raises:
        ValueError: a record is no document, or a shard has none.
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
    """The error for a shard that turns out empty."""
    if isinstance(shard, TextShard):
        others = f" and {len(shard.files) - 1} text files behind it" if len(shard.files) > 1 else ""
        return ValueError(f"{shard.files[0][0]}{others}: empty, there is no document in it")
    return ValueError(f"{getattr(shard, 'path', shard.name)}: empty, there is no document in it")


def _fixed_folder(pattern: str) -> Path:
    """The folder a pattern starts from: its part before the first component with a wildcard."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]).resolve()


def hub_shards(name: str) -> list[Shard]:
    """The train split of a Hub data set (or of a local folder that ``datasets`` can load), a shard for each file."""
    from datasets import load_dataset

    match = HUB_NAME.fullmatch(name)
    path, config = match.groups() if match else (name, None)
    try:
        dataset = load_dataset(path, config, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: no such file or folder, and no data set that can be loaded ({error})") from error
    count = dataset.num_shards
    return [HubShard(dataset.shard(count, i), f"{name}, file {i + 1} of {count}", name) for i in range(count)]
