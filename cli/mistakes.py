"""Explains wrong arguments, and names all near commands, options and keys."""

import sys
from collections.abc import Iterator
from typing import Any

import typer
import typer.core

from ..extras import MissingExtraError
from ..text import near_hint, near_names


class Group(typer.core.TyperGroup):
    """A group of commands that suggests the near names for an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None:
            ctx.fail(f"no such command {name!r}{_sentence(near_hint(name, _paths(self)))}")
        return super().resolve_command(ctx, args)


def explain(error: Any) -> str:
    """Return the line for a usage error of click."""
    message = error.format_message().rstrip(".")
    if type(error).__name__ == "NoSuchOption":
        names = [name for param in error.ctx.command.params for name in param.opts]
        exact, near = _keys_for(error.option_name) if error.ctx.command.name == "train" else ([], [])
        written = " or ".join(f"{key}={_value(error.option_name)}" for key in exact)
        hint = f"write {written}" if exact else near_hint(error.option_name, names, others=near)
        message = f"no such option {error.option_name}{_sentence(hint)}"
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


def _keys_for(option: str) -> tuple[list[str], list[str]]:
    """Return the keys of a recipe that an option such as ``--seed`` names, and the near ones."""
    try:
        from ..train.config import TrainingConfig
        from ..train.recipe import dotted_keys
    except MissingExtraError:
        return [], []
    wanted = option.lstrip("-").replace("-", "_")
    keys = list(dotted_keys(TrainingConfig))
    by_last_part = {key.rpartition(".")[2]: key for key in reversed(keys)}
    exact = [key for key in keys if wanted in (key, key.rpartition(".")[2])]
    return exact, [*near_names(wanted, keys), *(by_last_part[part] for part in near_names(wanted, by_last_part))]


def _value(option: str) -> str:
    """Return the value of an option on the command line, or ``…``."""
    for argument, following in zip(sys.argv, [*sys.argv[1:], "-"], strict=True):
        if argument == option and not following.startswith("-"):
            return following
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return "…"
