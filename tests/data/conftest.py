"""A small tokenizer for the tests of data."""

import random
from pathlib import Path

import pytest

from sinklm.data.tokenizer import train_tokenizer

from .corpora import random_text


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([random_text(random.Random(0), 20000)], vocab_size=320).save(str(path))
    return path
