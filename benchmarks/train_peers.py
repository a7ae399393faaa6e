"""The other contestants of `benchmarks/train.py`: one plain training loop in a separate process.

    python benchmarks/train_peers.py '{"contestant": "litgpt", "recipe": "pythia-160m", …}'

Every loop accumulates the gradients of some micro-batches, clips to 1.0 and updates with fused
AdamW, on batches that are already on the device. On a GPU, models and losses are compiled (except
litgpt's loss, as in its own pretraining), attention is SDPA, and the weights are float32 with
bfloat16 autocast, as in `transformers.Trainer(bf16=True)` and `litgpt pretrain` by default. With
the suffix ``-bf16``, weights and moments are bfloat16 without a float32 copy, which is faster and
less exact. On a CPU everything is float32 and eager. With torchrun, the model is wrapped in
DistributedDataParallel.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from part_report import spread
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sinklm.data import open_store
from sinklm.eval.decode_speed import mark, milliseconds_between, synchronize
from sinklm.models import SinkGPTNeoXConfig
from sinklm.train.plan import Plan
from sinklm.train.progress import peak_memory_gib
from sinklm.train.recipe import load_config
from sinklm.train.summary import PYTHIA_TOKENIZER_SIZE

Loss = Callable[[torch.Tensor], torch.Tensor]  # takes samples (B, T + 1)
Task = dict[str, Any]  # from the command line


class Clock:
    """Times steps after warm-up; waits for the device only at the first tick and at the end."""

    def __init__(self, num_warmup_steps: int):
        self._num_warmup_steps = num_warmup_steps
        self._num_ticks = 0
        self._marks: list[Any] = []
        self.first_step_at = float("nan")

    def tick(self) -> None:
        """Count a finished step."""
        self._num_ticks += 1
        if self._num_ticks == 1:
            synchronize()
            self.first_step_at = time.time()
        if self._num_ticks >= self._num_warmup_steps:
            self._marks.append(mark())

    def seconds(self) -> list[float]:
        """Return the time of each step after the warm-up."""
        synchronize()
        return [milliseconds_between(*marks) / 1e3 for marks in pairwise(self._marks)]


def plain_loop(model: nn.Module, loss_of: Loss, batches: Iterator[torch.Tensor], clock: Clock, task: Task) -> None:
    """Train: forward and backward for each micro-batch, clip, update."""
    num_micro_batches = task["num_micro_batches"]
    parameters = list(model.parameters())
    has_float32_weights = parameters[0].dtype == torch.float32
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    is_mixed = parameters[0].is_cuda and has_float32_weights
    for _ in range(num_steps(task)):
        for left in reversed(range(num_micro_batches)):
            # The last micro-batch starts the all-reduce.
            with model.no_sync() if left and isinstance(model, DistributedDataParallel) else nullcontext():
                with torch.autocast("cuda", torch.bfloat16) if is_mixed else nullcontext():
                    loss = loss_of(next(batches)) / num_micro_batches
                loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def prepared(model: nn.Module, *, is_bf16: bool) -> nn.Module:
    """Move the model to its device, cast and compile it, and wrap it for several ranks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, torch.bfloat16 if is_bf16 else torch.float32).train()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    if device.type == "cuda":
        model.compile()
    return model


def is_bf16(task: Task) -> bool:
    return task["contestant"].endswith("-bf16")


def num_steps(task: Task) -> int:
    return task["num_warmup_steps"] + task["num_steps"]


def transformers_model(config: SinkGPTNeoXConfig) -> GPTNeoXForCausalLM:
    settings = {key: value for key, value in config.to_dict().items() if key not in ("sink", "model_type")}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**settings | {"use_cache": False}, attn_implementation="sdpa"))


def train_transformers(config: SinkGPTNeoXConfig, batches: Iterator, clock: Clock, task: Task) -> None:
    model = prepared(transformers_model(config), is_bf16=is_bf16(task))
    plain_loop(model, lambda samples: model(samples[:, :-1], labels=samples[:, :-1]).loss, batches, clock, task)


