"""Finds the inputs named on a command line: files, folders, patterns and Hub data sets."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..hub import find_on_hub, near_path_hint
from .compression import has_checksum
from .readers import (
    FOLDER_SUFFIXES,
    JSON_LINES_SUFFIXES,
    PARQUET_SUFFIX,
    HubShard,
    JsonLinesShard,
    ParquetShard,
    Shard,
    TextShard,
    stem,
)
from .records import TEXT_KEY, Document

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
# Files whose content is not text, by the remedy. Compressed JSON lines are recognised before these.
ARCHIVES = (".tar", ".tar.gz", ".tar.zst", ".tgz", ".zip", ".7z", ".rar")
OTHER_COMPRESSION = (".gz", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".zstd")
TABLES = (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".msgpack", ".npy", ".npz", ".h5")
MEGATRON_FILES = (".bin", ".idx")
REFUSED = (*ARCHIVES, *OTHER_COMPRESSION, *TABLES, *MEGATRON_FILES)


class Inputs(NamedTuple):
    """The shards in order, and the number of files ignored, by suffix or by another reason."""

    shards: list[Shard]
    num_ignored: Counter[str]

    def without_checksum(self) -> list[str]:
        """Return the names of the compressed files in which damage may go unnoticed."""
        files = [shard for shard in self.shards if isinstance(shard, JsonLinesShard)]
        return [shard.name for shard in files if not has_checksum(shard.path)]


def find_inputs(names: list[str], *, text_key: str = TEXT_KEY) -> Inputs:
    """Expand the inputs of a command line into shards.

    A name is a file, a folder (its files of known types, at any depth), a pattern (``src/**/*.c``;
    quote it) or a Hub data set (``EleutherAI/the_pile_deduplicated`` or ``owner/name:config``).
    Inputs keep their order; the files of a folder or pattern are sorted by path. Links are
    followed, and hidden files of a folder are left out. A file of an unknown type is read as text.
    Consecutive text files form one shard; every other file is one shard. ``text_key`` is the key or
    column of the text in JSON lines, parquet files and data sets. Suffixes may be in upper case.

    Raises:
        FileNotFoundError: a name is none of these.
        PermissionError: a folder in a folder cannot be read.
        ValueError: a folder or pattern has no usable file, a file is named twice, also once
            compressed and once not, or a file is of a type that contains no plain text, such as an
            archive.
    """
    shards: list[Shard] = []
    seen: set[Path] = set()
    unpacked: dict[Path, Path] = {}
    num_ignored: Counter[str] = Counter()

    def add(files: list[Path], set_name: str) -> None:
        for file in files:
            if file.resolve() in seen:
                raise ValueError(f"{file}: given twice as input, so its documents would be duplicated; name it once")
            seen.add(file.resolve())
            if (other := unpacked.setdefault(_without_compression(file), file)) != file:
                raise ValueError(
                    f"{file}: by its name it is {other} in another compression, so its documents would be "
                    "duplicated; use one of the two, or rename one if they differ"
                )
            _add_file(shards, file, set_name, text_key)

    for name in names:
        path = Path(name)
        if path.is_dir():
            add(_files_of_folder(path, num_ignored), path.resolve().name)
        elif path.is_file():
            add([path], stem(path))
        elif glob.has_magic(name):
            add(_files_of_pattern(name, num_ignored), _fixed_folder(name).name)
        elif HUB_NAME.fullmatch(name) and not name.lower().endswith((*FOLDER_SUFFIXES, ".json", *REFUSED)):
            shards.extend(hub_shards(name, text_key))
        else:
            raise FileNotFoundError(f"{name}: no such file or folder; {near_path_hint(name) or 'check the path'}")
    return Inputs(shards, num_ignored)


def _files_of_folder(folder: Path, num_ignored: Counter[str]) -> list[Path]:
    files = []
    for file in _existing(_walk(folder, num_ignored), num_ignored):
        name = file.name.lower()
        if name.endswith(FOLDER_SUFFIXES) and not _is_refused(name):
            files.append(file)
        else:
            num_ignored[file.suffix or "no suffix"] += 1
    if not files:
        raise ValueError(
            f"{folder}: contains no file that ends in {' '.join(FOLDER_SUFFIXES)}; "
            "use a pattern to select files of other types"
        )
    return _each_once(files, num_ignored)


def _walk(folder: Path, num_ignored: Counter[str]) -> Iterator[Path]:
    """Yield the paths in a folder at any depth, except hidden ones. Links to folders are followed.

    Each real folder is read once, under its own name rather than that of a link to it.
    """
    entered: set[str] = set()
    waiting = [str(folder)]  # linked folders come last
    for start in waiting:
        for parent, folders, files in os.walk(start, onerror=_raise):
            if (real := os.path.realpath(parent)) in entered:
                folders.clear()
                continue
            entered.add(real)
            if hidden := [name for name in [*folders, *files] if name.startswith(".")]:
                num_ignored["hidden"] += len(hidden)
            folders[:] = sorted(set(folders).difference(hidden))
            waiting += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield from (Path(parent, name) for name in set(files).difference(hidden))


def _raise(error: OSError) -> NoReturn:
    raise error


def _files_of_pattern(pattern: str, num_ignored: Counter[str]) -> list[Path]:
    files = _existing(map(Path, glob.iglob(pattern, recursive=True)), num_ignored)
    if not (chosen := _each_once(files, num_ignored)):
        raise ValueError(f"{pattern}: no file matches this pattern; check the path and quote the pattern")
    return chosen


def _existing(paths: Iterable[Path], num_ignored: Counter[str]) -> Iterator[Path]:
    """Yield the files among ``paths``, and count the links to nothing."""
    for path in paths:
        if path.is_file():
            yield path
        elif not path.exists():
            num_ignored["broken link"] += 1


def _each_once(files: Iterable[Path], num_ignored: Counter[str]) -> list[Path]:
    """Return the files, sorted, each under the path with the fewest links."""
    paths: dict[Path, list[Path]] = {}
    for file in files:
        paths.setdefault(file.resolve(), []).append(file)
    chosen = sorted(min(same, key=lambda path: (_num_links(path), path)) for same in paths.values())
    if num_others := sum(map(len, paths.values())) - len(chosen):
        num_ignored["link to another input file"] += num_others
    return chosen


def _num_links(path: Path) -> int:
    return sum(part.is_symlink() for part in (path, *path.parents))


def _without_compression(file: Path) -> Path:
    is_packed = file.suffix.lower() in (".gz", ".zst")
    return file.parent.resolve() / (file.stem if is_packed else file.name)


def _add_file(shards: list[Shard], file: Path, set_name: str, text_key: str) -> None:
    name = file.name.lower()
    if _is_refused(name):
        raise ValueError(f"{file}: this file type is not supported; {_remedy(file)}")
    if name.endswith(JSON_LINES_SUFFIXES):
        shards.append(JsonLinesShard(file, text_key))
    elif name.endswith(PARQUET_SUFFIX):
        shards.append(ParquetShard(file, text_key))
    else:
        last = shards[-1] if shards else None
        if not isinstance(last, TextShard):
            last = TextShard(set_name, text_key)
            shards.append(last)
        last.add(file, set_name)


def _is_refused(name: str) -> bool:
    return name.endswith(ARCHIVES) or (name.endswith(REFUSED) and not name.endswith(JSON_LINES_SUFFIXES))


def _remedy(file: Path) -> str:
    """Return what to do with a file that is refused."""
    name = file.name.lower()
    if name.endswith(ARCHIVES):
        return "unpack it and name the folder"
    if name.endswith(OTHER_COMPRESSION):
        tool = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lz4": "lz4"}.get(file.suffix.lower())
        command = f": {tool} -dk {file}" if tool else ""
        return f"decompress it{command} (only JSON lines may be compressed, as .jsonl.gz or .jsonl.zst)"
    if name.endswith(MEGATRON_FILES):
        return "it is tokenized already, so it needs no `sinklm prepare`"
    return f"convert it to JSON lines ({JSON_LINES_SUFFIXES[0]}) or parquet with a column of text"


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


def hub_shards(name: str, text_key: str = TEXT_KEY) -> list[Shard]:
    """Return one shard for each file of a data set's train split.

    Args:
        name: Hub name, ``owner/name:config``, or a local folder that ``datasets`` can load.
        text_key: the column of the text.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: ``datasets`` cannot load it.
    """
    match = HUB_NAME.fullmatch(name)
    path, config = match.groups() if match else (name, None)
    source = find_on_hub(path, "dataset") if match else path
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, config, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: no such file or folder, and it could not be loaded as a Hub data set ({error})"
        ) from error
    count = dataset.num_shards
    return [HubShard(dataset.shard(count, i), f"{name}, file {i + 1} of {count}", name, text_key) for i in range(count)]
