"""Verifies the files of a model before it is loaded, if their checksums are known.

A checkpoint of a run has a manifest, and an export has the file ``SHA256SUMS``, which
``sha256sum --check`` also reads. Other transformers folders have no checksums.
"""

import re
from pathlib import Path

from .folders import COMPLETE_MARKER, CONFIG_FILE, MODEL_FOLDER, STATE_FILE
from .manifest import FileInfo, describe_file, find_damage, read_manifest

SUMS_FILE = "SHA256SUMS"
UNLISTED_FILES = ("README.md", SUMS_FILE)  # the model card is there to be edited
WEIGHTS_SUFFIX = ".safetensors"


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of the files in an export, except its model card."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in UNLISTED_FILES)
    lines = [f"{describe_file(folder / name).sha256}  {name}\n" for name in names]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def verify_model_folder(name_or_folder: str, *, with_weights: bool = True) -> None:
    """Compare the files of a model with their checksums, if there are any.

    Reading and hashing takes about half a second per GB on one core, and files are read in
    parallel.

    Args:
        with_weights: also verify the weights, not only the smaller files.

    Raises:
        ValueError: a file differs.
    """
    folder = Path(name_or_folder)
    if folder.name == MODEL_FOLDER and (folder.parent / COMPLETE_MARKER).is_file():
        known, remedy = _files_of_checkpoint(folder.parent), "copy it again, or use another checkpoint"
    elif (folder / SUMS_FILE).is_file():
        known = _files_of_export(folder / SUMS_FILE)
        remedy = f"copy it again, or if you changed it on purpose, delete {SUMS_FILE}"
    else:
        return
    if not known:
        return
    damage = find_damage(
        folder, {name: info for name, info in known.items() if with_weights or not name.endswith(WEIGHTS_SUFFIX)}
    )
    unlisted = sorted(path.name for path in folder.glob(f"*{WEIGHTS_SUFFIX}") if path.name not in known)
    damage += [f"{name} is not listed with the other files" for name in unlisted]
    if damage:
        raise ValueError(f"{folder} is damaged: {damage[0]}: {remedy}")


def verify_description(checkpoint: Path) -> None:
    """Compare ``state.json`` and ``config.yaml`` of a checkpoint with their checksums, if any.

    Raises:
        ValueError: one of them differs.
    """
    manifest = read_manifest(checkpoint) if (checkpoint / COMPLETE_MARKER).is_file() else None
    files = manifest.files if manifest else {}
    damage = find_damage(checkpoint, {name: files[name] for name in (STATE_FILE, CONFIG_FILE) if name in files})
    if damage:
        raise ValueError(f"{checkpoint} is damaged: {damage[0]}: copy it again, or use another checkpoint")


def _files_of_checkpoint(checkpoint: Path) -> dict[str, FileInfo]:
    manifest = read_manifest(checkpoint)
    files = manifest.files.items() if manifest else ()
    prefix = f"{MODEL_FOLDER}/"
    return {name.removeprefix(prefix): info for name, info in files if name.startswith(prefix)}


def _files_of_export(path: Path) -> dict[str, FileInfo]:
    known = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if match is None:
            raise ValueError(f"{path} is damaged: copy it again, or delete it if the other files are intact")
        known[match[2]] = FileInfo(bytes=None, sha256=match[1])
    return known
