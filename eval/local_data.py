"""Data sets of lm-eval's tasks from local files instead of the Hub.

Prompts, metrics and everything else of a task stay lm-eval's own. Only the source of its data is
replaced, so scores equal those of lm-eval on the same data.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ..parsing import parse_yaml
from .local_rows import check_rows, read_rows

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json"}
NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
SPLIT_KEYS = ("training_split", "validation_split", "test_split")
SHARD = r"(?:-\d{5}-of-\d{5}(?:-[0-9a-f]+)?)?"  # as in the names of the Hub's parquet files
PACKAGED_BUILDERS = {"csv", "text", *BUILDERS.values()}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

Files = dict[str, list[Path]]


@dataclass(frozen=True)
class Source:
    """A task's data set on the Hub, and the splits that its evaluation reads.

    ``name`` is ``owner/name``; ``config`` is the configuration, such as ``ARC-Easy``.
    """

    task: str
    name: str
    config: str | None
    evaluated: str
    fewshot: str | None

    @classmethod
    def of(cls, task: str, definition: dict[str, Any], num_fewshot: int | None) -> "Source":
        """Return the source of a task as lm-eval would choose it.

        Raises:
            ValueError: the task has no data set on the Hub that files could replace.
        """
        name = definition.get("dataset_path")
        evaluated = _evaluated_split(definition)
        if not isinstance(name, str) or not evaluated or "class" in definition:
            raise ValueError(f"the data of the task {task!r} cannot be read from --data-dir: use --include-path for it")
        fewshot = definition.get("fewshot_config") or {}
        drawn = fewshot.get("split") or definition.get("fewshot_split")
        drawn = drawn or definition.get("training_split") or definition.get("validation_split") or evaluated
        wanted = definition.get("num_fewshot") if num_fewshot is None else num_fewshot
        if fewshot.get("samples") is not None and not fewshot.get("split"):  # they are in the task's file
            wanted = 0
        return cls(task, name, definition.get("dataset_name"), evaluated, drawn if wanted else None)

    @property
    def short_name(self) -> str:
        return self.name.rpartition("/")[2]


def use_local_data(manager: TaskManager, names: Iterable[str], folder: Path, num_fewshot: int | None = None) -> Files:
    """Make a manager read the data of tasks from a folder, and return the files by task.

    Tasks that need nothing from the Hub are left as they are: those that make their data, and those
    that name files of their own, such as those of ``--include-path``.

    Args:
        names: tasks, groups or tags.
        folder: see `find_files`.
        num_fewshot: as in `sinklm.eval.zero_shot.find_tasks`.

    Raises:
        FileNotFoundError: the folder, or a split that the evaluation reads, does not exist.
        ValueError: a file is ambiguous, damaged or not downloaded, a row lacks a field or its
            answer, or a task has no data set to replace.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist: check --data-dir")
    used: Files = {}
    for name in dict.fromkeys(_leaves(manager, names)):
        entry = manager.task_index[name]
        definition = definition_of(manager, name)
        if definition.get("custom_dataset") or definition.get("dataset_path") in PACKAGED_BUILDERS:
            continue
        source = Source.of(name, definition, num_fewshot)
        files = _needed_files(source, folder)
        overrides = _overrides(definition, files)
        rows = read_rows(overrides["dataset_path"], overrides["dataset_kwargs"]["data_files"])
        for split, paths in files.items():
            check_rows(source.name, rows[split], paths[0])
        manager.task_index[name] = replace(entry, yaml_path=None, cfg=definition | overrides)
        used[name] = [path for paths in files.values() for path in paths]
    return used


def load_rows(task: str, folder: Path | None) -> list[dict[str, Any]]:
    """Return the rows of the evaluated split of one of lm-eval's tasks.

    Args:
        folder: see `find_files`; None: the Hub.

    Raises:
        ConnectionError: the data set is not available locally and cannot be downloaded.
        FileNotFoundError, ValueError: as in `use_local_data`.
    """
    from .zero_shot import task_manager

    manager = task_manager([task])
    if folder is not None:
        use_local_data(manager, [task], folder)
    definition = definition_of(manager, task)
    options = definition.get("dataset_kwargs") or {}
    name = definition.get("dataset_name")
    split = _evaluated_split(definition)
    return list(datasets.load_dataset(definition["dataset_path"], name, split=split, **options))


def definition_of(manager: TaskManager, task: str, *, resolve_func: bool = True) -> dict[str, Any]:
    """Return the keys of a task's file; ``resolve_func`` imports its Python functions."""
    entry = manager.task_index[task]
    return load_yaml(entry.yaml_path, resolve_func=resolve_func) if entry.yaml_path else dict(entry.cfg or {})


