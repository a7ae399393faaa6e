"""Decoding with one graph of static shapes, compiled once and, on CUDA, captured and replayed."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.cache_argument import CACHE
from . import kernels
from .cache import StreamingCache
from .families import is_one_graph
from .wrappers import unwrapped


class StreamingDecoder:
    """Feeds a stream token by token through a compiled forward pass of its model.

    ::

        decoder = StreamingDecoder(model, cache)
        logits = decoder.prefill(prompt)
        while True:
            logits = decoder(logits.argmax(-1))

    A streaming cache keeps its shapes and addresses from token to token, so the step is one graph
    without breaks. Rebasing, once per window, is done between the steps. The steps of a model on
    several devices, or with offloaded weights, are not compiled.

    Args:
        compile: more arguments of `torch.compile`, for example
            ``{"mode": "max-autotune-no-cudagraphs"}``.
    """

    def __init__(self, model: PreTrainedModel, cache: StreamingCache, compile: dict[str, Any] | None = None):
        self.model, self.cache = model, cache
        self.compile_options = {"fullgraph": True, "dynamic": False, **(compile or {})}
        self.steps: dict[int, Callable[[Tensor], Tensor]] = {}  # by batch size, compiled
        self.compiled_for: Tensor | None = None  # `num_seen`; a new tensor whenever the buffers change
        self.captured: dict[bool, CapturedStep | None] = {}  # by whether a memory chooses blocks; None: warmed up
        # accelerate's hooks move weights and states between the layers
        self.is_dispatched = any(hasattr(module, "_hf_hook") for module in model.modules())

    def _step(self, batch_size: int) -> Callable[[Tensor], Tensor]:
        """Return a compiled forward pass of this decoder.

        torch compiles one code object at most eight times, and all decoders share that of
        `_forward`, so each pass gets a copy.
        """
        if batch_size not in self.steps:
            forward = FunctionType(self._forward.__code__.replace(), globals())
            self.steps[batch_size] = torch.compile(MethodType(forward, self), **self.compile_options)
        return self.steps[batch_size]

    def _forward(self, token_ids: Tensor) -> Tensor:
        with kernels.OneRowLinear() if kernels.is_available else nullcontext():
            return self.model(token_ids, use_cache=True, **{CACHE: self.cache}).logits

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read a prompt ``(B, T)`` and return the logits ``(B, 1, V)`` of the next token.

        Prompts may have any length and may come at any time.
        """
        if attention_mask is not None:
            return self._read(input_ids, attention_mask)
        # Gemma 3 with images would make a mask of T x T values.
        first, *others = input_ids.split(self.cache.chunk_size, dim=-1)
        logits = self._read(first)
        if others:
            with self.cache.damaged_by_failure(input_ids.shape[1]):
                for part in others:
                    logits = self._read(part)
        return logits

    def _read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> Tensor:
        """Read one token of each stream ``(B, 1)`` and return the logits ``(B, 1, V)``.

        On CUDA, the next call overwrites the returned tensor.

        Raises:
            ValueError: no prompt was read, the cache is damaged, the shape is not ``(B, 1)``, the
                ids are not int32 or int64 on the model's device, or a step of the model is not one
                graph.
        """
        if self.cache.streams.counters is None:
            raise ValueError("the cache is empty: call prefill() with a prompt of at least one token first")
        self.cache.check_whole()
        num_seen = self.cache.streams.counters.num_seen
        _check_type(token_ids, None if self.is_dispatched else unwrapped(self.model).device)
        if token_ids.shape != (len(num_seen), 1):
            raise ValueError(
                f"token_ids has shape {tuple(token_ids.shape)}: pass one token of each stream, ({len(num_seen)}, 1)"
            )
        if not is_one_graph(self.cache.decoder):
            rope_type = self.cache.decoder.rotary_emb.rope_type
            raise ValueError(
                f"a step with rope_type {rope_type!r} is not one graph, since each pass chooses the frequencies: "
                "call generate, or Generator with compile=False"
            )
        if self.is_dispatched:
            return self.prefill(token_ids)
        # A view, as a column of a prompt, has other strides: the graph would be compiled again.
        token_ids = token_ids.long().clone(memory_format=torch.contiguous_format)
        with self.cache.damaged_by_failure(1):
            self.cache.rebase_before(1)
            return self._run(self._step(len(num_seen)), token_ids, num_seen)

    def _run(self, step: Callable[[Tensor], Tensor], token_ids: Tensor, num_seen: Tensor) -> Tensor:
        """Run a step as a graph, which is compiled and captured first if necessary."""
        memory = self.cache.memory
        chooses = memory is not None and bool(memory.chooses)
        with self.cache.steering.in_graph(self.cache):
            if self.compiled_for is not num_seen:  # the first step compiles and warms up for the capture
                self.captured = {chooses: None}
                # A dead cache that is collected during tracing would change the model and break the
                # trace, so collect it now.
                gc.collect()
                logits = step(token_ids)
                self.compiled_for = num_seen
                return logits
            if not token_ids.is_cuda or not (memory is None or memory.can_be_captured):
                return step(token_ids)
            if chooses not in self.captured:
                self.captured[chooses] = None
                return step(token_ids)
            captured = self.captured[chooses] = self.captured[chooses] or CapturedStep(step, token_ids)
        return captured(token_ids)


def _check_type(token_ids: Any, device: torch.device | None) -> None:
    """Raise a ValueError for what are no ids on a device; None is any device."""
    if not isinstance(token_ids, Tensor):
        raise ValueError(f"token_ids is a {type(token_ids).__name__}: pass a tensor of int64 ids")
    device = token_ids.device if device is None else device
    if token_ids.dtype not in (torch.int32, torch.int64) or token_ids.device != device:
        raise ValueError(f"token_ids is {token_ids.dtype} on {token_ids.device}: pass int64 ids on {device}")


class CapturedStep:
    """A CUDA graph of a step. Capturing does not run the step."""

    def __init__(self, step: Callable[[Tensor], Tensor], token_ids: Tensor):
        self.token_ids = token_ids
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(token_ids.device), torch.cuda.graph(self.graph):
            self.logits = step(self.token_ids)

    def __call__(self, token_ids: Tensor) -> Tensor:
        self.token_ids.copy_(token_ids)
        self.graph.replay()
        return self.logits
