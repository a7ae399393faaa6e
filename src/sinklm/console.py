"""The console of all commands: it prints text as it is, without markup, emoji or control codes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import rich.console
from rich.table import Table
from rich.text import Text

from .text import printable

UNBROKEN = 10_000  # columns of a table in a file or pipe; wider than any table


class Console(rich.console.Console):
    """rich's console for text from outside: names of files, models, sets and tasks.

    rich would read ``[/b]`` in a name as markup and fail, and send ``\\x1b`` to the terminal. Style
    a message with ``print(text, style="yellow")``.

    Args:
        is_quiet: print no notes and no progress (``--quiet``).
    """

    def __init__(self, *, is_quiet: bool = False, **options: Any):
        super().__init__(markup=False, emoji=False, **options)
        self.is_quiet = is_quiet

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print objects. In a file or pipe, texts and tables keep names whole: no line breaks."""
        if soft_wrap is None and not self.is_terminal and all(isinstance(each, str) for each in objects):
            soft_wrap = True
        width = self._width
        try:
            if not self.is_terminal and all(isinstance(each, Table) for each in objects):
                self._width = UNBROKEN
            super().print(*objects, soft_wrap=soft_wrap, **options)
        finally:
            self._width = width

    def note(self, text: str) -> None:
        """Print what the command does, on stderr, so that stdout has only results."""
        if not self.is_quiet:
            self.stderr_console.print(text, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, also with ``--quiet``."""
        self.stderr_console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)

    @property
    def stderr_console(self) -> "Console":
        return self if self.stderr else Console(stderr=True, is_quiet=self.is_quiet)

    def render_str(self, text: str, **options: Any) -> Text:  # all strings, those of tables too
        return super().render_str(printable(text), **options)

    def write(self, text: str) -> None:
        """Print a text as it is, without wrapping; `print` strips spaces in rich before 14."""
        self.file.write(printable(text) + "\n")

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError, which `sinklm.command.run` handles; rich exits with 1."""
        raise

    def status(self, status: Any, **options: Any) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Show a spinner with a text while a block runs."""
        if self.is_quiet:
            return nullcontext()
        return super().status(Text(printable(status)) if isinstance(status, str) else status, **options)
