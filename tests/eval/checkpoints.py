"""Model folders as written by training: a small random model with its tokenizer."""

import inspect
import json
import textwrap
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sinklm.data.tokenizer import tokenizer_size, train_tokenizer
from sinklm.models import SinkGPTNeoXForCausalLM

from ..models.tiny import draw_sinks, sharpen, tiny_config

END_OF_TEXT = "<|endoftext|>"


@cache
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 400 tokens."""
    return train_tokenizer([inspect.getsource(textwrap), inspect.getsource(inspect)], vocab_size=400)


def small_model(num_sinks: int, dtype: torch.dtype = torch.float32, **overrides) -> SinkGPTNeoXForCausalLM:
    """A model for `small_tokenizer`; its sink tokens are the first ids after the vocabulary."""
    size = tokenizer_size(small_tokenizer())
    sink = {"kind": "token", "num_tokens": num_sinks, "first_token_id": size} if num_sinks else {"kind": "none"}
    config = tiny_config(num_sinks, **{"sink": sink, "vocab_size": size + 8, **overrides})
    model = SinkGPTNeoXForCausalLM(config).to(dtype).eval()
    sharpen(model)
    draw_sinks(model)
    return model


def write_checkpoint(folder: Path, model: SinkGPTNeoXForCausalLM) -> Path:
    """The ``model/`` folder of a training checkpoint."""
    model.save_pretrained(folder)
    small_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
