"""Reads a recipe: YAML, its base and command-line overrides. Errors name the wrong key."""

import hashlib
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from ..checkpoints.folders import CONFIG_FILE, STATE_FILE
from ..hub import near_path_hint
from ..parsing import parse_yaml
from ..text import near_hint, one_line
from .config import TrainingConfig

LARGEST_RECIPE = 2**20  # bytes
CONFIGS_PACKAGE = f"{__package__.rpartition('.')[0]}.configs"
CHOICES = (  # texts that are one of a few
    *(("model", "sink", "kind"), ("model", "attention", "pattern")),
    *(("train", "precision"), ("optimizer", "name"), ("wandb", "mode")),
)
WEIGHTS_KEY = "data.weights"
NUMBER_TAGS, TEXT_TAG = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"), "tag:yaml.org,2002:str"
OTHER_BASE = r":|^[-+]?0[0-7_]+$"


def load_config(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> TrainingConfig:
    """Load and validate the configuration of a recipe.

    Args:
        recipe: name of a packaged recipe (``pythia-160m``, ``paper/vanilla``), path of a YAML file,
            or folder of a run, whose recipe is used with this folder. The key ``base`` of a recipe
            may name another one, whose values it overrides.
        overrides: ``section.key=value``; later ones win. Values are YAML (``null``, ``1e-3``,
            ``[0.9, 0.95]``).

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: the YAML is malformed, a key is unknown (the message names the closest valid
            one) or a value is invalid.
    """
    try:
        merged = _merged(_read_own(recipe), *(_parse_override(text) for text in overrides))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"recipe {recipe}: {one_line(error)}; correct the interpolation ${{…}}") from error
    try:
        config = TrainingConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(recipe, error))) from None
    config._interpolations = _interpolations(OmegaConf.to_container(merged))
    if config.train.run_dir is None:
        train = config.train.model_copy(update={"run_dir": f"runs/{_name(recipe)}"})
        config = config.model_copy(update={"train": train})
    return config


def recipe_names() -> list[str]:
    """Return the sorted names of the packaged recipes."""
    root = files(CONFIGS_PACKAGE)
    with_folder = [(f"{entry.name}/", entry) for entry in root.iterdir() if entry.is_dir()]
    return sorted(
        prefix + entry.name.removesuffix(".yaml")
        for prefix, folder in [("", root), *with_folder]
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def describe_recipe(name: str) -> str:
    """Return the first sentence of the comment at the beginning of a packaged recipe."""
    comment = takewhile(lambda line: line.startswith("#"), _find(name).splitlines())
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=[^.]\.)\s(?=[A-Z])|, see docs/", text)[0].removesuffix(".")


def _read_own(recipe: str) -> DictConfig:
    """Read a recipe, or that of a run with its folder as ``train.run_dir``: it may have moved."""
    if not _is_run(recipe):
        return _read(recipe, ())
    folder = OmegaConf.create({"train": {"run_dir": str(Path(recipe))}})
    return _merged(_read(str(Path(recipe) / CONFIG_FILE), ()), folder)


