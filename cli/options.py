"""Options that several commands share, the notation of caches, and the examples of a help text.

A command takes an option as ``device: Device = None``, parses ``--cache`` with `parse_cache` before
it imports torch, and prints with a `Console` that knows ``--quiet``.
"""

import errno
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

from ..console import Console
from ..hub import near_path_hint
from ..text import near_hint

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from ..streaming import MemoryOptions

LARGEST_SEED = 2**32 - 1
LARGEST_PENALTY = 1000  # as in `streaming.sampling`, which imports torch
MOST_NEW_TOKENS = 10**12


class DtypeName(StrEnum):
    """Values of ``--dtype``."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[
    str,
    typer.Argument(
        help="Training run, checkpoint, export, transformers folder, or name on the Hugging Face Hub (owner/name).",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Device of the model, e.g. cpu or cuda:1.", show_default="the first GPU, or cpu without one"),
]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        help="Data type of the weights. auto: as saved, or float32 on a CPU without instructions for the saved type."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the results.", show_default="results/MODEL"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only results, warnings and errors.")]
WINDOW_OF_EXPORT = "; for an export of a model with windows, its window"  # ends the default of each cache
DEFAULT_CACHE = (
    "the model's sinks, or the first 4 tokens without sinks, and the last tokens: 1024 in total, or one less than the "
    f"trained length if that is shorter{WINDOW_OF_EXPORT}"
)
CACHE_METAVAR = "KEPT+WINDOW"
CACHE_HELP = (
    "Streaming cache: the first KEPT tokens, which include the model's sinks, and the last WINDOW tokens, e.g. 4+1020."
)
CACHES_METAVAR = "KEPT+WINDOW,…"
CACHES_HELP = (
    "Streaming caches, separated by commas: the first KEPT tokens and the last WINDOW tokens, e.g. 0+1024,4+1020."
)
Caches = Annotated[
    str | None,
    typer.Option(
        metavar=CACHES_METAVAR,
        help=CACHES_HELP,
        show_default=f"0, 1, 2 and 4 kept tokens in a cache of half the trained length{WINDOW_OF_EXPORT}",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="NUMxSIZE[/EVERY]",
        help="Also attend to NUM blocks of SIZE tokens that have left the window, e.g. 8x64. The text is kept in host "
        "memory. Every 8 tokens, the blocks are chosen to which the last tokens attend most. 8x64/1 chooses for each "
        "token, which is slower and finds more. SIZE is a multiple of 8.",
        show_default="none",
    ),
]
Texts = Annotated[
    list[Path], typer.Option(help="UTF-8 text file; repeat the option to join several files.", show_default=False)
]
Tokens = Annotated[
    int | None, typer.Option(min=2, help="Number of tokens of the text to read.", show_default="the whole text")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the data sets: copies from the Hub (ai2_arc/), the Hub's cache, or a file for each task "
        "(arc_easy.jsonl).",
        show_default="the Hub",
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always chooses the most likely token.")
]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Sample from the K most likely tokens.", show_default="from all tokens")
]
TopP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens with a total probability of P."),
]
MinP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Sample from tokens whose probability is at least P times the highest."),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        min=1 / LARGEST_PENALTY,
        max=LARGEST_PENALTY,
        help="A value above 1 makes tokens that are already in the text less likely.",
    ),
]
MAX_NEW_TOKENS_HELP = "Maximum number of tokens to generate for each prompt or message."


def parse_cache(text: str, option: str = "--cache") -> tuple[int, int]:
    """Parse ``"4+1020"`` into ``(4, 1020)``: the numbers of kept and of recent tokens.

    Raises:
        ValueError: the text is not ``KEPT+WINDOW`` with a window of at least 1.
    """
    match = re.fullmatch(r"\s*(\d{1,12})\+(\d{1,12})\s*", text, re.ASCII)
    if not match or int(match[2]) < 1:
        raise ValueError(
            f"{option}: {text[:80]!r} is not a cache: write kept tokens + window, such as 4+1020; the window must be "
            "at least 1"
        )
    return int(match[1]), int(match[2])


class MemorySize(NamedTuple):
    """A memory: blocks, tokens of a block, and tokens between choices (None: the default)."""

    num_blocks: int
    block_size: int
    interval: int | None = None

    def __str__(self) -> str:
        return f"{self.num_blocks}x{self.block_size}{f'/{self.interval}' if self.interval else ''}"

    @classmethod
    def of(cls, options: "MemoryOptions") -> "MemorySize":
        """Return the size of a memory, with its interval."""
        return cls(options.num_blocks, options.block_size, options.interval)


def parse_memory(text: str | None) -> MemorySize | None:
    """Parse ``"8x64"`` or ``"8x64/2"``.

    Raises:
        ValueError: the text is not ``NUMxSIZE`` or ``NUMxSIZE/EVERY`` with a number of at least 1,
            a size that is a multiple of 8, and an interval from 1 to the size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,6})x(\d{1,6})(?:/(\d{1,6}))?\s*", text, re.ASCII)
    if not match or int(match[1]) < 1 or int(match[2]) < 1 or int(match[2]) % 8:
        raise ValueError(
            f"--memory: {text[:80]!r} is not a memory: write blocks x tokens of a block, such as 8x64 or 8x64/1; there "
            "must be at least 1 block, and its tokens a multiple of 8"
        )
    size = MemorySize(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)
    if size.interval is not None and not 1 <= size.interval <= size.block_size:
        raise ValueError(
            f"--memory: {text[:80]!r} chooses blocks every {size.interval} tokens: write 1 to {size.block_size}"
        )
    return size


