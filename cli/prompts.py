"""Reads the prompts of `sinklm generate`: arguments, standard input and files."""

import os
import sys
from pathlib import Path

from ..files import read_text
from ..parsing import parse_json


def read_prompts(arguments: list[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line and then those of a file.

    Raises:
        ValueError: there is no prompt, one is empty or not valid UTF-8, or a line is no prompt.
        OSError: the file cannot be read.
    """
    prompts = [_of_argument(argument) for argument in arguments]
    if file is not None:
        prompts += _of_file(file)
    if not prompts:
        raise ValueError("there is no prompt: pass one as an argument, - for standard input, or --prompts-file FILE")
    if not all(prompts):
        raise ValueError("the prompt is empty: pass at least one character")
    return prompts


def _of_argument(prompt: str) -> str:
    if prompt == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: pass the prompt as an argument, or open standard input")
    try:
        if prompt == "-":  # as UTF-8, whatever the locale
            return sys.stdin.buffer.read().decode("utf-8-sig") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        return os.fsencode(prompt).decode() if _has_bytes(prompt) else prompt
    except UnicodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8 ({error}): convert it to UTF-8") from error


def _has_bytes(argument: str) -> bool:
    """Whether an argument contains bytes that are no text in the encoding of the locale."""
    return any("\udc80" <= character <= "\udcff" for character in argument)


def _of_file(file: Path) -> list[str]:
    """Read a prompt from each line; in JSON lines, a text or an object with the key ``prompt``."""
    lines = read_text(file, "check the path", option="--prompts-file").replace("\r\n", "\n").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if file.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    return [_of_json(line, f"--prompts-file {file}, line {number}") for number, line in numbered]


def _of_json(line: str, where: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ValueError(f'{where} is not JSON: write a text or {{"prompt": "…"}} in each line') from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{where} has no prompt: write a text or {{"prompt": "…"}} in each line')
    try:
        prompt.encode()
    except UnicodeError as error:
        raise ValueError(f"{where} has half of a surrogate pair ({error}): write both halves") from error
    return prompt
