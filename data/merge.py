"""Joins finished token stores into one, without copying tokens."""

import errno
import os
from pathlib import Path

from ..files import atomic_file, locked, partial_name, sync_folder, write_json
from .manifest import MANIFEST_NAME, TOKENIZER_NAME, Counts, FileInfo, Manifest, Split
from .store import TokenStore, note_verified

SAME = ("tokenizer", "dtype", "validation_fraction", "text_key", "split_sets")  # settings that must agree
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
LOCK_NAME = ".merge.lock"


def merge_stores(paths: list[Path], output: Path) -> Manifest:
    """Join stores, in this order, into the store that one preparation of all their inputs makes.

    The new store consists of hard links to the files of the others, which stay as they are. If
    every input is a file of JSON lines or parquet, it is the same, byte for byte, as that of one
    preparation, and so is its fingerprint. (Text files that follow each other form one shard only
    within a preparation.)

    After an interruption, call it again with the same arguments. If it was done, nothing changes.

    Args:
        paths: folders of finished stores. Files changed since they were last verified are read.
        output: the new folder, on the same file system.

    Raises:
        ValueError: the output exists, a store is named twice, or the stores were made with
            different settings.
        OSError: a store is not readable, or hard links to it are not possible.
    """
    stores = [TokenStore(path) for path in paths]
    _check_alike(stores)
    manifest = _joined([store.manifest for store in stores])
    if (output / MANIFEST_NAME).exists() and TokenStore(output).fingerprint == manifest.fingerprint:
        return manifest  # it is done
    _check_no_store(output)
    links = _links(stores, output)
    _check_contents(output, links, stores[0].tokenizer_path)
    output.mkdir(parents=True, exist_ok=True)
    lock = output / LOCK_NAME
    with locked(lock, busy=f"{output}: another `sinklm data merge` writes it; wait for it or stop it"):
        _check_no_store(output)
        _check_contents(output, links, stores[0].tokenizer_path)
        for target, source in links.items():
            _link(source, target)
        with atomic_file(output / TOKENIZER_NAME, binary=True) as file:
            file.write(stores[0].tokenizer_path.read_bytes())
        for folder in {target.parent for target in links} | {output}:
            sync_folder(folder)
        write_json(output / MANIFEST_NAME, manifest.model_dump(), ensure_ascii=False)
        sync_folder(output)
        note_verified(output, manifest.files)
        lock.unlink()
    return manifest


def _check_no_store(output: Path) -> None:
    if (output / MANIFEST_NAME).exists():
        raise ValueError(f"{output}: exists already and is a token store; choose another folder")


def _check_alike(stores: list[TokenStore]) -> None:
    """Check that no store is named twice, and that all have the same settings."""
    seen: dict[str, Path] = {}
    for store in stores:
        if store.fingerprint in seen:
            raise ValueError(
                f"{store.path}: is the same store as {seen[store.fingerprint]}, named before; name each store once"
            )
        seen[store.fingerprint] = store.path
    first = stores[0]
    for store in stores:
        for key in SAME:
            if (theirs := getattr(store.manifest, key)) != (ours := getattr(first.manifest, key)):
                raise ValueError(
                    f"{store.path}: was prepared with other settings than {first.path} ({key}: {theirs} and {ours}); "
                    "prepare it again with the same"
                )


def _links(stores: list[TokenStore], output: Path) -> dict[Path, Path]:
    """Return the source of each file of the new store, except its tokenizer and manifest."""
    links, offset = {}, 0
    for store in stores:
        for name in store.manifest.files:
            if name != TOKENIZER_NAME:
                links[output / _renumbered(name, offset)] = (store.path / name).resolve()
        offset += len(store.manifest.sources)
    return links


def _check_contents(output: Path, links: dict[Path, Path], tokenizer: Path) -> None:
    """Check that the output has nothing but what an interrupted merge of these stores left."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is not a folder; choose another")
    unfinished = {output / partial_name(name) for name in (TOKENIZER_NAME, MANIFEST_NAME)} | {output / LOCK_NAME}
    for path in output.rglob("*"):
        if path.is_symlink():
            is_ours = False
        elif path in links:
            is_ours = path.samefile(links[path])
        elif path == output / TOKENIZER_NAME:
            is_ours = path.read_bytes() == tokenizer.read_bytes()
        else:
            is_ours = path.is_dir() or path in unfinished
        if not is_ours:
            raise ValueError(
                f"{output}: contains {path.relative_to(output)}, which is not part of an unfinished merge of "
                "these stores; choose another folder, or delete it"
            )


def _link(source: Path, target: Path) -> None:
    if target.exists():  # compared by `_check_contents`
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise OSError(
            f"{target}: cannot be made a hard link to {source} ({os.strerror(error.errno)}); copy the store to the "
            f"file system of the output first (`cp -rL STORE {target.parents[1].absolute().parent}`), and merge "
            "the copy"
        ) from error


def _joined(manifests: list[Manifest]) -> Manifest:
    first = manifests[0]
    splits: dict[str, Split] = {}
    files: dict[str, FileInfo] = {TOKENIZER_NAME: first.files[TOKENIZER_NAME]}
    offset = 0
    for manifest in manifests:
        for name, info in manifest.files.items():
            if name != TOKENIZER_NAME:
                files[_renumbered(name, offset)] = info
        for name, split in manifest.splits.items():
            joined = splits.setdefault(name, Split(total=Counts(), sets={}, shards=[]))
            joined.total.add(split.total)
            for set_name, counts in split.sets.items():
                joined.sets.setdefault(set_name, Counts()).add(counts)
            joined.shards += [_renumbered(shard, offset) for shard in split.shards]
            joined.shard_sets |= {_renumbered(shard, offset): sets for shard, sets in split.shard_sets.items()}
        offset += len(manifest.sources)
    if any(len(split.shard_sets) != len(split.shards) for split in splits.values()):  # one of an older version
        for split in splits.values():
            split.shard_sets = {}
    return Manifest(
        **{key: getattr(first, key) for key in SAME},
        sources=[source for manifest in manifests for source in manifest.sources],
        splits={name: splits[name] for name in sorted(splits)},
        files=files,
    )


def _renumbered(name: str, offset: int) -> str:
    """Return the path of a shard's file, ``train/00003…``, with its number raised."""
    folder, _, file = name.rpartition("/")
    number, dot, rest = file.partition(".")
    if not number.isdecimal() or int(number) + offset > 99999:
        raise ValueError(f"{name}: not the name of a shard, or more than 100,000 shards in all")
    return f"{folder}/{int(number) + offset:05d}{dot}{rest}"
