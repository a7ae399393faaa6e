"""Parses arguments: explains wrong ones, and names all near commands, options and keys."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.core

from ..extras import MissingExtraError
from ..text import near_hint


class Group(typer.core.TyperGroup):
    """A group of commands that suggests the near names for an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None:
            ctx.fail(f"no such command {name!r}{_sentence(near_hint(name, _paths(self)))}")
        return super().resolve_command(ctx, args)


class Command(typer.core.TyperCommand):
    """A command whose options with a path accept ``~`` for the home folder.

    A shell replaces it in ``--output ~/store``, but not in ``--output=~/store``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for param in self.params:
            if param.param_type_name == "option" and param.name in ctx.params:
                ctx.params[param.name] = _at_home(ctx.params[param.name])
        return rest


def _at_home(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_at_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def explain(error: Any) -> str:
    """Return the line for a usage error of click."""
    message = error.format_message().rstrip(".").replace(": Value error, ", ": ")  # of pydantic, in newer typer
    if type(error).__name__ == "NoSuchOption":
        message = f"no such option {error.option_name}{_sentence(_option_hint(error.option_name, error.ctx.command))}"
    if error.ctx is None:
        return message
    see = f"ee {error.ctx.command_path} --help"
    return f"{message} S{see}" if message.endswith("?") else f"{message}; s{see}"


def _sentence(hint: str) -> str:
    return f": {hint}" if hint else ""


def _paths(group: Any, prefix: str = "") -> Iterator[str]:
    """Yield the names of all commands of a group: ``eval``, ``eval streaming`` and so on."""
    for name, command in group.commands.items():
        yield prefix + name
        if hasattr(command, "commands"):
            yield from _paths(command, f"{prefix}{name} ")


def _option_hint(option: str, command: Any) -> str:
    names = [name for param in command.params if param.param_type_name == "option" for name in param.opts]
    if command.name == "train":
        return _key_hint(option, names)
    arguments = [param.name for param in command.params if param.param_type_name == "argument"]
    meant = next((name for name in arguments if name.startswith(option.lstrip("-").replace("-", "_"))), None)
    return f"give the {meant} without {option}" if meant else near_hint(option, names)


def _key_hint(option: str, names: list[str]) -> str:
    try:
        from ..train.keys import key_hint
    except MissingExtraError:
        return near_hint(option, names)
    return key_hint(option, names, sys.argv)
