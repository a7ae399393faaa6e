"""The micro-batches of a rank, read ahead by a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..data import SampleOrder, SetWindows, TokenStore, TokenWindows, WeightedOrder, batch_indices
from ..data.mixture import shares_of
from ..data.store import TokenSource
from .plan import Plan

NUM_READ_AHEAD = 8  # micro-batches
Windows = TokenWindows | SetWindows


def open_windows(store: TokenSource, plan: Plan) -> tuple[Windows, TokenWindows | None]:
    """Return the training samples, and the validation samples or None if validation is disabled.

    Raises:
        ValueError: a split is missing or shorter than one sample, or ``data.weights`` does not name
            the sets of the store.
    """
    sizes: dict[str, Any] = {"tokens_per_sample": plan.tokens_per_sample, "stride": plan.stride}
    validation = None
    if plan.config.validation.every_steps is not None:
        try:
            validation = TokenWindows(store, "validation", **sizes)
        except ValueError as error:
            raise ValueError(f"{error} (to disable validation: validation.every_steps=null)") from None
        section, num_tokens = plan.config.validation, len(validation.stream)
        if section.streaming_tokens is not None and section.streaming_tokens > num_tokens:
            raise ValueError(
                f"validation.streaming_tokens is {section.streaming_tokens}, but the validation split of {store.path} "
                f"has {num_tokens} tokens: lower it, or prepare the store with a larger --validation-fraction"
            )
    weights = plan.config.data.weights
    if weights is None:
        return TokenWindows(store, "train", **sizes), validation
    if not isinstance(store, TokenStore):
        raise ValueError(f"{store.path}: its order is fixed and it has no sets; remove data.weights")
    if missing := store.manifest.splits["train"].sets.keys() - weights.keys():
        raise ValueError(
            f"data.weights has no weight of {', '.join(sorted(missing))}, which {store.path} contains: set it, to 0 to "
            "leave the set out"
        )
    try:
        return SetWindows(store, "train", [*shares_of(weights)], **sizes), validation
    except ValueError as error:
        raise ValueError(f"data.weights: {error}") from None


def sample_order(store: TokenSource, windows: Windows, plan: Plan) -> SampleOrder | WeightedOrder:
    """Return the order of the training samples."""
    weights, seed = plan.config.data.weights, plan.config.train.seed
    if weights is not None and isinstance(windows, SetWindows):
        return WeightedOrder(windows.num_windows, weights, seed)
    return SampleOrder(len(windows), None if store.is_shuffled else seed)


class MicroBatches:
    """Infinite iterator over a rank's micro-batches ``(micro_batch_size, tokens_per_sample)``.

    The global batch of step k is positions ``[k·B, (k+1)·B)`` of the data order for any number of
    ranks, so the only state is the number of the next step.

    Args:
        windows: the samples.
        order: their order.
        samples_per_step: B, the global batch size.
        micro_batch_size: samples in a micro-batch.
        first_step: step to start at.
        device: device of the batches.
    """

    def __init__(
        self,
        windows: Windows,
        order: SampleOrder | WeightedOrder,
        *,
        samples_per_step: int,
        micro_batch_size: int,
        first_step: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ):
        self._windows, self._order = windows, order
        self._samples_per_step, self._micro_batch_size = samples_per_step, micro_batch_size
        self._rank, self._world_size, self._device = rank, world_size, device
        self._queue: queue.Queue[torch.Tensor | BaseException] = queue.Queue(NUM_READ_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(first_step,), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        batch = self._queue.get()
        if isinstance(batch, BaseException):
            raise OSError(f"rank {self._rank} cannot read its next samples: {batch}") from batch
        return batch.to(self._device, non_blocking=True)

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _read_ahead(self, step: int) -> None:
        try:
            while not self._stopped.is_set():
                positions = batch_indices(step, self._samples_per_step, self._rank, self._world_size)
                samples = self._order(positions).reshape(-1, self._micro_batch_size)
                for chosen in samples:
                    self._put(read_samples(self._windows, chosen, pin=self._device.type == "cuda"))
                step += 1
        except Exception as error:
            self._put(error)

    def _put(self, item: torch.Tensor | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return


def samples_of_step(order: SampleOrder | WeightedOrder, step: int, samples_per_step: int) -> np.ndarray:
    """Return the samples of step ``step`` (from 0), int64 ``(samples_per_step,)``.

    Of N ranks, rank r computes every Nth of them from the rth on.
    """
    return order(batch_indices(step, samples_per_step))


def read_samples(windows: Windows, chosen: np.ndarray, *, pin: bool) -> torch.Tensor:
    """Return the windows ``chosen`` as an int64 tensor ``(len(chosen), tokens_per_sample)``.

    Args:
        pin: allocate it in pinned memory.
    """
    batch = torch.empty(len(chosen), windows.tokens_per_sample, dtype=torch.int64, pin_memory=pin)
    for row, sample in zip(batch.numpy(), chosen, strict=True):
        row[:] = windows[int(sample)]
    return batch
