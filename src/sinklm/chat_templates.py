"""Chat templates, which are programs of a tokenizer's author: limits, and the sinks in them."""

import ctypes
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .text import message_of

SECONDS = 2.0
LONGEST = 10_000_000  # characters

_QUESTION, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_INSTRUCTION = {"role": "system", "content": "c"}
PROBES = ([_QUESTION], [_QUESTION, _ANSWER, _QUESTION], [_INSTRUCTION, _QUESTION])  # many templates refuse some
BOS_TOKEN = re.compile(r"\bbos_token\b")


def begins_with_sinks(tokenizer: PreTrainedTokenizerBase, template: str, names: list[str]) -> bool:
    """Whether each conversation in a chat template begins with the sinks.

    Conversations of `PROBES` are rendered; those that the template refuses do not count. If it
    refuses all, its text is searched: for ``bos_token`` if there is one sink, and for their names.

    Args:
        names: of the sinks in the tokenizer of an export. Its ``bos_token`` is the first of them.
    """
    sinks = "".join(names)
    texts = []
    for messages in PROBES if names else ():
        try:
            texts.append(render(tokenizer, messages, template=template, bos_token=names[0]))
        except ValueError:
            continue
    if texts or not names:
        return all(text.startswith(sinks) for text in texts)
    return sinks in template or (len(names) == 1 and BOS_TOKEN.search(template) is not None)


def template_with_sinks(tokenizer: PreTrainedTokenizerBase, template: str, names: list[str]) -> str:
    """Return a chat template that begins a conversation with the sinks.

    Chat templates are rendered to text that is tokenized without special tokens, so a template that
    leaves out the sinks has none. They are put in front, in place of any ``bos_token`` in it.

    Args:
        names: as for `begins_with_sinks`.
    """
    if begins_with_sinks(tokenizer, template, names):
        return template
    no_other = '{%- set bos_token = "" -%}\n' if BOS_TOKEN.search(template) else ""
    return f"{{{{- {json.dumps(''.join(names))} -}}}}\n{no_other}{template}"


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    reply_begins: bool = False,
    template: str | None = None,
    **variables: str,
) -> str:
    """Return a conversation in the tokenizer's chat template.

    Args:
        reply_begins: end with the beginning of a reply.
        template: another template.
        variables: special tokens other than those of the tokenizer.

    Raises:
        ValueError: the template fails, takes more than `SECONDS`, or returns no text or too much.
    """

    def call() -> Any:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=reply_begins, **variables
        )

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
    return ValueError(
        f"the chat template {what}: correct it, or use another (`sinklm chat`: --chat-template) or a tokenizer without "
        "one"
    )


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