def train_litgpt(config: SinkGPTNeoXConfig, batches: Iterator, clock: Clock, task: Task) -> None:
    """Train litgpt's model with its loss, as in its `pretrain.py`."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = Config(
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        rotary_percentage=config.rope_parameters["partial_rotary_factor"],
        parallel_residual=config.use_parallel_residual,
    )
    model = prepared(GPT(shape), is_bf16=is_bf16(task))

    def loss_of(samples: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(model(samples[:, :-1].contiguous()), samples[:, 1:].contiguous())

    plain_loop(model, loss_of, batches, clock, task)


class NanoLayer(nn.Module):
    """GPT-NeoX's layer in the style of nanoGPT."""

    def __init__(self, config: SinkGPTNeoXConfig):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        states = self.query_key_value(self.norm_1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = states.unbind(2)  # (B, T, heads, head_dim)
        query, key = (rotated(states, cos, sin) for states in (query, key))
        heads = (states.transpose(1, 2) for states in (query, key, value))
        attended = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        return x + self.dense(attended) + self.down(gelu(self.up(self.norm_2(x))))


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding to the first dimensions of ``(B, T, heads, head_dim)``."""
    half = cos.shape[-1]
    first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).type_as(states)


class NanoGPT(nn.Module):
    """A GPT-NeoX model with its loss, compiled as one graph."""

    def __init__(self, config: SinkGPTNeoXConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NanoLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        num_rotated = int(
            config.hidden_size // config.num_attention_heads * config.rope_parameters["partial_rotary_factor"]
        )
        frequencies = 10_000 ** -(torch.arange(0, num_rotated, 2) / num_rotated)
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies)[:, None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        ids, targets = samples[:, :-1], samples[:, 1:]
        x, cos, sin = self.embed(ids), self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def train_nanogpt(config: SinkGPTNeoXConfig, batches: Iterator, clock: Clock, task: Task) -> None:
    model = prepared(NanoGPT(config), is_bf16=is_bf16(task))
    plain_loop(model, model, batches, clock, task)


def train_trainer(config: SinkGPTNeoXConfig, batches: Iterator, clock: Clock, task: Task) -> None:
    """Train with transformers' Trainer, which distributes the batch itself."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    first = next(batches).cpu()
    num_batches = num_steps(task) * task["num_micro_batches"]
    samples = [{"input_ids": row[:-1], "labels": row[:-1]} for _ in range(num_batches) for row in first]
    if dist.is_initialized():
        samples = samples * dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=num_steps(task),
            per_device_train_batch_size=len(first),
            gradient_accumulation_steps=task["num_micro_batches"],
            optim="adamw_torch_fused",
            bf16=on_gpu,
            torch_compile=on_gpu,
            use_cpu=not on_gpu,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = transformers_model(config)
        Trainer(model, arguments, train_dataset=samples, callbacks=[Ticks()]).train()


PEERS = {
    "transformers": train_transformers,
    "trainer": train_trainer,
    "litgpt": train_litgpt,
    "nanogpt": train_nanogpt,
}


def read_batches(store: Path, micro_batch_size: int, seq_length: int) -> Iterator[torch.Tensor]:
    """Yield a few batches ``(B, T + 1)`` of the store repeatedly, from device memory."""
    stream = open_store(store).split("train")
    rank = int(os.environ.get("RANK", 0))
    num_batches = min(16, len(stream) // (micro_batch_size * (seq_length + 1)))
    rows = stream.read(0, num_batches * micro_batch_size * (seq_length + 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = torch.from_numpy(np.roll(rows, rank)).view(num_batches, micro_batch_size, seq_length + 1).to(device)
    while True:
        yield from batches


def main() -> None:
    task = json.loads(sys.argv[1])
    plan = Plan(load_config(task["recipe"]), 1, PYTHIA_TOKENIZER_SIZE)
    if "WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    clock = Clock(task["num_warmup_steps"])
    batches = read_batches(Path(task["store"]), task["micro_batch_size"], task["seq_length"])
    PEERS[task["contestant"].removesuffix("-bf16")](plan.model_config, batches, clock, task)
    seconds = clock.seconds()
    if int(os.environ.get("RANK", 0)) == 0:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(
            json.dumps(
                {
                    "seconds_per_step": statistics.fmean(seconds),
                    "stdev": spread(seconds),
                    "first_step_at": clock.first_step_at,
                    "memory_gib": peak_memory_gib(device),
                }
            ),
            flush=True,
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
