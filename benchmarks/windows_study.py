"""Train the recipes `windows/…` one after another on one GPU, and evaluate each.

    python benchmarks/windows_study.py full drawn --store stores/study --text held-out/*.txt
    python benchmarks/windows_study.py drawn --seed 2 --store stores/study --text held-out/*.txt
    python benchmarks/windows_study.py full --store stores/study --minutes 9    # only trains
    python benchmarks/windows_report.py windows                                 # tables and picture

Every run reads the same samples in the same order. Each result goes to FOLDER/results/NAME.json as
soon as it is measured. The same command trains unfinished runs further (`--minutes` stops them in
time), and measures what is missing. Settings such as `train.micro_batch_size=16` apply to all runs.

Measured, each on as many texts as are given, in one batch:

- perplexity of the first `--length` tokens of every text, streamed through caches of `--sizes`
  tokens of which `--kept` are the first ones, in chunks at the speed of a prefill;
- the mean loss of each text in these caches;
- the loss by position, to that length, in the caches that keep the model's own sinks;
- the loss of pieces of one trained length, by position, in one pass as in training; and streamed
  through a cache that holds them, where it must be the same but for rounding;
- the sink rate, in sequences of 512 positions;
- validation loss, tokens/s, memory and losses of the training, from its metrics.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.folders import list_checkpoints
from sinklm.eval.perplexity import read_text_files
from sinklm.eval.sinks import measure
from sinklm.files import write_json
from sinklm.models.cost import count_parameters
from sinklm.streaming import stream_losses
from sinklm.train.recipe import load_config
from sinklm.train.stopping import REQUEUE_STATUS

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
from results import of_training

SINK_SEQUENCES, SINK_POSITIONS, SINK_EPSILON = 16, 512, 0.3


def main() -> None:
    arguments = parsed()
    failed = []
    for name in arguments.names:
        label = name if arguments.seed is None else f"{name}-seed-{arguments.seed}"
        try:
            study(name, label, arguments)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{label}: FAILED: {error}", flush=True)
            failed.append(label)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="of a recipe in windows/; or key=value for all runs")
    parser.add_argument("--store", type=Path, help="token store; none: do not train")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="held-out texts; none: do not evaluate")
    parser.add_argument("--folder", type=Path, default=Path("windows"))
    parser.add_argument(
        "--seed", type=int, help="of the weights, the data order and the windows; default: the recipe's"
    )
    parser.add_argument("--tokens", type=float, help="positions to train on; default: the recipe's")
    parser.add_argument("--minutes", type=float, help="of training in this call, for each run")
    parser.add_argument("--length", type=int, default=65_536, help="tokens of each text")
    parser.add_argument("--sizes", default=",".join(str(2**n) for n in range(5, 13)), help="tokens in each cache")
    parser.add_argument("--kept", default="0,1,4", help="first tokens in the caches")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of each text in a pass; changes only memory")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    arguments = parser.parse_intermixed_args()
    arguments.settings = [name for name in arguments.names if "=" in name]
    arguments.names = [name for name in arguments.names if "=" not in name]
    arguments.sizes, arguments.kept = (list(map(int, text.split(","))) for text in (arguments.sizes, arguments.kept))
    return arguments


def study(name: str, label: str, arguments: argparse.Namespace) -> None:
    """Train a run as far as the time allows, and evaluate it when it is finished."""
    run, path = arguments.folder / "runs" / label, arguments.folder / "results" / f"{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if arguments.store is not None:
        train(name, run, arguments)
    if not list_checkpoints(run):
        raise ValueError(f"{run} has no checkpoint: train it with --store")
    trained = of_training(run)
    if arguments.again or found.get("tokens") != trained["tokens"]:
        found = {}
    found |= {"recipe": f"windows/{name}", **trained}
    write_json(path, found)
    if arguments.store is not None and not trained["is_finished"]:
        print(f"{label}: not finished; run the same command again, or evaluate it without --store", flush=True)
    elif arguments.text:
        for _ in evaluate(run, found, arguments):
            write_json(path, found)
    print(f"{label}: {path}", flush=True)


def train(name: str, run: Path, arguments: argparse.Namespace) -> None:
    """Run `sinklm train` in a process of its own; it resumes the run if there is one.

    Raises:
        RuntimeError: it failed.
    """
    settings = [f"data.path={arguments.store}", f"train.run_dir={run}", *arguments.settings]
    if arguments.seed is not None:
        settings.append(f"train.seed={arguments.seed}")
    if arguments.tokens:
        batch = load_config(f"windows/{name}", settings).train.batch_size_tokens
        settings.append(f"train.num_steps={round(arguments.tokens / batch)}")
    if arguments.minutes:
        settings.append(f"train.max_minutes={arguments.minutes}")
    status = subprocess.run([sys.executable, "-m", "sinklm.train", f"windows/{name}", *settings]).returncode
    if status not in (0, REQUEUE_STATUS):
        raise RuntimeError(f"training ended with status {status}")


def max_checkpoint(run: Path) -> Path:
    checkpoints = list_checkpoints(run)
    return checkpoints[max(checkpoints)]


def evaluate(run: Path, found: dict[str, Any], arguments: argparse.Namespace) -> Iterator[None]:
    """Add the measurements that are missing to ``found``; yields after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = load_model(max_checkpoint(run), device=device, dtype=dtype)
    tokenizer = load_tokenizer(max_checkpoint(run))
    num_sinks = model.config.num_sinks
    found["num_parameters"], found["num_sinks"] = count_parameters(model.config), num_sinks
    texts = [read_text_files([path], tokenizer, arguments.length) for path in arguments.text]
    ids = torch.stack([text.ids for text in texts])
    facts = {
        "files": [path.name for path in arguments.text],
        "sha256": [text.sha256 for text in texts],
        "num_tokens": ids.numel(),
        "length": arguments.length,
        "dtype": str(dtype).removeprefix("torch."),
        "bin_edges": position_edges(arguments.length - 1),
    }
    if found.get("text") != facts:
        found |= {"text": facts, "perplexity": {}, "binned_losses": {}, "text_losses": {}}
        for key in ("pieces", "sinks"):
            found.pop(key, None)
    texts_of = found.setdefault("text_losses", {})  # results of an older version have none
    for num_kept, size in ((kept, size) for size in arguments.sizes for kept in arguments.kept):
        cache = f"{num_kept}+{size - num_kept}"
        if num_kept < size and not (cache in found["perplexity"] and cache in texts_of):
            began = time.perf_counter()
            losses = streamed(model, ids, num_kept, size - num_kept, arguments.chunk)
            found["perplexity"][cache] = losses.mean().exp().item()
            texts_of[cache] = [round(loss, 6) for loss in losses.mean(1).tolist()]
            if num_kept == num_sinks:
                found["binned_losses"][cache] = binned(losses, facts["bin_edges"])
            seconds = time.perf_counter() - began
            print(f"{run.name}: {cache} {found['perplexity'][cache]:.3f} in {seconds:.1f} s", flush=True)
            yield
    if "pieces" not in found:
        found["pieces"] = of_pieces(model, ids, arguments.chunk)
        yield
    if "sinks" not in found:
        found["sinks"] = sink_rates(model, ids)
        yield


