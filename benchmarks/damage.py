"""Damage files at random and count what sinklm does: is any damage unnoticed?

    python benchmarks/damage.py --trials 400

Makes a token store, a run with two checkpoints and an export in a temporary folder. A trial copies
one of them, flips a random bit of a random file or truncates it, and uses the copy:

- ``checkpoint``: the newest one of a run is damaged, and `sinklm train` resumes. The result is the
  losses and the final weights.
- ``evaluation``: ``model/`` of a checkpoint is damaged, and the model and its tokenizer are loaded.
  The result is the logits of a text.
- ``export``: the same with an export.
- ``store``: a token store is damaged and opened. The result is all tokens and the tokenizer.

The outcome of a trial is one of:

- ``recovered``: a warning, and the result that undamaged files give;
- ``error``: an error of one line that names the folder, with which a command ends;
- ``same``: no message, and the result that undamaged files give: nothing read what was damaged;
- ``SILENT``: no message and another result;
- ``TRACEBACK``: an error of another kind.

All trials run in one process on the CPU. The exit status is 1 if an outcome is in capitals.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model
from sinklm.data import find_inputs, open_store, prepare_store
from sinklm.data.tokenizer import train_tokenizer
from sinklm.train.run import train

OUTCOMES = ("recovered", "error", "same", "SILENT", "TRACEBACK")
NEWEST = "checkpoints/step-4"
RECIPE = """
model: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 32}
train: {seq_length: 32, batch_size_tokens: 128, micro_batch_size: 4, precision: fp32, num_steps: 5}
optimizer: {lr: 1.0e-2}
validation: {every_steps: null}
checkpoint: {every_steps: 2}
deepspeed: {zero_stage: %d}
wandb: {mode: disabled}
data: {path: %s}
"""


@dataclass(frozen=True)
class Target:
    """What is damaged: files in the folder ``damaged`` of a copy of ``source``."""

    name: str
    source: Path
    damaged: str
    use: Callable[[Path], str]  # returns a digest of the result


def make_targets(folder: Path, zero_stage: int) -> list[Target]:
    """Make a store, a run and an export in ``folder``."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices(["sun", "moon", "sea", "stone", "wind", "tree"], k=60)) for _ in range(60)]
    train_tokenizer(texts, vocab_size=270).save(str(folder / "tokenizer.json"))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = find_inputs([str(folder / "corpus.jsonl")]).shards
    store, run, recipe = folder / "store", folder / "run", folder / "recipe.yaml"
    prepare_store(shards, store, tokenizer=str(folder / "tokenizer.json"), validation_fraction=0.1, num_processes=1)
    open_store(store)
    recipe.write_text(RECIPE % (zero_stage, store))
    train(str(recipe), [f"train.run_dir={run}"])
    shutil.rmtree(run / "checkpoints" / "step-5")  # as if it had been stopped after step 4
    export = export_model(run, folder / "export")

    def resume(copy: Path) -> str:
        train(str(recipe), [f"train.run_dir={copy}"])
        lines = map(json.loads, (copy / "metrics.jsonl").read_text().splitlines())
        losses = [(line["step"], line["loss"]) for line in lines]
        return digest(repr(losses).encode(), (copy / "checkpoints/step-5/model/model.safetensors").read_bytes())

    return [
        Target("checkpoint", run, NEWEST, resume),
        Target("evaluation", run, f"{NEWEST}/model", evaluate),
        Target("export", export, ".", evaluate),
        Target("store", store, ".", read_store),
    ]


def evaluate(copy: Path) -> str:
    model, tokenizer = load_model(copy, device="cpu"), load_tokenizer(copy)
    ids = tokenizer("the sun and the moon", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    settings = model.generation_config.to_dict() | {"transformers_version": None}
    return digest(logits.numpy().tobytes(), repr(ids.tolist()).encode(), repr(settings).encode())


def read_store(copy: Path) -> str:
    store = open_store(copy)
    splits = [store.split(name) for name in ("train", "validation")]
    tokens = [split.read(0, len(split)).tobytes() for split in splits]
    return digest(*tokens, store.tokenizer_path.read_bytes(), repr((store.tokenizer_size, store.eod_id)).encode())


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def damage(path: Path, chance: random.Random) -> str:
    """Flip a bit of a file, or truncate it. Returns what was done."""
    content = bytearray(path.read_bytes())
    if chance.random() < 0.25:
        length = chance.randrange(len(content))
        path.write_bytes(content[:length])
        return f"{path.name} truncated to {length} of {len(content)} bytes"
    position, bit = chance.randrange(len(content)), chance.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} with bit {bit} of byte {position} flipped"


def try_once(target: Target, folder: Path, expected: str, chance: random.Random) -> tuple[str, str]:
    """Return the outcome of a trial, and a description of it."""
    copy = folder / "copy"
    shutil.copytree(target.source, copy)
    files = sorted(path for path in (copy / target.damaged).rglob("*") if path.is_file() and path.stat().st_size)
    done = damage(chance.choice(files), chance)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            is_right = target.use(copy) == expected
    except (ValueError, OSError) as error:
        is_clear = len(str(error).splitlines()) == 1 and str(copy) in str(error)
        return "error" if is_clear else "TRACEBACK", f"{done}: {type(error).__name__}: {error}"
    except Exception as error:
        return "TRACEBACK", f"{done}: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(copy)
    if not is_right:
        return "SILENT", done
    return "recovered" if "warning:" in output.getvalue() else "same", done


def measure(num_trials: int, seed: int, zero_stage: int, names: list[str] | None = None) -> dict[str, Counter[str]]:
    """Run ``num_trials`` trials for each target. Prints failures and returns the outcomes."""
    chance, outcomes = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        with contextlib.redirect_stdout(io.StringIO()):
            targets = make_targets(folder, zero_stage)
        for target in targets:
            if names and target.name not in names:
                continue
            start = time.perf_counter()
            shutil.copytree(target.source, folder / "copy")
            with contextlib.redirect_stdout(io.StringIO()):
                expected = target.use(folder / "copy")
            shutil.rmtree(folder / "copy")
            counts = outcomes[target.name] = Counter[str]()
            for _ in range(num_trials):
                outcome, description = try_once(target, folder, expected, chance)
                counts[outcome] += 1
                if outcome.isupper():
                    print(f"{target.name}: {outcome}: {description}", flush=True)
            cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
            print(f"| {target.name} | {num_trials} | {cells} | {time.perf_counter() - start:.0f} s |", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="trials for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--targets", help="comma-separated; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| damaged | trials | {' | '.join(OUTCOMES)} | time |\n|---|---|---|---|---|---|---|---|")
    names = arguments.targets.split(",") if arguments.targets else None
    outcomes = measure(arguments.trials, arguments.seed, arguments.zero_stage, names)
    sys.exit(any(outcome.isupper() for counts in outcomes.values() for outcome in counts))


if __name__ == "__main__":
    main()
