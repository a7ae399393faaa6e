"""`sinklm chat`: a conversation without end in one cache."""

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from .generate import Model, NumKept, Seed, Temperature, TopK, Window, check_cache_options, describe_cache

if TYPE_CHECKING:
    from ..streaming import Chat


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="Instructions before the first message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 512,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    num_kept: NumKept = None,
    window: Window = None,
    seed: Seed = 0,
) -> None:
    """Talk with a model: a line is a message, Ctrl-C cuts a reply short, Ctrl-D ends.

    All turns go into one cache of constant size, and each is read once. They take the form of the tokenizer's chat
    template; without one they are lines of plain text, and a reply is one line.
    """
    import torch

    from ..checkpoints import load_model, load_tokenizer
    from ..streaming import Chat
    from .generate import make_generator

    check_cache_options(num_kept, window)
    language_model, tokenizer = load_model(model), load_tokenizer(model)
    generator = make_generator(language_model, num_kept, window, temperature, top_k)
    conversation = Chat(tokenizer, generator, system=system, max_new_tokens=max_new_tokens)
    torch.manual_seed(seed)
    for message in _messages():
        _reply(conversation, message)
    typer.echo(f"{generator.cache.get_seq_length():,} tokens seen; {describe_cache(generator.cache)}", err=True)


def _messages() -> Iterator[str]:
    """Lines of stdin, empty ones left out, until it ends."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a slip of the keyboard ends no conversation
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if asks else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not line and not asks:
            return
        if line.strip():
            yield line.strip()


def _reply(conversation: "Chat", message: str) -> None:
    has_begun = False
    try:
        for piece in conversation(message):
            shown = piece if has_begun else piece.lstrip()
            has_begun = has_begun or bool(shown)
            print(shown, end="", flush=True)
    except KeyboardInterrupt:
        if conversation.generator.cache.is_damaged:
            typer.echo("The message was not read to its end: the conversation begins anew.", err=True)
    print(flush=True)
