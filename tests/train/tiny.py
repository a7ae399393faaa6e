"""A tiny store, a tiny recipe, and its runs."""

import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from sinklm.data import find_inputs, prepare_store
from sinklm.data.tokenizer import train_tokenizer
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import loop
from sinklm.train.batches import MicroBatches

from ..checkpoints.seal import seal
from ..data.processes import InProcessPool

RECIPE = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 32}
train: {num_steps: 8, seq_length: 32, batch_size_tokens: 256, micro_batch_size: 4, precision: fp32, seed: 7}
optimizer: {lr: 1.0e-2, warmup_ratio: 0.25}
validation: {every_steps: 4, num_samples: 5}
checkpoint: {every_steps: 4}
wandb: {mode: disabled}
"""


def make_store(folder: Path, seed: int = 0) -> Path:
    """A fixed store of random words: about 10,000 tokens, a vocabulary of 300."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(chance.choices(words, weights=range(1, 201), k=chance.randint(20, 80))) for _ in range(150)]
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(texts, vocab_size=300).save(str(tokenizer))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare_here(corpus, folder / "store", tokenizer=str(tokenizer))


def prepare_here(corpus: Path, store: Path, **settings: Any) -> Path:
    """Prepare a store in this process."""
    with patch("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool):
        prepare_store(find_inputs([str(corpus)]).shards, store, **{"validation_fraction": 0.1, **settings})
    return store


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["loss"] for line in metrics(run_dir) if "loss" in line}


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step}" / "model" / "model.safetensors")


def moments(run_dir: Path, step: int) -> list[torch.Tensor]:
    """AdamW's state in a checkpoint."""
    found: list[torch.Tensor] = []

    def search(value: object, key: str = "") -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                search(inner, str(name))
        elif isinstance(value, list):
            for inner in value:
                search(inner, key)
        elif isinstance(value, torch.Tensor) and key in ("exp_avg", "exp_avg_sq", "step"):
            found.append(value)

    for path in sorted((run_dir / "checkpoints" / f"step-{step}" / "deepspeed").glob("*.pt")):
        search(torch.load(path, weights_only=False))
    return found


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def copy_checkpoint(run_dir: Path, step: int, other_run_dir: Path) -> None:
    """Create another run's folder as if that run had been stopped after ``step``."""
    shutil.copytree(run_dir / "checkpoints" / f"step-{step}", other_run_dir / "checkpoints" / f"step-{step}")
    shutil.copy(run_dir / "metrics.jsonl", other_run_dir / "metrics.jsonl")


def edit_state(checkpoint: Path, **values: Any) -> None:
    """Change values of ``state.json``, and the manifest accordingly."""
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    seal(checkpoint)


def flip_bit(path: Path, position: float = 0.5, bit: int = 0) -> None:
    """Flip a bit of the byte at a fraction of a file's length."""
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)


@contextmanager
def bad_loss_in(step: int, num_micro_batches: int, factor: float = float("nan")) -> Iterator[None]:
    """Multiply the loss in one training step of this process, counted from 1."""
    forward, calls = SinkGPTNeoXForCausalLM.forward, itertools.count()

    def diverging(self: SinkGPTNeoXForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training and next(calls) // num_micro_batches == step - 1:
            output.loss = output.loss * factor
        return output

    with patch.object(SinkGPTNeoXForCausalLM, "forward", diverging):
        yield


@contextmanager
def hang_in(step: int, num_micro_batches: int) -> Iterator[None]:
    """Wait forever for the samples of one training step of this process, counted from 1."""
    following, calls = MicroBatches.__next__, itertools.count()

    def hanging(self: MicroBatches) -> torch.Tensor:
        if next(calls) // num_micro_batches == step - 1:
            time.sleep(1000)
        return following(self)

    with patch.object(MicroBatches, "__next__", hanging):
        yield


def ahead() -> Any:
    """A context in which a step is queued before the previous one is read, as on a GPU."""
    return patch.object(loop, "runs_ahead", lambda _: True)


def wait_for_step(run_dir: Path, step: int, timeout: float = 300) -> None:
    """Wait until the run has recorded a step."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError, ValueError):  # the last line may be incomplete
            if any(line["step"] >= step for line in metrics(run_dir)):
                return
        time.sleep(0.02)
    raise TimeoutError(f"{run_dir} did not reach step {step}")
