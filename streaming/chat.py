"""A conversation in one streaming cache: each turn reads only the tokens that are new."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chat_templates import render
from .generation import Generator, TextStream
from .saving import load_cache, save_cache

# Placeholders of a reply and of a message in a rendered template.
REPLY, MESSAGE = "\N{OBJECT REPLACEMENT CHARACTER}", "\N{INTERLINEAR ANNOTATION ANCHOR}"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens, and other added tokens that occur in the chat template.

    Added tokens of ordinary text, such as the runs of spaces of Pythia's tokenizer, are neither.
    """
    template = str(tokenizer.chat_template or "")
    found = {str(token) for token in tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        name = token.content
        if token.special or (name in template and not name.isspace()):
            found.add(name)
    return sorted(token for token in found if len(token) > 1)


def split_special(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Split a text within each special token, so that the parts are encoded as ordinary text."""
    names = special_tokens(tokenizer)
    if not names:
        return [text]
    starts = re.finditer(f"(?={'|'.join(map(re.escape, names))})", text)  # they may overlap
    cuts = [0, *(found.start() + 1 for found in starts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, before: str, message: str, after: str, *, begins: bool = False
) -> list[int]:
    """Return the ids of a message between the texts of a template.

    Special tokens of the template are read as such; in the message they are text, so that a user
    cannot end a turn or write one for the model. A message without any is encoded with its
    surroundings in one piece.

    Args:
        begins: add the tokens that the tokenizer puts before a text.
    """
    first, *others = split_special(message, tokenizer)
    parts = [before + first, *others]
    parts[-1] += after
    return [
        token
        for i, part in enumerate(parts)
        for token in tokenizer(part, add_special_tokens=begins and i == 0, verbose=False)["input_ids"]
    ]


class PlainTurns:
    """Turns as lines ``User: …`` and ``Assistant: …``, for a tokenizer without a chat template.

    A reply is one line; empty lines before it are skipped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.end_ids = {tokenizer.eos_token_id} - {None}

    def first(self, message: str, system: str | None) -> list[int]:
        preamble = f"{system}\n\n" if system else ""
        return encode_turn(self.tokenizer, f"{preamble}User: ", message, "\nAssistant:", begins=True)

    def next(self, message: str, end_of_reply: str) -> list[int]:
        line_end = "" if "\n" in end_of_reply else "\n"
        return encode_turn(self.tokenizer, f"{line_end}User: ", message, "\nAssistant:")

    def ends_reply(self, piece: str) -> bool:
        return "\n" in piece


class TemplateTurns:
    """Turns in the tokenizer's chat template.

    A template renders whole conversations. The text that a turn adds after the previous reply does
    not depend on earlier turns, so only the new message is rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        special = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        closing = tokenizer(self._after_reply(is_last=True), add_special_tokens=False)["input_ids"]
        self.end_ids = ({tokenizer.eos_token_id} - {None}) | (set(closing[:1]) & special)

    def first(self, message: str, system: str | None) -> list[int]:
        instructions = [{"role": "system", "content": system}] if system else []
        conversation = [*instructions, {"role": "user", "content": MESSAGE}]
        return self._encode(render(self.tokenizer, conversation, reply_begins=True), message)

    def next(self, message: str, end_of_reply: str) -> list[int]:
        return self._encode(self._after_reply(is_last=False), message)

    def ends_reply(self, piece: str) -> bool:
        return False

    def _after_reply(self, *, is_last: bool) -> str:
        """Render the text after a reply: its end, and the next `MESSAGE` up to its reply."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": REPLY}]
        messages += [] if is_last else [{"role": "user", "content": MESSAGE}]
        rendered = render(self.tokenizer, messages, reply_begins=not is_last)
        if REPLY not in rendered:
            raise ValueError(
                "this tokenizer's chat template leaves out earlier replies, so turns cannot share a cache: use a "
                "tokenizer with another template, or without one"
            )
        return rendered.split(REPLY, 1)[1]

    def _encode(self, rendered: str, message: str) -> list[int]:
        before, found, after = rendered.partition(MESSAGE)
        if not found:
            raise ValueError(
                "this tokenizer's chat template leaves out the message: use a tokenizer with another template, or "
                "without one"
            )
        return encode_turn(self.tokenizer, before, message, after)