def _evaluated_split(definition: dict[str, Any]) -> str | None:
    """Return the split that lm-eval evaluates."""
    return definition.get("test_split") or definition.get("validation_split")


def find_files(source: Source, folder: Path) -> Files:
    """Return the files of a data set by split: ``train``, ``validation``, ``test``.

    The folder contains data sets in any of these forms (for the task ``arc_easy``):

    - ``ai2_arc`` or ``allenai/ai2_arc``: what ``git clone`` or ``hf download --local-dir`` leaves;
      ``datasets--allenai--ai2_arc``: the Hub's cache;
    - ``arc_easy/test.jsonl``: a folder for each task, also one of ``save_to_disk``;
    - ``arc_easy_test.jsonl``: a file for each split, or ``arc_easy.jsonl`` for the evaluated one.

    Files are JSON lines, JSON, parquet or arrow, and may be compressed.

    Raises:
        ValueError: there are several candidates.
    """
    found = [files for files in _candidates(source, folder) if files]
    if len(found) > 1:
        both = " and ".join(str(next(iter(files.values()))[0]) for files in found[:2])
        raise ValueError(f"{folder} has the data of {source.task} twice, {both}: keep one of them")
    return found[0] if found else {}


def _candidates(source: Source, folder: Path) -> Iterator[Files]:
    own_folders = [folder / source.task] if source.task != source.short_name else []
    owner = source.name.partition("/")[0]
    hub_folders = [folder / source.short_name, folder / f"{owner}__{source.short_name}"]
    if "/" in source.name:
        hub_folders.append(folder / source.name)
        hub_folders += _cached_snapshot(folder / f"datasets--{source.name.replace('/', '--')}")
    if folder.resolve().name == source.short_name:
        hub_folders.append(folder)
    for path in own_folders:
        yield _files_of_folder(path, source, is_own=True)
    for path in hub_folders:
        if path.is_dir():
            is_own = source.task == source.short_name
            yield _files_of_card(path, source) or _files_of_folder(path, source, is_own=is_own)
    yield _flat_files(source, folder)


def _cached_snapshot(folder: Path) -> list[Path]:
    """Return the snapshot of a data set in the Hub's cache that the main branch points to."""
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    if len(snapshots) > 1 and (folder / "refs" / "main").is_file():
        return [folder / "snapshots" / (folder / "refs" / "main").read_text(errors="replace").strip()]
    return snapshots


def _files_of_card(folder: Path, source: Source) -> Files:
    """Return the files that the YAML header of the data set's README names, as on the Hub."""
    readme = folder / "README.md"
    text = readme.read_text("utf-8", errors="replace") if readme.is_file() else ""
    header = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.S)
    try:
        configs = (parse_yaml(header[1]) or {}).get("configs") or [] if header else []
        configs = {config["config_name"]: config.get("data_files") for config in configs}
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}
    wanted = source.config or (next(iter(configs)) if len(configs) == 1 else "default")
    patterns = configs.get(wanted)
    files: Files = {}
    for entry in patterns if isinstance(patterns, list) else []:
        if isinstance(entry, dict) and "split" in entry:
            paths = entry.get("path", [])
            globs = [paths] if isinstance(paths, str) else paths
            try:
                found = {path for glob in globs for path in folder.glob(glob) if _builder(path)}
                files[entry["split"]] = sorted(found)
            except (TypeError, ValueError, NotImplementedError, AttributeError, IndexError) as error:
                raise ValueError(
                    f"{readme}: the header has the entry {str(entry)[:80]}, but it needs a split and a path relative "
                    "to the folder; download the data set again"
                ) from error
    return _one_format({split: paths for split, paths in files.items() if paths})


