"""Measure every checkpoint of a run of retrofit_study.py, which calls this script.

    python benchmarks/retrofit_measure.py RUN --store STORE --text book.txt --window 124 -o RUN.json

- Perplexity of the first `--length` tokens of every text, streamed through the caches K+N with
  N = `--window` recent tokens and K of `--kept` first ones, sinks included.
- The loss on `--held-out` tokens of each set of the store's validation split. Every token but the
  first is scored, so models with and without a sink score the same ones.
- The sink rate, as windows_study.py measures it.

Measured are the checkpoints of `checkpoint.pythia_steps` and the last one, in float32. Those that
the output already has are not measured again. When all are measured, all but the last checkpoint
are deleted, because a study has hundreds.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from windows_study import sink_rates, streamed

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.folders import list_checkpoints, read_state
from sinklm.eval.loading import open_store_of
from sinklm.eval.perplexity import read_text_files
from sinklm.eval.set_perplexity import measure, sets_of
from sinklm.files import write_json
from sinklm.train.checkpoint import delete_checkpoints
from sinklm.train.recipe import load_config
from sinklm.train.schedule import saves_after


def main() -> None:
    arguments = parse()
    config = load_config(str(arguments.run))
    is_wanted = saves_after(config.train.num_steps, config.checkpoint)
    checkpoints = {step: path for step, path in list_checkpoints(arguments.run).items() if is_wanted(step)}
    if not checkpoints:
        raise ValueError(f"{arguments.run} has no checkpoint to measure: train it with retrofit_study.py")
    found: dict[str, Any] = {"checkpoints": {}}
    if arguments.output.exists():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))
    found["data_fingerprint"] = read_state(max_of(checkpoints)).data_fingerprint
    found["environment"] = json.loads((arguments.run / "environment.json").read_text(encoding="utf-8"))
    for step, path in checkpoints.items():
        if str(step) not in found["checkpoints"]:
            found["checkpoints"][str(step)] = {"tokens": read_state(path).positions, **measured(path, found, arguments)}
            write_json(arguments.output, found)
            print(step, json.dumps(found["checkpoints"][str(step)]), flush=True)
    existing = list_checkpoints(arguments.run)
    if max_of(existing) == max_of(checkpoints):  # else the run goes on from a later one
        delete_checkpoints([path for path in existing.values() if path != max_of(checkpoints)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out text; repeatable")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of each text")
    parser.add_argument("--held-out", type=int, default=131_072, help="tokens of each set of the store")
    parser.add_argument("--window", type=int, required=True, help="recent tokens in the caches")
    parser.add_argument("--kept", type=int, nargs="+", default=[0, 1, 4], help="first tokens in the caches")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of each text in a pass; changes only memory")
    parser.add_argument("--output", "-o", type=Path, required=True)
    return parser.parse_args()


def max_of(checkpoints: dict[int, Path]) -> Path:
    return checkpoints[max(checkpoints)]


def measured(checkpoint: Path, found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of a checkpoint; facts about the texts go to ``found``.

    Raises:
        ValueError: a text is too short, or a loss is not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(checkpoint, device=device, dtype=torch.float32), load_tokenizer(checkpoint)
    texts = [read_text_files([path], tokenizer, arguments.length) for path in arguments.text]
    found["text"] = {"sha256": [text.sha256 for text in texts], "length": arguments.length}
    ids = torch.stack([text.ids for text in texts])
    perplexity = {}
    for num_kept in arguments.kept:
        losses = streamed(model, ids, num_kept, arguments.window, arguments.chunk)
        perplexity[f"{num_kept}+{arguments.window}"] = losses.mean().exp().item()
    sets = sets_of(open_store_of(arguments.store, tokenizer)).items()
    losses = [measure(model, tokenizer, *each, max_tokens=arguments.held_out) for each in sets]
    loss = math.fsum(each.nats for each in losses) / sum(each.num_tokens for each in losses)
    return {"perplexity": perplexity, "loss": loss, "sinks": sink_rates(model, ids)}


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
