"""`sinklm chat`: a conversation in one cache, without a length limit."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Console
from ..files import check_writable, locked, named_errors, read_text
from .generate import describe_cache, show
from .options import (
    CACHE_HELP,
    CACHE_METAVAR,
    DEFAULT_CACHE,
    MAX_NEW_TOKENS_HELP,
    MOST_NEW_TOKENS,
    Device,
    Dtype,
    DtypeName,
    Memory,
    MemorySize,
    MinP,
    Model,
    Quiet,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    check_memory,
    check_sampling,
    examples,
    memory_options,
    note_windows,
    parse_cache,
    parse_memory,
    placement,
)

if TYPE_CHECKING:
    from ..streaming import Chat


RESET = "/reset"


@examples(
    "sinklm chat runs/quickstart",
    "sinklm chat runs/quickstart --session chat.safetensors",
    "echo 'Who are you?' | sinklm chat runs/quickstart --temperature 0 --max-new-tokens 40",
)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt, placed before the first message.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Chat template (Jinja), or a file with one, instead of the tokenizer's.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_NEW_TOKENS, help=MAX_NEW_TOKENS_HELP)] = 512,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    cache: Annotated[
        str | None, typer.Option(metavar=CACHE_METAVAR, help=CACHE_HELP, show_default=DEFAULT_CACHE)
    ] = None,
    memory: Memory = None,
    session: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="File of the conversation: it is continued if the file exists, and saved after each turn.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = DtypeName.AUTO,
    quiet: Quiet = False,
) -> None:
    """Chat with a model. Each line is a message; Ctrl-C stops a reply, Ctrl-D ends the chat.

    A line /reset starts a new conversation. All turns share one cache of constant size, and each
    turn is read only once. Turns are formatted with the tokenizer's chat template. Without a
    template they are lines of plain text, and a reply is one line. Special tokens in a message are
    read as text.
    """
    shape, size = None if cache is None else parse_cache(cache), parse_memory(memory)
    check_memory(size, [] if shape is None else [shape])
    check_sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    template = None if chat_template is None else _read_template(chat_template)
    console = Console(is_quiet=quiet)
    with nullcontext() if session is None else _held(session):
        console.note(f"loading {model} …")
        import torch

        from ..checkpoints import load_model, load_tokenizer
        from ..streaming import Chat
        from ..streaming.sampling import Sampling
        from .generate import make_generator

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        language_model, tokenizer = load_model(model, **placement(device, dtype)), load_tokenizer(model)
        note_windows(console, language_model, model)
        tokenizer.chat_template = template or tokenizer.chat_template
        if session is not None and session.exists():
            options: dict[str, Any] = asdict(sampling) | {"max_new_tokens": max_new_tokens}
            conversation = Chat.load(session, tokenizer, language_model, **options)
            _check_same(session, conversation, shape, size, system)
            console.note(f"continuing {session}, which has {len(conversation.history)} messages")
        else:
            generator = make_generator(console, language_model, shape, size, sampling)
            conversation = Chat(tokenizer, generator, system=system, max_new_tokens=max_new_tokens)
        _explain(console, has_template=bool(tokenizer.chat_template))
        torch.manual_seed(seed)
        conversation = _converse(console, conversation, session)
        cache_used = conversation.generator.cache
        console.note(f"{cache_used.get_seq_length():,} tokens seen; {describe_cache(cache_used)}")


def _held(session: Path) -> AbstractContextManager[None]:
    """Return the lock of a session's file, whose folder is created."""
    target = session.resolve()  # links to a file have its lock
    check_writable(target)
    with named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    busy = f"--session {session} is in use by another `sinklm chat`: end it, or choose another file"
    return locked(target.with_name(f".{target.name}.lock"), busy)


def _converse(console: Console, conversation: "Chat", session: Path | None) -> "Chat":
    """Answer the messages of stdin, and save the conversation after each. Return it at the end."""
    for message in _messages():
        if message == RESET:
            conversation.reset()
            console.note("new conversation")
        else:
            _reply(conversation, message)
        if conversation.generator.cache.is_damaged:
            conversation = _restored(console, conversation, session)
        elif session is not None:
            conversation.save(session)
    return conversation


def _restored(console: Console, conversation: "Chat", session: Path | None) -> "Chat":
    """Return the conversation before a message whose reading was interrupted, if it was saved."""
    if session is None or not session.exists():
        console.warn("reading the message was interrupted: the next message starts a new conversation")
        return conversation
    console.warn("reading the message was interrupted: it is not part of the conversation")
    generator = conversation.generator
    options = asdict(generator.sampling) | {"max_new_tokens": conversation.max_new_tokens}
    return type(conversation).load(session, conversation.tokenizer, generator.decoder.model, **options)


def _explain(console: Console, *, has_template: bool) -> None:
    if not has_template:
        console.note(
            "this tokenizer has no chat template: messages and replies are lines of text, User: … and Assistant: …; "
            "--chat-template sets one"
        )
    if sys.stdin is not None and sys.stdin.isatty():
        console.note(f"{RESET} starts a new conversation, Ctrl-C stops a reply, Ctrl-D ends the chat")


def _check_same(
    session: Path,
    conversation: "Chat",
    shape: tuple[int, int] | None,
    memory: MemorySize | None,
    system: str | None,
) -> None:
    """Raise a ValueError if options differ from those that a conversation began with."""
    cache = conversation.generator.cache
    saved, saved_memory = cache.shape, None if cache.memory is None else cache.memory.options
    if shape is not None and shape != (saved.num_kept, saved.window):
        raise ValueError(
            f"--cache is {shape[0]}+{shape[1]}, but the conversation in {session} has a cache "
            f"{saved.num_kept}+{saved.window}: leave out --cache, or choose another --session"
        )
    saved_size = None if saved_memory is None else MemorySize.of(saved_memory)
    if (wanted := memory_options(memory)) is not None and MemorySize.of(wanted) != saved_size:
        raise ValueError(
            f"--memory is {memory}, but the conversation in {session} has "
            f"{'no memory' if saved_size is None else f'a memory {saved_size}'}: leave out --memory, or choose "
            "another --session"
        )
    if system is not None and system != conversation.system:
        raise ValueError(
            f"--system differs from the instructions of the conversation in {session}: leave it out, or choose another "
            "--session"
        )


def _read_template(template: str) -> str:
    """Return a chat template, given itself or its file."""
    if "{{" in template or "{%" in template:
        return template
    return read_text(Path(template), "pass a file in UTF-8 or a Jinja template", option="--chat-template")


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


def _reply(conversation: "Chat", message: str) -> None:
    has_begun = False
    try:
        for piece in conversation(message):
            shown = piece if has_begun else piece.lstrip()
            has_begun = has_begun or bool(shown)
            show(shown)
    except KeyboardInterrupt:
        pass
    print(flush=True)
