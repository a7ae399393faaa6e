"""The keys of a recipe with type, default and meaning, for ``sinklm train --keys`` and the docs."""

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from ..text import near_hint, near_names
from .config import TrainingConfig
from .recipe import dotted_keys

RUN_DIR = "train.run_dir"
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class Key(NamedTuple):
    """A key; ``default`` is YAML, or None if the key is required. Texts are Markdown."""

    name: str
    type: str
    default: str | None
    description: str


class KeySection(NamedTuple):
    """A section of a recipe with its keys, without those of its subsections."""

    name: str
    description: str
    keys: list[Key]


def key_sections() -> list[KeySection]:
    """Return all sections of a recipe that have keys."""
    schema = TrainingConfig.model_json_schema()
    return list(_sections("", schema, schema["$defs"]))


def keys_text(width: int) -> str:
    """Return all keys with default, type and meaning, by section. Keys are never broken."""
    lines: list[str] = []
    for section in key_sections():
        title = f"{section.name}: {section.description}" if section.description else section.name
        lines += ["", *_wrapped(title, width, indent=0), ""]
        for key in section.keys:
            setting = f"{key.name} (required; " if key.default is None else f"{key.name}={key.default} ("
            lines += _wrapped(f"{setting}{key.type})", width, indent=2)
            lines += _wrapped(key.description, width, indent=6)
    return "\n".join(lines[1:]).replace("`", "")


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    first, rest = " " * indent, " " * 6
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _sections(path: str, section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[KeySection]:
    inner: list[tuple[str, dict[str, Any]]] = []
    keys: list[Key] = []
    for name, field in section["properties"].items():
        key = f"{path}.{name}" if path else name
        if "$ref" in field:
            inner.append((key, definitions[field["$ref"].rpartition("/")[2]]))
        else:
            default = _yaml(field["default"]) if "default" in field else None
            keys.append(Key(key, _type(field), default, field.get("description", "")))
    if keys:
        yield KeySection(path, section.get("description", ""), keys)
    for key, definition in inner:
        yield from _sections(key, definition, definitions)


def _type(field: dict[str, Any]) -> str:
    """Return the type of a field and its limits, such as "integer ≥ 1, or null"."""
    if "anyOf" in field:
        return ", or ".join(map(_type, field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    limits = " and ".join(f"{sign} {field[name]}" for name, sign in LIMITS.items() if name in field)
    return f"{field['type']} {limits}".strip()


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def key_hint(option: str, options: list[str], arguments: list[str]) -> str:
    """Return what to write in place of an unknown option such as ``--seed``.

    Args:
        option: the option, without a value.
        options: the options that there are.
        arguments: the command line, in which its value is.
    """
    wanted = option.lstrip("-").replace("-", "_")
    wanted = RUN_DIR if wanted in ("o", "output", "output_dir") else wanted  # the option of other commands
    keys = list(dotted_keys(TrainingConfig))
    exact = [key for key in keys if wanted in (key, key.rpartition(".")[2])]
    if exact:
        value = _value(option, arguments)
        return f"write {' or '.join(f'{key}={value}' for key in exact)}"
    by_last_part = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = [*near_names(wanted, keys), *(by_last_part[part] for part in near_names(wanted, by_last_part))]
    return near_hint(option, options, others=near)


def _value(option: str, arguments: list[str]) -> str:
    """Return the value of an option on the command line, or ``…``."""
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        if argument == option and not following.startswith("-"):
            return following
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return "…"
