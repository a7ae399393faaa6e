"""The tokenizer in the folder of a model: it defines the sink tokens and adds none to a text."""

import json
from pathlib import Path

from ..models import SinkGPTNeoXConfig
from ..special_tokens import padding_token, without_template
from .checks import read_tokenizer
from .export import BATCH_SETTINGS, name_sinks


def write_tokenizer(folder: Path, config: SinkGPTNeoXConfig, tokenizer_path: Path) -> None:
    """Write a tokenizer to the folder of a model.

    It defines the sink tokens, so that tokens added later do not get their ids. It does not prepend
    them to a text: the model does. Like that of the store, it adds no other tokens either.

    Raises:
        ValueError: the file is not a tokenizer, or its next free ids are not those of the sinks.
    """
    tokenizer = without_template(read_tokenizer(tokenizer_path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    name_sinks(tokenizer, config.sink_token_ids, tokenizer_path)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    end_of_document = tokenizer.id_to_token(config.eos_token_id)  # type: ignore[arg-type]
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_document,
        "eos_token": end_of_document,
        "unk_token": end_of_document,
        "add_bos_token": False,
        "model_max_length": config.max_position_embeddings - config.num_sinks,
        "clean_up_tokenization_spaces": False,
        **BATCH_SETTINGS,
    }
    if (padding := padding_token(tokenizer)) is not None:
        description["pad_token"] = padding
    (folder / "tokenizer_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
