"""The console of all commands: it prints text as it is, without markup, emoji or control codes."""

from typing import Any

import rich.console
from rich.status import Status
from rich.text import Text

from .text import printable


class Console(rich.console.Console):
    """rich's console for text from outside: names of files, models, sets and tasks.

    rich would read ``[/b]`` in a name as markup and fail, and send ``\\x1b`` to the terminal. Style
    a message with ``print(text, style="yellow")``.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:  # all strings, those of tables too
        return super().render_str(printable(text), **options)

    def write(self, text: str) -> None:
        """Print a text as it is, without wrapping; `print` strips spaces in rich before 14."""
        self.file.write(printable(text) + "\n")

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError, which `sinklm.command.run` handles; rich exits with 1."""
        raise

    def status(self, status: Any, **options: Any) -> Status:
        return super().status(Text(printable(status)) if isinstance(status, str) else status, **options)
