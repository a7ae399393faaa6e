"""Rendering of chat templates, which are programs of the author of a tokenizer, within limits."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..text import message_of

SECONDS = 2.0
LONGEST = 10_000_000  # characters


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, reply_begins: bool) -> str:
    """Return a conversation in the tokenizer's chat template.

    Args:
        reply_begins: end with the beginning of a reply.

    Raises:
        ValueError: the template fails, takes more than `SECONDS`, or returns no text or too much.
    """

    def call() -> Any:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_begins)

    try:
        text = within(SECONDS, call)
    except TimeoutError:
        raise _wrong(f"takes more than {SECONDS:.0f} s") from None
    except Exception as error:  # a template can raise anything
        raise _wrong(f"fails ({message_of(error)})") from error
    if not isinstance(text, str):
        raise _wrong(f"returns a {type(text).__name__} and not text")
    if len(text) > LONGEST:
        raise _wrong(f"returns more than {LONGEST:,} characters")
    return text


def _wrong(what: str) -> ValueError:
    return ValueError(f"the tokenizer's chat template {what}: use a tokenizer with another template, or without one")


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call a Python function in a thread and return its result.

    Raises:
        TimeoutError: it has not returned in time. It is ended at its next Python instruction.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
