"""Joins finished token stores into one, without copying tokens."""

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

from ..files import write_json
from .manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Counts, FileInfo, Manifest, Split
from .store import VERIFIED_NAME, TokenStore, note_verified

SAME = ("tokenizer", "dtype", "validation_fraction", "text_key", "split_sets")  # settings that must agree
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


def merge_stores(paths: list[Path], output: Path) -> Manifest:
    """Join stores, in this order, into the store that one preparation of all their inputs makes.

    The files move to the new store, and the other stores are deleted when it is complete. (With
    hard links between them, deleting a store would change the change times of the others' files, so
    these would be verified again, see `note_verified`.) If every input is a file of JSON lines or
    parquet, the new store is the same, byte for byte, as that of one preparation, and so is its
    fingerprint. (Text files that follow each other form one shard only within a preparation.)

    After an interruption, call it again with the same arguments: until the new store is complete,
    the others are unchanged.

    Args:
        paths: folders of finished stores. Files changed since they were last verified are read.
        output: the new folder, on the same file system.

    Raises:
        ValueError: the stores were made with different settings, or hold the same documents.
        OSError: a store is not readable, or hard links to it are not possible.
    """
    if output.exists() and any(output.iterdir()) and not (output / f".{MANIFEST_NAME}.merging").exists():
        raise ValueError(f"{output}: is not empty; choose another folder")
    stores = [TokenStore(path) for path in paths]
    _check_alike(stores)
    manifest = _joined([store.manifest for store in stores])
    output.mkdir(parents=True, exist_ok=True)
    marker = output / f".{MANIFEST_NAME}.merging"
    marker.touch()
    offset = 0
    for store in stores:
        for name in store.manifest.files:
            if name != TOKENIZER_NAME:
                _link(store.path / name, output / _renumbered(name, offset))
        offset += len(store.manifest.sources)
    shutil.copyfile(stores[0].tokenizer_path, output / TOKENIZER_NAME)
    write_json(output / MANIFEST_NAME, manifest.model_dump(), ensure_ascii=False)
    for store in stores:
        _delete(store)
    note_verified(output, manifest.files)
    marker.unlink()
    return manifest


def _check_alike(stores: list[TokenStore]) -> None:
    """Check that all stores have the same settings and no documents in common."""
    first = stores[0]
    owners: dict[str, str] = {}
    for path, times in Counter(store.path.resolve() for store in stores).items():
        if times > 1:
            raise ValueError(f"{path}: is named {times} times, so its documents would be repeated; name it once")
    for store in stores:
        for key in SAME:
            if (theirs := getattr(store.manifest, key)) != (ours := getattr(first.manifest, key)):
                raise ValueError(
                    f"{store.path}: was prepared with other settings than {first.path} ({key}: {theirs} and {ours}); "
                    "prepare it again with the same"
                )
        for name, info in store.manifest.files.items():
            if name.endswith(".bin"):
                place = f"{store.path}/{name}"
                if (other := owners.setdefault(info.sha256, place)) != place:
                    raise ValueError(f"{place}: has the same tokens as {other}; name each store and each input once")


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


def _delete(store: TokenStore) -> None:
    """Delete the files of a store, and its folders if nothing else is in them."""
    for name in (MANIFEST_NAME, VERIFIED_NAME, *store.manifest.files):
        (store.path / name).unlink(missing_ok=True)
    for folder in (*(store.path / split for split in SPLITS), store.path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.unlink(missing_ok=True)
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise OSError(
            f"{target}: cannot be a hard link to {source} ({error.strerror}); stores and output must be on one file "
            "system that has hard links: copy the store there"
        ) from error
