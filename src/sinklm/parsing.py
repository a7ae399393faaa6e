"""Parses JSON and YAML of files that can be damaged. All errors of content are ValueErrors."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .text import one_line

TOO_DEEP = "it is nested too deeply"


def parse_json(content: str | bytes, **options: Any) -> Any:
    """Parse JSON; ``options`` are those of `json.loads`.

    Raises:
        ValueError: it is not valid, or nested too deeply (about 1000 levels).
    """
    try:
        return json.loads(content, **options)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error


def parse_yaml(content: str | bytes, load: Callable[[Any], Any] = yaml.safe_load) -> Any:
    """Parse YAML with ``load``.

    Raises:
        ValueError: it is not valid, or nested too deeply (about 300 levels). The message is one
            line.
    """
    try:
        return load(content)
    except Exception as error:  # PyYAML raises any type, such as an IndexError for `!!int ""`
        raise ValueError(TOO_DEEP if isinstance(error, RecursionError) else one_line(error)) from error


@contextmanager
def named_damage(path: Path, remedy: str = "restore or delete it") -> Iterator[None]:
    """Context that reads a file. Errors of its content become a ValueError that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(f"{path} is damaged ({reason}): {remedy}") from error
