"""Get the files of a model to import: from the Hub or a folder, with its weights as safetensors."""

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import save_file

from ..hub import find_on_hub
from ..text import one_line
from .checks import INDEX, SAVED_BUFFERS, WEIGHTS, read_json_object
from .folders import resolve_model_folder

LFS_POINTER = b"version https://git-lfs"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
PYTHIA_REVISIONS = "Pythia's are step0, step1, step2, step4 … step512, step1000, step2000 … step143000"


def find_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model, downloaded if it is a name on the Hub.

    Safetensors are preferred; a pickle is downloaded only if there are none. All files are of the
    same commit, which is the name of the folder in the Hub's cache.

    Args:
        name_or_path: a transformers folder, or a name such as ``EleutherAI/pythia-160m-seed3``.
        revision: branch, tag or commit on the Hub; None: ``main``.

    Raises:
        OSError: there is no such folder, model or revision, or it cannot be downloaded.
        ValueError: a revision of a folder.
    """
    if Path(name_or_path).exists():
        if revision is not None:
            raise ValueError(
                f"{name_or_path} is a folder, which has no revision {revision!r}: leave --revision out, or pass a name "
                "on the Hub such as EleutherAI/pythia-160m"
            )
        return Path(resolve_model_folder(name_or_path))
    found = find_on_hub(str(name_or_path), revision=revision)
    return Path(found) if Path(found).is_dir() else _download(found, revision)


def _download(name: str, revision: str | None) -> Path:
    def snapshot(of: str | None, *weights: str) -> Path:
        return Path(snapshot_download(name, revision=of, allow_patterns=[*SMALL_FILES, *weights]))

    try:
        folder = snapshot(revision, "model*.safetensors", INDEX)
        return folder if has_safetensors(folder) else snapshot(folder.name, "pytorch_model*.bin", PICKLE_INDEX)
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r}: {PYTHIA_REVISIONS}") from error
    except Exception as error:  # also those of the HTTP library, which differ between versions
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        raise OSError(f"cannot download {name} from the Hub ({one_line(error)}): run the command again") from error


def has_safetensors(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def with_safetensors(folder: Path, scratch: Path) -> Path:
    """Return a folder with the configuration of a model and its weights as safetensors.

    Weights that exist only as pickles are converted into ``scratch``, an empty folder. torch reads
    them with ``weights_only``, which creates tensors and runs no code.

    Raises:
        OSError: a file is missing or cannot be read or written.
        ValueError: a pickle is damaged, or has something else than tensors.
    """
    names = _pickles(folder)
    if has_safetensors(folder) or not names:
        return folder
    weight_map: dict[str, str] = {}
    for i, name in enumerate(names, start=1):
        tensors = read_pickle(folder / name)
        written = WEIGHTS if len(names) == 1 else f"model-{i:05}-of-{len(names):05}.safetensors"
        save_file(tensors, scratch / written, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, written)
    if len(names) > 1:
        (scratch / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    shutil.copy(folder / "config.json", scratch)
    return scratch


def _pickles(folder: Path) -> list[str]:
    """Return the names of the files with pickled weights, from their index if they have one."""
    if not (folder / PICKLE_INDEX).is_file():
        return [PICKLE] if (folder / PICKLE).is_file() else []
    shards = read_json_object(folder / PICKLE_INDEX).get("weight_map")
    files = list(shards.values()) if isinstance(shards, dict) else []
    if not files or not all(isinstance(name, str) and Path(name).name == name for name in files):
        raise ValueError(f"{folder / PICKLE_INDEX} has no weight_map from tensors to files: copy it again")
    names = sorted(set(files))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]}, which {PICKLE_INDEX} lists: copy the missing file")
    return names


def _is_plain(tensor: object) -> bool:
    """Whether this is a tensor whose values are in memory, one after the other."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested)
    )


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict of tensors, without the buffers that models compute.

    Raises:
        ValueError: the file is damaged, needs code to be read, or has something else than ordinary
            tensors with names.
    """
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the weights: run git lfs pull in its repository")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # torch's message advises to run the code
        raise ValueError(
            f"{path} cannot be read safely: it is damaged, is not a file of torch, or contains code, which is never "
            "run; copy it again, or use a model with safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path} is damaged ({one_line(error)}): copy it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} contains a {type(state).__name__}, not tensors by name: use the weights of a model")
    for name, tensor in state.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise ValueError(
                f"{path} contains something other than ordinary tensors with names: {one_line(repr(name))}; use the "
                "weights of a model, neither quantized nor sparse"
            )
    kept = {name: tensor for name, tensor in state.items() if not re.search(SAVED_BUFFERS, name)}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}