class Chat:
    """A conversation between a user and a model in the generator's cache, without a length limit.

    ::

        chat = Chat(tokenizer, Generator(model, cache))
        for piece in chat("Who are you?"):
            print(piece, end="", flush=True)

    Args:
        system: instructions before the first message. The cache keeps their first tokens.
        max_new_tokens: maximum length of a reply. The conversation continues after a cut reply.

    Raises:
        TypeError: ``generator`` is no `Generator`.
        ValueError: the chat template leaves out ``system``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generator: Generator,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
    ):
        if not isinstance(generator, Generator):
            raise TypeError(f"generator is a {type(generator).__name__}: use Chat(tokenizer, Generator(model, cache))")
        self.tokenizer, self.generator = tokenizer, generator
        self.system, self.max_new_tokens = system, max_new_tokens
        self.turns = TemplateTurns(tokenizer) if tokenizer.chat_template else PlainTurns(tokenizer)
        if system and self.turns.first("?", system) == self.turns.first("?", f"{system}?"):
            raise ValueError(
                "this tokenizer's chat template leaves out the system prompt: write it into the first message, or use "
                "another template"
            )
        self.has_begun = False
        self.end_of_reply = ""
        self.history: list[dict[str, str]] = []  # all messages, as in a chat template

    def save(self, path: str | os.PathLike) -> None:
        """Save the conversation and its cache to a file, from which `load` continues it.

        Raises:
            ValueError, OSError: as `StreamingCache.save`.
        """
        names = ("system", "has_begun", "end_of_reply", "history")
        conversation = {name: getattr(self, name) for name in names}
        conversation |= {"unread": self.generator.unread, "recent": list(self.generator.recent)}
        conversation["chat_template"] = self.tokenizer.chat_template
        save_cache(self.generator.cache, Path(path), {"conversation": conversation})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        *,
        max_new_tokens: int = 512,
        **sampling: Any,
    ) -> "Chat":
        """Return the conversation of a file of `save`.

        Args:
            model: the model that has read the conversation.
            sampling: arguments of `Generator`.

        Raises:
            ValueError: the file has no conversation, or one with another chat template; or as
                `StreamingCache.load`.
            OSError: the file cannot be read.
        """
        cache, notes = load_cache(Path(path), model)
        if "conversation" not in notes:
            raise ValueError(f"{path} has a cache but no conversation: pass a file of Chat.save")
        conversation = notes["conversation"]
        if conversation["chat_template"] != tokenizer.chat_template:
            raise ValueError(
                f"the conversation in {path} has another chat template: set tokenizer.chat_template "
                "(`sinklm chat`: --chat-template)"
            )
        generator = Generator(model, cache, **sampling)
        generator.unread = conversation["unread"]
        generator.recent.extend(conversation["recent"])
        chat = cls(tokenizer, generator, max_new_tokens=max_new_tokens)
        for name in ("system", "has_begun", "end_of_reply", "history"):
            setattr(chat, name, conversation[name])
        return chat

    def __call__(self, message: str) -> Iterator[str]:
        """Read a message and yield the reply in pieces.

        If the caller stops the iteration, the reply ends there. If reading a message was
        interrupted, the next call starts a new conversation.
        """
        if self.generator.cache.is_damaged:
            self.reset()
        if self.has_begun:
            prompt = self.turns.next(message, self.end_of_reply)
        else:
            prompt = self.turns.first(message, self.system)
        self.has_begun, self.end_of_reply = True, ""
        self.history += [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        for piece in self._reply(prompt):
            self.history[-1]["content"] += piece
            yield piece

    def _reply(self, prompt: list[int]) -> Iterator[str]:
        """Read a prompt and yield the reply in pieces."""
        text, says_something = TextStream(self.tokenizer), False
        for num_tokens, token in enumerate(self.generator(prompt), start=1):
            if token in self.turns.end_ids:  # the next turn starts with the end of the reply
                self.generator.unread = []
                break
            self.end_of_reply = text.push(token)
            yield self.end_of_reply
            said = self.end_of_reply if says_something else self.end_of_reply.lstrip()
            says_something = bool(said) or says_something
            if self.turns.ends_reply(said) or num_tokens == self.max_new_tokens:
                break
        yield text.flush()

    def reset(self) -> None:
        """Start a new conversation."""
        self.generator.reset()
        self.has_begun, self.end_of_reply, self.history = False, "", []