def _read(recipe: str, readers: tuple[str, ...]) -> DictConfig:
    """Read a recipe merged over its base; ``readers`` are the recipes derived from it."""
    if recipe in readers:
        raise ValueError(f"recipe {recipe} is its own base ({' → '.join((*readers, recipe))}): change one base key")
    text = _find(recipe)
    try:
        loaded = parse_recipe(text)
    except ValueError as error:
        raise ValueError(f"recipe {recipe} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"recipe {recipe} must consist of sections with keys (model:, train:, …)")
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise ValueError(f"recipe {recipe}: base is {base!r}, but it must be the name or path of a recipe")
    if base.endswith((".yaml", ".yml")):
        base = str(Path(recipe).parent / base)
    return _merged(_read(base, (*readers, recipe)), loaded)


def parse_recipe(text: str) -> DictConfig | ListConfig:
    """Parse the text of a recipe, without its base.

    Raises:
        ValueError: it is not valid YAML.
    """
    return parse_yaml(text, lambda text: OmegaConf.create(_decimal(text)))


def _find(recipe: str) -> str:
    """Return the text of a recipe, given its name or path."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"recipe {recipe}: no such file; {near_path_hint(recipe) or 'check the path'}")
        if path.stat().st_size > LARGEST_RECIPE:
            raise ValueError(f"recipe {recipe} has {path.stat().st_size:,} bytes: pass a recipe, which is a short file")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeError as error:
            raise ValueError(f"recipe {recipe} is not a text file in UTF-8 ({error}): pass a recipe") from error
    packaged = files(CONFIGS_PACKAGE).joinpath(f"{recipe}.yaml")
    if not packaged.is_file():
        hint = near_path_hint(recipe) if path.parent != Path() else ""  # a mistyped run
        hint = hint or near_hint(recipe, recipe_names())
        if (path / CONFIG_FILE).is_file():
            hint = f"to continue or repeat this run, pass {path / CONFIG_FILE}"
        elif path.is_dir():
            hint = f"this folder has no {CONFIG_FILE}, so it is no run either"
        hint = hint or "`sinklm recipes` lists them; or pass the path of a .yaml file, or the folder of a run"
        raise FileNotFoundError(f"there is no recipe {recipe!r}: {hint}")
    return packaged.read_text(encoding="utf-8")


def _is_run(recipe: str) -> bool:
    """Whether a recipe is given as the folder of a run. Names of packaged recipes come first."""
    folder = Path(recipe)
    if not (folder / CONFIG_FILE).is_file() or recipe in recipe_names():
        return False
    if (folder / STATE_FILE).exists():
        raise ValueError(
            f"{recipe} is a checkpoint: to resume its run, pass {folder.absolute().parent.parent}; to start another "
            f"one from its weights, pass a recipe and model.init_from={recipe}"
        )
    return True


def _name(recipe: str) -> str:
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


def _merged(*parts: DictConfig | ListConfig) -> DictConfig:
    """Merge recipes and overrides; later ones win. ``data.weights`` is replaced as a whole."""
    merged: Any = parts[0]
    for part in parts[1:]:
        try:
            weights = OmegaConf.select(part, WEIGHTS_KEY) if isinstance(part, DictConfig) else None
            merged = OmegaConf.merge(merged, part)
            if weights is not None:
                merged.data.weights = weights
        except TypeError as error:  # a list in place of a section, or the reverse
            keys = ", ".join(str(key) for key in part)
            raise ValueError(
                f"{keys}: a list cannot replace a section with keys, nor a section a list: set its keys"
            ) from error
    return cast(DictConfig, merged)


def _parse_override(text: str) -> DictConfig | ListConfig:
    key, equals, value = text.partition("=")
    if not equals or not key.strip(".") or key.startswith("-"):
        raise ValueError(f"{text!r} is not an override: write section.key=value, e.g. train.num_steps=100")
    if key.startswith(f"{WEIGHTS_KEY}."):
        raise ValueError(f"{key}: name all sets in one value, {WEIGHTS_KEY}={{set: weight, …}}")
    try:
        return parse_yaml(value, lambda value: OmegaConf.from_dotlist([f"{key}={_decimal(value)}"]))
    except ValueError as error:
        raise ValueError(f"{key}: the value is not valid YAML ({error})") from error


def _decimal(text: str) -> str:
    """Return YAML in which numbers to the base 60 (``3:1``) and 8 (``010``) are quoted texts.

    In YAML 1.1 these are 181 and 8. In YAML 1.2 and for most readers they are not.

    Raises:
        RecursionError: it is nested too deeply. libyaml, which OmegaConf uses, would crash.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes, seen, is_changed = [root], set(), False
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # by an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.ScalarNode) and node.tag in NUMBER_TAGS and re.search(OTHER_BASE, node.value):
            node.tag, is_changed = TEXT_TAG, True
    return yaml.serialize(root) if is_changed else text


def _explain(recipe: str, error: ValidationError) -> list[str]:
    """Return one line per error, starting with the dotted key."""
    lines = []
    for mistake in error.errors():
        key = ".".join(str(part) for part in mistake["loc"])
        key = key if key.isprintable() else repr(key)  # a key of YAML may have several lines
        value = mistake["input"]
        message = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if value is None and re.search(r":\S", key):  # YAML reads {a:1} as the key `a:1`
            lines.append(f"{key} has no value: write a space after the colon")
        elif mistake["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}: {_nearest(key)}")
        elif mistake["type"] == "missing":
            lines.append(f"{key} is not set: set it in recipe {recipe} or on the command line")
        elif mistake["type"] == "model_type":
            lines.append(f"{key} is {value!r}: it must be a section with keys, such as {key}.{_first_key(key)}")
        elif isinstance(value, dict | BaseModel) and mistake["type"] == "value_error":
            lines.append(f"{key}: {message}" if key else message)  # about a section, whose value is too long to print
        else:
            it = "it " if message.startswith("should") else ""
            is_unquoted = mistake["type"] in ("string_type", "literal_error") and isinstance(value, bool | float | int)
            lines.append(f"{key} is {value!r}: {it}{message}{'; quote it if it is a text' * is_unquoted}")
    return lines


def _first_key(section: str) -> str:
    return next(key.removeprefix(f"{section}.") for key in dotted_keys(TrainingConfig) if key.startswith(f"{section}."))


def _nearest(key: str) -> str:
    known = list(dotted_keys(TrainingConfig))
    last = key.rpartition(".")[2]  # it may be right and only the section wrong
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    near = near_hint(key, known if "." in key else TrainingConfig.model_fields, others=elsewhere)
    if near:
        return near
    section = key.partition(".")[0]
    siblings = [name for name in known if name.startswith(f"{section}.")] or list(TrainingConfig.model_fields)
    return f"valid keys are {', '.join(siblings)}"


def dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a section and its subsections."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from dotted_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def config_yaml(config: TrainingConfig) -> str:
    """Return the complete configuration (`saved_values`) as YAML, itself a valid recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(saved_values(config)))


def saved_values(config: TrainingConfig) -> dict[str, Any]:
    """Return the configuration as it may be stored: texts from interpolations are not resolved.

    They may be secret (``${oc.env:TOKEN}``). Numbers, and texts that are one of a few choices, are
    resolved.
    """
    return _saved(config.model_dump(), config._interpolations, ())


def value_digest(value: object) -> str:
    """Return a digest of a value that is not stored itself, to notice that it has changed."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _interpolations(source: Any, keys: tuple = ()) -> dict[tuple, str]:
    """Return the texts with interpolations in a recipe, by their path of keys and list indices."""
    if isinstance(source, dict | list):
        items = source.items() if isinstance(source, dict) else enumerate(source)
        return {path: text for key, each in items for path, text in _interpolations(each, (*keys, key)).items()}
    is_interpolation = isinstance(source, str) and re.search(r"(?<!\\)(\\\\)*\$\{", source)
    return {keys: source} if is_interpolation else {}


def _saved(value: Any, interpolations: dict[tuple, str], keys: tuple) -> Any:
    """Return a value of the configuration as it may be stored; ``keys`` is its path."""
    is_ours = isinstance(value, dict) and keys[:1] != ("deepspeed",)  # a section, whose keys are no secrets
    if keys in interpolations and keys not in CHOICES and not is_ours and _has_text(value):
        return interpolations[keys]
    if isinstance(value, dict):
        return {key: _saved(each, interpolations, (*keys, key)) for key, each in value.items()}
    if isinstance(value, list):
        return [_saved(each, interpolations, (*keys, index)) for index, each in enumerate(value)]
    if isinstance(value, str):  # `${` in a resolved text is no interpolation
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value)
    return value


def _has_text(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)
