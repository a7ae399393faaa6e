"""The commands work with the models of every family, or say why they do not."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.streaming.testing import random_model

from ..streaming import small_families

COMMANDS = {
    "generate": "{model} w1 --max-new-tokens 4",
    "generate --stream": "{model} w1 --cache 1+4 --max-new-tokens 9",
    "eval streaming": "{model} --text {text} --tokens 24 --caches 0+5,1+4 --methods dense,window,streaming,recompute",
    "eval sinks": "{model} --text {text} --num-sequences 2 --seq-length 8",
    "bench decode": "{model} --caches 1+4 --num-steps 3",
}
REFUSED = {
    ("falcon:rw", "eval sinks"): "transformers adds its ALiBi biases twice",
    ("gemma3n_text", "eval sinks"): "they have several residual streams",
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", small_families.FAMILIES)
def test_every_command_reads_the_models_of_a_family(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, text = tmp_path / "model", tmp_path / "text"
    random_model(small_families.config(name)).save_pretrained(model)
    tokenizer().save_pretrained(model)
    text.write_text("w1 w2 w34 w5 " * 9)
    for command, arguments in COMMANDS.items():
        given = arguments.format(model=model, text=text).split()
        result = CliRunner().invoke(app, [*command.split(), *given])
        if (name, command) in REFUSED:
            assert isinstance(result.exception, ValueError)
            assert REFUSED[name, command] in str(result.exception)
        else:
            assert result.exception is None, (command, result.exception)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE for words such as w12, which all families load as it is."""
    vocab = {token: id_ for id_, token in enumerate(["<eos>", "Ġ", "w", *"0123456789"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
