"""Recall, perplexity and time of a streaming cache with a memory beyond its window.

    python benchmarks/stream_memory.py MODEL --text BOOK -o memory.json

MODEL is a transformers folder, a run or checkpoint of sinklm. BOOK is a text file. Parts that the
output file already has are replaced, the others are kept; a part that fails is reported.

- recall: a pass key of five digits is told once, in a text of BOOK. After each of --distances
  tokens, the model is asked for it, and continues after the answer as if it had not been asked.
  All --num-samples texts are rows of one batch. Blocks are chosen by the memory, at random, or by
  an oracle that knows where the key is. "dense" is the cache of transformers.
- lines: StreamEval: records of --num-lines lines, with questions for lines --line-distances back.
  An answer follows its question at once, so blocks must be chosen while the question is read.
- perplexity: of the first --num-tokens tokens of BOOK.
- speed: milliseconds per token of `StreamingDecoder` on a GPU, of eager steps on a CPU, after the
  longest of --distances, and bytes of the cache on the device and in host memory.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from part_report import PartReport, with_spread
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.decode_speed import step_times
from sinklm.eval.report import library_versions
from sinklm.eval.stream_eval import RecordTokens, StreamBatch, read_lines
from sinklm.eval.tasks.stream_eval.records import make_records
from sinklm.models.cache_argument import CACHE
from sinklm.streaming import MemoryOptions, StreamingCache, StreamingDecoder, stream_losses
from sinklm.streaming.layer_memory import LayerMemory

PARTS = ("recall", "lines", "perplexity", "speed")
CACHES = ("cache", "memory", "random", "oracle", "dense")
NEEDLE, QUESTION = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n", "\n\nWhat is the pass key? "
ANSWER = "The pass key is"
MOST_BEFORE = 200  # tokens of the book before the pass key
NUM_STEPS = 64  # of which the speed is measured


class PassKeys:
    """Texts that tell a pass key, as rows of a batch.

    Attributes:
        ids: ``(B, T)``.
        keys: the pass key of each row.
        spans: first and last token of the sentence with the key, in each row.
        end: number of tokens after which all keys were told.
        question: ids of the question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, book: Tensor, num_rows: int, num_tokens: int):
        rng, rows = random.Random(1), []
        self.tokenizer, self.keys, self.spans = tokenizer, [], []
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        for row in range(num_rows):
            key = "".join(rng.choice("123456789") for _ in range(5))
            needle = self.encode(NEEDLE.format(key=key))
            start = max(0, len(book) - num_tokens - 2 * MOST_BEFORE) * row // num_rows
            before, text = rng.randrange(MOST_BEFORE), book[start:].tolist()
            begin = len(first) + before
            self.keys.append(key)
            self.spans.append((begin, begin + len(needle)))
            rows.append((first + text[:before] + needle + text[before:])[: MOST_BEFORE + 64 + num_tokens])
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"--text has {len(book):,} tokens, too few for a distance of {num_tokens:,}")
        self.end, self.ids = max(end for _, end in self.spans), torch.tensor(rows)
        self.question = torch.tensor(self.encode(QUESTION + ANSWER))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def share_answered(self, model: PreTrainedModel, cache: Cache) -> float:
        """Ask all rows for their key, on a copy of the cache; return how many in 100 answer it."""
        cache = copy.deepcopy(cache)
        ids = self.question.expand(len(self.keys), -1).to(model.device)
        answers = []
        for _ in range(len(self.keys[0]) + 2):
            ids = model(ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1:].argmax(-1)
            answers.append(ids)
        texts = self.tokenizer.batch_decode(torch.cat(answers, dim=1))
        return 100 * sum(key in text for key, text in zip(self.keys, texts, strict=True)) / len(texts)


@contextmanager
def chosen_by(weights: Callable[[LayerMemory, Tensor], Tensor]) -> Iterator[None]:
    """Choose the visible blocks with the largest of other weights.

    Args:
        weights: maps a memory and its weights ``(B, G, N, blocks)`` to others.
    """
    own = LayerMemory.weights

    def replaced(memory: LayerMemory, *arguments: Any) -> Tensor:
        found = own(memory, *arguments)
        return torch.where(found < 0, found, weights(memory, found))

    with mock.patch.object(LayerMemory, "weights", replaced):
        yield


def random_weights(memory: LayerMemory, weights: Tensor) -> Tensor:
    return torch.rand_like(weights)


