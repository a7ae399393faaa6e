"""`sinklm chat`: a conversation in one cache, without a length limit."""

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Console
from .generate import describe_cache, show
from .options import (
    Cache,
    Device,
    Dtype,
    DtypeName,
    Model,
    Quiet,
    Seed,
    Temperature,
    TopK,
    check_temperature,
    examples,
    parse_cache,
    placement,
)

if TYPE_CHECKING:
    from ..streaming import Chat


@examples(
    "sinklm chat runs/learnable-sink",
    "echo 'Who are you?' | sinklm chat runs/learnable-sink --temperature 0 --max-new-tokens 40",
)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt, placed before the first message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of a reply.")] = 512,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    cache: Cache = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Chat with a model. Each line is a message; Ctrl-C stops a reply, Ctrl-D ends the chat.

    All turns share one cache of constant size, by default 1024 tokens or one less than the trained
    length, and each turn is read only once. Turns are formatted with the tokenizer's chat template.
    Without a template they are lines of plain text, and a reply is one line.
    """
    shape = None if cache is None else parse_cache(cache)
    check_temperature(temperature)
    console = Console(is_quiet=quiet)
    console.note(f"loading {model} …")
    import torch

    from ..checkpoints import load_model, load_tokenizer
    from ..streaming import Chat
    from .generate import make_generator

    language_model, tokenizer = load_model(model, **placement(device, dtype)), load_tokenizer(model)
    generator = make_generator(console, language_model, shape, temperature, top_k)
    conversation = Chat(tokenizer, generator, system=system, max_new_tokens=max_new_tokens)
    torch.manual_seed(seed)
    for message in _messages():
        _reply(console, conversation, message)
    console.note(f"{generator.cache.get_seq_length():,} tokens seen; {describe_cache(generator.cache)}")


def _messages() -> Iterator[str]:
    """Yield the lines of stdin that are not empty."""
    if sys.stdin is None:
        return
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end the conversation
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


def _reply(console: Console, conversation: "Chat", message: str) -> None:
    has_begun = False
    try:
        for piece in conversation(message):
            shown = piece if has_begun else piece.lstrip()
            has_begun = has_begun or bool(shown)
            show(shown)
    except KeyboardInterrupt:
        if conversation.generator.cache.is_damaged:
            console.warn("reading the message was interrupted: the next message starts a new conversation")
    print(flush=True)
