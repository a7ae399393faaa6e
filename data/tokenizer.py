"""Tokenizer files: finding, loading and training them."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..hub import UnreachableError, find_on_hub, near_path_hint
from ..special_tokens import (
    PADDING_TOKENS,
    UTF8_BYTES,
    byte_level_tokens,
    drop_sinks,
    drop_template,
    without_template,
)

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # Pythia's
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def find_tokenizer_file(name_or_path: str | os.PathLike) -> Path:
    """Return the path of a ``tokenizer.json``, given the file, its folder or a Hub repository.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the Hub cannot be reached.
    """
    name_or_path = os.path.expanduser(name_or_path)
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise FileNotFoundError(f"{path} has no tokenizer.json: pass --tokenizer with another folder or a Hub name")
        return path / "tokenizer.json"
    if path.is_file():
        return path
    name = str(name_or_path)
    if name.endswith(".json"):
        raise FileNotFoundError(
            f"{path}: no such tokenizer file; "
            f"{near_path_hint(name) or 'pass --tokenizer with another path or a Hub name'}"
        )
    from huggingface_hub import hf_hub_download

    try:
        found = Path(find_on_hub(name))
    except FileNotFoundError as error:
        remedy = (
            ", or pass --tokenizer with the path of a tokenizer.json" if isinstance(error, UnreachableError) else ""
        )
        raise FileNotFoundError(f"tokenizer {error}{remedy}") from error
    if found.is_dir():  # in the cache of the Hub
        return found / "tokenizer.json"
    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise OSError(
            f"tokenizer {name}: cannot download tokenizer.json from the Hugging Face Hub ({type(error).__name__}); "
            "pass --tokenizer with the path of a local tokenizer.json"
        ) from error


class TrainingTokenizer(NamedTuple):
    """A ``tokenizer.json`` for training: it neither adds tokens to a text nor removes any.

    Attributes:
        tokenizer: the tokenizer.
        content: its file; that of the original, byte for byte, if nothing had to be removed.
        removed: what was removed, in words.
    """

    tokenizer: Tokenizer
    content: bytes
    removed: list[str]


def training_tokenizer(name_or_path: str | os.PathLike) -> TrainingTokenizer:
    """Read a tokenizer (see :func:`find_tokenizer_file`) without truncation, padding and template.

    A template adds special tokens to each text, such as a begin-of-text token. Training does not
    use them, so a tokenizer that added them would not fit the trained model. The sink tokens of a
    tokenizer from a checkpoint or an export are left out too: training adds its own, with the same
    ids.

    Raises:
        ValueError: the file is not a tokenizer.
    """
    path = find_tokenizer_file(name_or_path)
    content, removed = path.read_bytes(), []
    try:
        Tokenizer.from_buffer(content)
        state = json.loads(content)
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
    for key in ("truncation", "padding"):
        if state.get(key) is not None:
            state[key] = None
            removed.append(key)
    state["post_processor"], names = drop_template(state.get("post_processor"))
    if names:
        removed.append(f"the template that adds {' and '.join(names)}")
    state, sinks = drop_sinks(state)
    if sinks:
        removed.append(f"the token{'s' * (len(sinks) > 1)} {' and '.join(sinks)}")
    if removed:
        content = (json.dumps(state, ensure_ascii=False, indent=2) + "\n").encode()
    try:
        return TrainingTokenizer(without_template(Tokenizer.from_buffer(content)), content, removed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_tokenizer_file(name_or_path: str | os.PathLike) -> Tokenizer:
    """Return the tokenizer of :func:`training_tokenizer`."""
    return training_tokenizer(name_or_path).tokenizer


def tokenizer_size(tokenizer: Tokenizer) -> int:
    """Return the largest id + 1, added tokens included: 50277 for Pythia's tokenizer."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def eod_id(tokenizer: Tokenizer, token: str | None = None) -> int:
    """Return the id of the end-of-document token.

    Args:
        token: its name; None: the first of ``EOD_TOKENS`` in the vocabulary.

    Raises:
        ValueError: it is not in the vocabulary.
    """
    for name in EOD_TOKENS if token is None else (token,):
        if (id_ := tokenizer.token_to_id(name)) is not None:
            return id_
    if token is not None:
        raise ValueError(f"the tokenizer has no token {token}; pass --eod-token with the name of one that it has")
    raise ValueError(
        f"the tokenizer has no end-of-document token ({', '.join(EOD_TOKENS)}); pass --eod-token with another name"
    )


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that stands for text outside of the vocabulary; None if there is none."""
    model = tokenizer.model
    if isinstance(model, models.Unigram):
        return json.loads(tokenizer.to_str())["model"]["unk_id"]
    return tokenizer.token_to_id(model.unk_token) if model.unk_token else None


def drops_text(tokenizer: Tokenizer) -> bool:
    """Whether characters outside of the vocabulary give no ids at all, and no error.

    This is the case with a BPE without unknown token that does not have all bytes of UTF-8 as
    tokens.
    """
    if not isinstance(tokenizer.model, models.BPE) or tokenizer.model.unk_token is not None:
        return False
    state = json.loads(tokenizer.to_str())
    if state["model"]["byte_fallback"]:
        needed = {f"<0x{byte:02X}>" for byte in UTF8_BYTES}
    elif '"ByteLevel"' in json.dumps([state["normalizer"], state["pre_tokenizer"]]):
        needed = byte_level_tokens()
    else:
        return True
    return any(tokenizer.token_to_id(token) is None for token in needed)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE like GPT-NeoX's: ``<|endoftext|>`` is id 0, ``<|padding|>`` id 1.

    All 256 bytes are tokens and text is not normalised (GPT-NeoX's tokenizer applies NFC), so
    decoding the ids of any text returns that text unchanged. A small text may yield fewer than
    ``vocab_size`` tokens.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes and the two special tokens.
    """
    special_tokens = [EOD_TOKENS[0], PADDING_TOKENS[0]]
    smallest = len(special_tokens) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


SAFE_CUT = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")


def cuts_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether text can be cut before a space between two ASCII letters without changing its ids.

    This is the case with GPT-2's pre-tokenizer (GPT-NeoX, Pythia, :func:`train_tokenizer`), whose
    regular expression always starts a word there, if the normalizer is none or NFC (which composes
    nothing across a space) and no added token contains such a place.
    """
    state = json.loads(tokenizer.to_str())
    pre, normalizer = state["pre_tokenizer"] or {}, state["normalizer"] or {"type": "NFC"}
    is_gpt2 = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    is_added_free = not any(SAFE_CUT.search(token["content"]) for token in state["added_tokens"])
    return bool(is_gpt2 and is_added_free and normalizer["type"] == "NFC")


def cut_text(text: str, length: int) -> list[str]:
    """Cut a text into pieces of about ``length`` characters, see :func:`cuts_at_spaces`."""
    pieces, start = [], 0
    while len(text) - start > length and (cut := SAFE_CUT.search(text, start + length)):
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]