def oracle_weights(spans: list[tuple[int, int]]) -> Callable[[LayerMemory, Tensor], Tensor]:
    """Return weights of the blocks with the key, those around them and then the last blocks.

    Args:
        spans: of each row of a batch. Several layers can choose together, and have these rows each.
    """

    def chosen(memory: LayerMemory, weights: Tensor) -> Tensor:
        num_blocks = weights.shape[-1]
        found = torch.arange(num_blocks, device=weights.device).to(weights).repeat(len(weights), 1)
        for row in range(len(weights)):
            begin, end = spans[row % len(spans)]
            blocks = [(token - memory.shape.num_kept) // memory.options.block_size for token in (begin, end - 1)]
            found[row, max(0, blocks[0] - 1) : blocks[1] + 2] = num_blocks
        return found[:, None, None]

    return chosen


def oracle_of_line(tokens: RecordTokens, record: list[int], line: int) -> AbstractContextManager[None]:
    """Choose the blocks with a line of a record and those around them."""
    begin, end = (len(tokens.beginnings([record], num_lines)[0]) for num_lines in (line, line + 1))
    return chosen_by(oracle_weights([(begin, end)]))


@torch.no_grad()
def recall(args: argparse.Namespace, name: str, size: str) -> list[dict]:
    model, distances = args.model, sorted(args.distances)
    texts = PassKeys(args.tokenizer, args.book, args.num_samples, distances[-1])
    contexts = {"random": chosen_by(random_weights), "oracle": chosen_by(oracle_weights(texts.spans))}
    cache = DynamicCache() if name == "dense" else new_cache(args, with_memory=name != "cache")
    row, read, start = {"size": size}, 0, time.perf_counter()
    torch.manual_seed(0)
    with contexts.get(name, nullcontext()):
        for distance in distances:
            until = texts.end + distance
            for part in texts.ids[:, read:until].split(1024, dim=1):
                model(part.to(model.device), use_cache=True, logits_to_keep=1, **{CACHE: cache})
            read = until
            row[f"{distance:,}"] = texts.share_answered(model, cache)
            print(name, distance, row[f"{distance:,}"], f"{time.perf_counter() - start:.0f} s", flush=True)
    return [row]


def lines(args: argparse.Namespace, name: str, size: str) -> list[dict]:
    """Measure StreamEval, one stream at a time."""
    tokens, memory = RecordTokens(args.tokenizer), None if name == "cache" else args.memory
    rights: dict[int, list[bool]] = {distance: [] for distance in args.line_distances}
    torch.manual_seed(0)
    with chosen_by(random_weights) if name == "random" else nullcontext():
        for record in make_records(args.num_samples, args.num_lines, seed=0):
            streams = StreamBatch(args.model, args.num_kept, args.window, memory)
            for last in read_lines(streams, tokens, [record]):
                for distance in (distance for distance in rights if distance <= last):
                    line = last - distance
                    with oracle_of_line(tokens, record, line) if name == "oracle" else nullcontext():
                        rights[distance] += streams.answers(*tokens.questions([record], line))
    shares = {f"{distance} lines": 100 * fmean(answers) for distance, answers in rights.items() if answers}
    return [{"size": size, **shares, "questions": {f"{d}": len(answers) for d, answers in rights.items()}}]


def perplexity(args: argparse.Namespace, name: str, size: str) -> list[dict]:
    ids = args.book[None, : args.num_tokens]
    options: dict[str, Any] = {"num_kept": args.num_kept, "window": args.window}
    losses = stream_losses(args.model, ids, memory=args.memory if name == "memory" else None, **options)
    total = sum(chunk.double().sum().item() for chunk in losses)
    return [{"size": size, "perplexity": math.exp(total / (ids.shape[1] - 1)), "tokens": ids.shape[1]}]


@torch.no_grad()
def speed(args: argparse.Namespace, name: str, size: str) -> list[dict]:
    cache, ids = new_cache(args, with_memory=name == "memory"), args.book[None, : max(args.distances)]
    start = time.perf_counter()
    for part in ids.split(1024, dim=1):
        logits = args.model(part.to(args.model.device), use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits
    prefill = time.perf_counter() - start

    def eager_step(ids: Tensor) -> Tensor:
        return args.model(ids, use_cache=True, **{CACHE: cache}).logits

    step = StreamingDecoder(args.model, cache) if args.model.device.type == "cuda" else eager_step

    def next_token() -> None:
        nonlocal logits
        logits = step(logits[:, -1:].argmax(-1))

    times = step_times(next_token, NUM_STEPS, NUM_STEPS)
    return [
        {
            "size": size,
            "tokens read": ids.shape[1],
            **with_spread("ms per token", times),
            "prefill tokens/s": ids.shape[1] / prefill,
            "bytes on device": cache.num_bytes,
            "bytes on host": cache.num_host_bytes,
        }
    ]


def new_cache(args: argparse.Namespace, *, with_memory: bool) -> StreamingCache:
    memory = args.memory if with_memory else None
    return StreamingCache.for_model(args.model, num_kept=args.num_kept, window=args.window, memory=memory)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--recall-caches", nargs="+", choices=CACHES, default=CACHES[:4], help="of recall and lines")
    parser.add_argument("--num-kept", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    for name, value in vars(MemoryOptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--distances", nargs="+", type=int, default=[500, 2000, 8000])
    parser.add_argument("--line-distances", nargs="+", type=int, default=[5, 20, 60, 120])
    parser.add_argument("--num-lines", type=int, default=301)
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--num-tokens", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("-o", "--output", type=Path, default=Path("memory.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = PartReport(args.output, settings | {"versions": library_versions()}, args.minutes)
    args.memory = MemoryOptions(**{name: getattr(args, name) for name in vars(MemoryOptions())})
    args.tokenizer, args.model = load_tokenizer(args.model), load_model(args.model)
    text = args.text.read_text(encoding="utf-8")
    args.book = torch.tensor(args.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    measured = {
        "recall": (recall, args.recall_caches),
        "lines": (lines, [name for name in args.recall_caches if name != "dense"]),
        "perplexity": (perplexity, CACHES[:2]),
        "speed": (speed, CACHES[:2]),
    }
    for part in args.parts:
        measure, names = measured[part]
        for name in names:
            with_memory = "" if name in ("cache", "dense") else f", {args.memory}"
            size = f"{name} {args.num_kept}+{args.window}{with_memory}"
            report.add(part, lambda measure=measure, name=name, size=size: measure(args, name, size), size)


if __name__ == "__main__":
    main()