def _files_of_folder(folder: Path, source: Source, *, is_own: bool) -> Files:
    """Return files by the split in their names, of the right configuration only."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _builder(path)]
    parts = {path: path.relative_to(folder).parts for path in paths}
    paths = [path for path in paths if not any(part.startswith(".") for part in parts[path])]
    config = (source.config or "default").lower()
    chosen = [p for p in paths if any(part.lower() == config for part in parts[p][:-1]) or _starts(p, config)]
    if not chosen and (is_own or config == "default"):
        plain = {"data", *(alias for aliases in SPLITS.values() for alias in aliases)}
        chosen = [p for p in paths if all(part.lower() in plain for part in parts[p][:-1])]
    files: Files = {}
    for path in chosen:
        if split := _split_of(path, has_parent=len(parts[path]) > 1):
            files.setdefault(split, []).append(path)
    return _one_format(files)


def _flat_files(source: Source, folder: Path) -> Files:
    """Return files such as ``arc_easy_test.jsonl``, or ``arc_easy.jsonl``."""
    prefixes = {source.task, source.short_name if source.config in (None, "default", "main") else source.config}
    files: Files = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not _builder(path):
            continue
        for prefix in (prefix.lower() for prefix in prefixes):
            rest = _stem(path).lower().removeprefix(prefix)
            if _stem(path).lower() == prefix:
                files.setdefault(source.evaluated, []).append(path)
            elif rest != _stem(path).lower() and rest[0] in "-_." and (split := _split_named(rest[1:])):
                files.setdefault(split, []).append(path)
    return _one_format({split: list(dict.fromkeys(paths)) for split, paths in files.items()})


def _one_format(files: Files) -> Files:
    """Return the files, after a check that each split is complete and there once.

    Raises:
        ValueError: a split is there twice, or a file is a pointer of Git LFS or empty.
    """
    for split, paths in files.items():
        shards = [bool(re.search(SHARD[:-1] + "$", _stem(path))) or _stem(path).isdigit() for path in paths]
        if len({_builder(path) for path in paths}) > 1 or (len(paths) > 1 and not all(shards)):
            raise ValueError(f"{paths[0]} and {paths[1]} are both the split {split}: keep one of them")
        if (total := re.search(r"-of-(\d{5})", _stem(paths[0]))) and int(total[1]) != len(paths):
            raise ValueError(f"{paths[0].parent} has {len(paths)} of {int(total[1])} files of the split {split}: "
                             "download the data set again")  # fmt: skip
        for path in paths:
            with path.open("rb") as file:
                beginning = file.read(len(LFS_POINTER))
            if beginning == LFS_POINTER:
                raise ValueError(f"{path} is a pointer of Git LFS and not the data: run git lfs pull in its folder")
            if not beginning:
                raise ValueError(f"{path} is empty: download it again")
    return files


def _needed_files(source: Source, folder: Path) -> Files:
    files = find_files(source, folder)
    uses = {source.evaluated: "evaluates", source.fewshot: "draws few-shot examples from"}
    for split, use in uses.items():
        if split is not None and split not in files:
            where = f"only {', '.join(files)}" if files else "none of its files"
            raise FileNotFoundError(
                f"{source.task} {use} the split {split} of {source.name}, but {folder} has {where}: add it as "
                f"{folder / f'{source.task}_{split}.jsonl'}, or download {source.name} to {folder / source.short_name}"
            )
    return {split: paths for split, paths in files.items() if split in uses}


def _overrides(definition: dict[str, Any], files: Files) -> dict[str, Any]:
    """Return the keys of a task that replace its source; splits without files become null."""
    data_files = {split: [str(path.absolute()) for path in paths] for split, paths in files.items()}
    builder = {_builder(path) for paths in files.values() for path in paths}
    if len(builder) > 1:
        raise ValueError(f"{', '.join(map(str, data_files.values()))} have several formats: use one")
    splits: dict[str, Any] = {key: None for key in SPLIT_KEYS if definition.get(key) not in files}
    if definition.get("fewshot_split") not in files:
        splits["fewshot_split"] = None
    if (drawn := definition.get("fewshot_config")) and drawn.get("split") not in files:
        splits["fewshot_config"] = {key: value for key, value in drawn.items() if key != "split"}
    return {
        "dataset_path": builder.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files},
        **splits,
    }


def _leaves(manager: TaskManager, names: Iterable[Any]) -> Iterator[str]:
    """Yield the names of the tasks of groups and tags."""
    for name in names:
        entry = manager.task_index.get(name) if isinstance(name, str) else None
        if entry is None:
            raise ValueError(f"--data-dir does not support the task file {name}: use --include-path for it")
        if entry.kind.name == "TAG":
            yield from _leaves(manager, sorted(entry.tags))
        elif entry.kind.name == "GROUP":
            yield from _leaves(manager, (entry.cfg or {}).get("task", []))
        else:
            yield name


def _builder(path: Path) -> str | None:
    """Return the name of the reader of `datasets` for a file, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes and path.name not in NO_DATA else None


def _stem(path: Path) -> str:
    """Return a file's name without the suffixes of its format."""
    name = path.name
    for suffix in (*COMPRESSED, *BUILDERS):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def _starts(path: Path, config: str) -> bool:
    return re.match(re.escape(config) + r"[-_.]", _stem(path).lower()) is not None


def _split_of(path: Path, *, has_parent: bool) -> str | None:
    return _split_named(_stem(path)) or (_split_named(path.parent.name, whole=True) if has_parent else None)


def _split_named(text: str, *, whole: bool = False) -> str | None:
    """Return the split that a name ends with, before the number of a shard."""
    before: Sequence[str] = ("",) if whole else (r"(?:.*[-_.])?",)
    for split, aliases in SPLITS.items():
        if re.fullmatch(rf"{before[0]}(?:{'|'.join(aliases)}){SHARD}", text, re.IGNORECASE):
            return split
    return None
