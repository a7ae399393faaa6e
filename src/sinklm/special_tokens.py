"""Tokens of a tokenizer: those that its template adds, sinks, padding, and the bytes of text."""

import json
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

PADDING_TOKENS = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]", "<PAD>", "<|finetune_right_pad_id|>", "<|PAD_TOKEN|>")

NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes; Pythia's tokenizer has no tokens for them
UTF8_BYTES = tuple(byte for byte in range(256) if byte not in NEVER_IN_UTF8)


def byte_level_tokens() -> set[str]:
    """Return the tokens that a byte-level BPE needs for all text: one for each byte of UTF-8."""
    return set(pre_tokenizers.ByteLevel.alphabet()) - {chr(byte) for byte in NEVER_IN_UTF8}  # chr: as they are spelt


def sink_names(num_sinks: int) -> list[str]:
    """Return the names of the sinks in a tokenizer: ``<|sink|>``, ``<|sink2|>``, …"""
    return ["<|sink|>", *(f"<|sink{i}|>" for i in range(2, num_sinks + 1))][:num_sinks]


def drop_sinks(state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Remove the sinks that sinklm has added to a tokenizer, if they have the last ids.

    Args:
        state: the content of a ``tokenizer.json``.

    Returns:
        The rest of it, and the names of the sinks that it no longer has.
    """
    added = sorted(state.get("added_tokens") or [], key=lambda token: token["id"])
    vocabulary = state["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # pairs of a token and its score (Unigram)
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    for number in range(len(added), 0, -1):
        sinks, others = added[-number:], added[:-number]
        names = [token["content"] for token in sinks]
        if names == sink_names(number):
            other_ids = [*vocabulary.values(), *(token["id"] for token in others)]
            if sinks[0]["id"] > max(other_ids, default=-1):
                return {**state, "added_tokens": others}, names
    return state, []


def drop_template(processor: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Remove from a post-processor what adds special tokens to a text.

    Args:
        processor: the value of ``post_processor`` in a ``tokenizer.json``.

    Returns:
        The rest of the post-processor, and the names of the tokens that it no longer adds.
    """
    kind = (processor or {}).get("type")
    if processor is None or kind == "ByteLevel":  # it changes offsets only
        return processor, []
    if kind == "Sequence":
        parts = [drop_template(part) for part in processor["processors"]]
        kept = [part for part, _ in parts if part is not None]
        names = [name for _, names in parts for name in names]
        return ({**processor, "processors": kept} if kept else None), names
    if kind == "TemplateProcessing":
        pieces = [*processor["single"], *processor["pair"]]
        names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        return (None, list(dict.fromkeys(names))) if names else (processor, [])
    if kind == "BertProcessing":
        return None, [processor["cls"][0], processor["sep"][0]]
    if kind == "RobertaProcessing":
        rest = {key: processor[key] for key in ("add_prefix_space", "trim_offsets")}
        return {"type": "ByteLevel", **rest, "use_regex": True}, [processor["cls"][0], processor["sep"][0]]
    return processor, []


def without_template(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that adds no special tokens to a text; the same object if it adds none.

    Raises:
        ValueError: its post-processor is of an unknown type that adds tokens.
    """
    state = json.loads(tokenizer.to_str())
    state["post_processor"], names = drop_template(state["post_processor"])
    if names:
        tokenizer = Tokenizer.from_str(json.dumps(state, ensure_ascii=False))
    if tokenizer.num_special_tokens_to_add(False):
        raise ValueError(
            f"the tokenizer's post-processor {state['post_processor']['type']} adds special tokens to each text and is "
            "not supported; remove it from tokenizer.json"
        )
    return tokenizer


def padding_token(tokenizer: Tokenizer) -> str | None:
    """Return the tokenizer's padding token, or None.

    The end-of-text token is no substitute: in fine-tuning, padding is masked in the labels, so the
    model would not learn to end a text.
    """
    return next((name for name in PADDING_TOKENS if tokenizer.token_to_id(name) is not None), None)