def streamed(model: Any, ids: torch.Tensor, num_kept: int, window: int, chunk: int) -> torch.Tensor:
    """Return the losses of the tokens 1 … T - 1 of streams ``ids`` ``(B, T)``, on the CPU.

    Raises:
        ValueError: a loss is not finite.
    """
    chunks = stream_losses(model, ids, num_kept=num_kept, window=window, chunk_size=chunk)
    losses = torch.cat([chunk.cpu() for chunk in chunks], dim=1).double()
    if not losses.isfinite().all():
        raise ValueError(f"a loss with the cache {num_kept}+{window} is not finite")
    return losses


@torch.inference_mode()
def of_pieces(model: Any, ids: torch.Tensor, chunk: int) -> dict[str, Any]:
    """Return the losses of pieces of the texts in one pass each, as in training, and streamed.

    The pieces have the trained length and begin anywhere in a text. The cache holds a whole piece,
    so each layer sees all of it, or as much as its window covers.
    """
    length = min(ids.shape[1], model.config.max_position_embeddings - model.config.num_sinks)
    pieces = torch.cat(ids[:, : ids.shape[1] // length * length].split(length, dim=1))  # (pieces, length)
    in_one_pass, in_cache = [], []
    num_kept = max(model.config.num_sinks, model.config.num_kept or 0)
    for batch in pieces.split(len(ids)):
        for row in batch.to(model.device):
            logits = model(row[None]).logits[0, :-1].float()
            in_one_pass.append(cross_entropy(logits, row[1:], reduction="none").cpu().double())
        in_cache.append(streamed(model, batch, num_kept, length - 1, chunk))
    losses, edges = torch.stack(in_one_pass), position_edges(length - 1)
    return {
        "num_pieces": len(pieces),
        "length": length,
        "loss": losses.mean().item(),
        "streamed": torch.cat(in_cache).mean().item(),
        "bin_edges": edges,
        "binned_losses": binned(losses, edges),
    }


def position_edges(num_tokens: int) -> list[int]:
    """Return edges of bins of positions, four in an octave; powers of two from 64 on are edges."""
    edges = [0]
    while (edge := round(64 * 2 ** ((len(edges) - 1) / 4))) < num_tokens:
        edges.append(edge)
    return [*edges, num_tokens]


def binned(losses: torch.Tensor, edges: list[int]) -> list[float]:
    """Return the mean loss over all texts in each bin of positions."""
    return [losses[:, a:b].mean().item() for a, b in pairwise(edges)]


def sink_rates(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Return the sink rate of the first positions, the text's first token and of no token."""
    num_sinks = model.config.num_sinks
    num_text = min(SINK_POSITIONS, model.config.max_position_embeddings) - num_sinks
    starts = [i * (ids.shape[1] - num_text) // SINK_SEQUENCES for i in range(SINK_SEQUENCES)]
    rows = [ids[i % len(ids), start : start + num_text] for i, start in enumerate(starts)]
    found = measure(model, torch.stack(rows), epsilon=SINK_EPSILON)
    places = {**{f"sink token {i + 1}": i for i in range(num_sinks)}, "first text token": num_sinks, "no token": -1}
    return {
        "num_sequences": len(rows),
        "positions": num_text + num_sinks,
        "epsilon": SINK_EPSILON,
        "sink_rate": {name: found.sink_rate[..., k].mean().item() for name, k in places.items()},
        "mass": {name: found.mass[..., k].mean().item() for name, k in places.items()},
    }


if __name__ == "__main__":
    main()