def check_memory(size: MemorySize | None, shapes: Iterable[tuple[int, int]]) -> None:
    """Raise a ValueError if the blocks of a memory are longer than the window of a cache."""
    for num_kept, window in shapes:
        if size is not None and size.block_size > window:
            raise ValueError(
                f"--memory {size}: blocks of {size.block_size} tokens are longer than the window of the cache "
                f"{num_kept}+{window}: use smaller blocks or a larger window"
            )


def memory_options(size: MemorySize | None) -> "MemoryOptions | None":
    """Return the options of a memory of `parse_memory`."""
    from ..streaming import MemoryOptions

    if size is None:
        return None
    return MemoryOptions(**{name: value for name, value in size._asdict().items() if value is not None})


def parse_caches(text: str, option: str = "--caches") -> list[tuple[int, int]]:
    """Parse ``"0+1024,4+1020"`` into ``[(0, 1024), (4, 1020)]``, each once; see `parse_cache`."""
    return list(dict.fromkeys(parse_cache(part, option) for part in text.split(",")))


def parse_numbers(text: str, option: str) -> list[int]:
    """Parse ``"20,10"`` into ``[10, 20]``.

    Raises:
        ValueError: a part is not a whole number.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"{option} is {text[:80]!r}: it must be whole numbers separated by commas") from error


def parse_names(text: str, option: str, known: Sequence[str]) -> list[str]:
    """Parse ``"dense,window"`` into ``["dense", "window"]``.

    Raises:
        ValueError: a name is not one of ``known``.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if not name:
            raise ValueError(f"{option} has an empty name: use only {', '.join(known)}")
        if name not in known:
            hint = near_hint(name[:80], known) or f"use only {', '.join(known)}"
            raise ValueError(f"{option} contains {name[:80]!r}: {hint}")
    return names


def check_texts(paths: Iterable[Path]) -> None:
    """Raise an OSError for a ``--text`` that cannot be read."""
    for path in paths:
        number = errno.ENOENT if not path.exists() else errno.EISDIR if path.is_dir() else 0
        if number or not os.access(path, os.R_OK):
            remedy = near_path_hint(str(path)) or "pass a text file"
            raise OSError(f"--text {path} cannot be read: {os.strerror(number or errno.EACCES)}; {remedy}")


