"""Soak test of a streaming cache: ragged streams that start, pause, end, and survive restarts.

    python benchmarks/cache_soak.py --num-tokens 2000000

Each row of a batch reads tokens of its own number in every pass, or none. At random, a stream ends
and another one starts in its row, and the cache is saved and loaded. When a sampled stream ends,
its last logits are compared with those of the stream alone in a cache of its own. Prints JSON
lines.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from sinklm.streaming import StreamingCache

VOCABULARY = 101
SHAPE: dict[str, Any] = {"num_kept": 4, "window": 60}


class Rotary64(LlamaRotaryEmbedding):
    """Rotary tables in float64; in float32 their rounding differs with the phase of a stream."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class RMSNorm64(LlamaRMSNorm):
    """Norm without the conversion to float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale


def tiny_llama() -> PreTrainedModel:
    """Return a small random model with sharp attention, in which a misplaced key has an effect.

    All of it is float64, so that differences are not those of rounding.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding):
            module.__class__ = Rotary64
        elif isinstance(module, LlamaRMSNorm):
            module.__class__ = RMSNorm64
    return model.double()


@dataclass
class Soak:
    """Streams in one cache, and what was found."""

    model: PreTrainedModel
    num_rows: int = 16
    longest_pass: int = 200
    sampled: float = 0.2  # share of the streams that are compared
    ending: float = 0.02  # share of the streams that end after a pass
    kv_dtype: str | None = None
    seed: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("tokens", "streams", "compared", "loads"), 0))
    largest_difference: float = 0.0  # relative to the largest logit

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.cache = StreamingCache.for_model(self.model, **SHAPE, chunk_size=128, kv_dtype=self.kv_dtype)
        self.texts: list[Tensor | None] = [self.new_text() for _ in range(self.num_rows)]  # None: not sampled

    def new_text(self) -> Tensor | None:
        return torch.empty(0, dtype=torch.long) if self.random.random() < self.sampled else None

    def run(self, num_tokens: int) -> None:
        """Read so many tokens."""
        with tempfile.TemporaryDirectory() as folder:
            while self.counts["tokens"] < num_tokens:
                self.step()
                if self.random.random() < 0.02:
                    file = Path(folder) / "cache.safetensors"
                    self.cache.save(file)
                    self.cache = StreamingCache.load(file, self.model)
                    self.counts["loads"] += 1

    @torch.inference_mode()
    def step(self) -> None:
        """Read a pass, then end some streams."""
        longest = self.random.choice((1, 1, 1, 5, self.longest_pass))
        lengths = [0 if self.random.random() < 0.3 else self.random.randint(1, longest) for _ in self.texts]
        if not any(lengths):
            return
        num_inputs = max(lengths)
        ids = torch.randint(0, VOCABULARY, (self.num_rows, num_inputs))
        mask = torch.arange(num_inputs) >= num_inputs - torch.tensor(lengths)[:, None]
        logits = self.model(ids, attention_mask=mask.long(), past_key_values=self.cache, use_cache=True).logits
        self.counts["tokens"] += sum(lengths)
        ended = []
        for row, length in enumerate(lengths):
            text = self.texts[row]
            if text is not None and length:
                self.texts[row] = text = torch.cat((text, ids[row, num_inputs - length :]))
            if length and self.random.random() < self.ending:
                ended.append(row)
                if text is not None:
                    self.compare(text, logits[row, num_inputs - length :])
                self.texts[row] = self.new_text()
        self.counts["streams"] += len(ended)
        self.cache.reset(ended)

    def compare(self, text: Tensor, logits: Tensor) -> None:
        """Compare logits ``(T, V)`` of a stream's last tokens with those of the stream alone."""
        alone = StreamingCache.for_model(self.model, **SHAPE)
        expected = self.model(text[None], past_key_values=alone, use_cache=True).logits[0, -len(logits) :]
        difference = (logits - expected).abs().max() / expected.abs().max()
        self.largest_difference = max(self.largest_difference, difference.item())
        self.counts["compared"] += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-tokens", type=int, default=2_000_000)
    parser.add_argument("--report-every", type=int, default=100_000)
    args = parser.parse_args()
    torch.manual_seed(1)
    soak, start = Soak(tiny_llama()), time.perf_counter()
    for num_tokens in range(args.report_every, args.num_tokens + 1, args.report_every):
        soak.run(num_tokens)
        report = soak.counts | {
            "largest_difference": soak.largest_difference,
            "cache_bytes": soak.cache.num_bytes,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "seconds": round(time.perf_counter() - start),
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