def check_folder(path: Path | None, option: str) -> None:
    """Raise a FileNotFoundError for a folder that does not exist."""
    if path is not None and not path.is_dir():
        remedy = near_path_hint(str(path)) or f"check {option}"
        raise FileNotFoundError(f"the folder {path} does not exist: {remedy}")


def refuse_unused(options: dict[str, bool], why: str) -> None:
    """Raise a ValueError if the user passed options that have no effect.

    Args:
        options: for each name, whether its value is another than the default, and has no effect.
        why: the reason and the remedy.
    """
    if unused := [name for name, is_unused in options.items() if is_unused]:
        raise ValueError(f"{' and '.join(unused)} {'has' if len(unused) == 1 else 'have'} no effect {why}")


def check_sampling(temperature: float, *, top_k: int | None, top_p: float, min_p: float, seed: int) -> None:
    """Raise a ValueError for impossible values, or options of sampling with temperature 0."""
    if not math.isfinite(temperature):
        raise ValueError(f"--temperature is {temperature}: it must be a finite number of at least 0")
    if top_p == 0:
        raise ValueError("--top-p is 0: it must be above 0; 1 samples from all tokens")
    if temperature == 0:
        passed = {"--top-k": top_k not in (None, 1), "--top-p": top_p < 1, "--min-p": min_p > 0, "--seed": seed != 0}
        refuse_unused(
            passed,
            "with --temperature 0, which always chooses the most likely token: leave it out, or raise --temperature",
        )


def placement(device: str | None, dtype: str) -> dict[str, Any]:
    """Return ``--device`` and ``--dtype`` as arguments of `load_model`. Imports torch.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    if device is not None:
        try:
            torch.zeros(1, device=device).tolist()  # meta has no values
        except Exception as error:  # of any type: backends fail in their own ways
            count = torch.cuda.device_count()
            gpus = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda" if count else ""
            usable = " or ".join(filter(None, ["cpu", gpus]))
            raise ValueError(f"--device {device} is not available on this machine: use {usable}") from error
    return {"device": device, "dtype": None if dtype == DtypeName.AUTO else str(dtype)}


def progress_bars(console: Console) -> "Progress":
    """Return the progress bars of an evaluation, on stderr; with ``--quiet`` they are not shown."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console.stderr_console, disable=console.is_quiet)


def print_results(console: Console, paths: Sequence[Path]) -> None:
    """Print which files have the results: their folder once, and no line break in a name."""
    folder = paths[0].parent
    names = ", ".join(path.name if path.parent == folder else str(path) for path in paths)
    console.print(f"Results in {folder}: {names}", highlight=False, soft_wrap=True)


def note_windows(console: Console, model: "PreTrainedModel", name: str, *, has_cache: bool = True) -> None:
    """Say which layers of a model have windows, or had them before an export.

    Args:
        name: what the user called the model.
        has_cache: whether to add that a larger cache does not change them.
    """
    from ..streaming.layers import describe_former_rules, describe_rules
    from ..streaming.wrappers import decoder_of

    config = decoder_of(model).config
    if windows := describe_rules(config):
        larger = "; larger caches do not change them" if has_cache else ""
        console.note(f"windows of the model: {windows} (kept and recent tokens){larger}")
    if windows := describe_former_rules(config):
        console.note(f"{Path(name).name} was trained with windows {windows} and now has full attention")


Command = TypeVar("Command", bound=Callable[..., None])


def examples(*lines: str) -> Callable[[Command], Command]:
    """Add examples to the help of a command. ``tests/cli/test_examples.py`` executes them."""

    def add(command: Command) -> Command:
        command.examples = lines  # type: ignore[attr-defined]
        return command

    return add


def examples_text(lines: Iterable[str], title: str = "Examples:") -> str:
    """Return the end of a help text. Each line is a paragraph, because typer joins lines."""
    from rich.markup import escape

    return "\n\n".join([title, *(escape(f"$ {line}") for line in lines)])
