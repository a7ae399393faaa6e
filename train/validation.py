"""The loss on held-out text, which does not depend on the number of ranks."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from ..data import TokenStore, TokenWindows
from ..data.store import TokenSource
from ..models.loss import IGNORED
from .batches import read_samples
from .launch import World
from .plan import Plan
from .segments import pass_losses

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def set_windows(store: TokenSource, plan: Plan) -> dict[str, TokenWindows]:
    """Return the validation samples of each set, sorted by name, for ``validation.by_set``.

    Sets with fewer tokens than one sample are left out.

    Raises:
        ValueError: the store does not hold its sets apart, or no set has a sample.
    """
    if not plan.config.validation.by_set:
        return {}
    if not isinstance(store, TokenStore):
        raise ValueError(f"{store.path}: it has no sets; remove validation.by_set")
    sizes = {"tokens_per_sample": plan.tokens_per_sample, "stride": plan.stride}
    large = sorted(_sets_with_samples(store, plan))
    try:
        if not large:
            raise ValueError(f"{store.path}: no set has a sample of {plan.tokens_per_sample} tokens for validation")
        return {name: TokenWindows(store, "validation", set_name=name, **sizes) for name in large}
    except ValueError as error:
        raise ValueError(f"{error} (or remove validation.by_set)") from None


def sets_left_out(store: TokenSource, plan: Plan) -> list[str]:
    """Return the sets of a store that ``validation.by_set`` leaves out, sorted."""
    if not plan.config.validation.by_set or not isinstance(store, TokenStore):
        return []
    names = {name for split in store.manifest.splits.values() for name in split.sets}
    return sorted(names - _sets_with_samples(store, plan))


def _sets_with_samples(store: TokenStore, plan: Plan) -> set[str]:
    sets = store.manifest.splits["validation"].sets
    return {name for name, counts in sets.items() if counts.tokens >= plan.tokens_per_sample}


@torch.no_grad()
def validation_loss(
    engine: "DeepSpeedEngine", windows: TokenWindows, num_samples: int, plan: Plan, world: World
) -> float:
    """Return the mean loss over ``num_samples`` evenly spaced windows. Every rank calls it.

    All ranks process the same number of micro-batches of equal size, because ZeRO-3 gathers weights
    collectively and the compiled model has a fixed batch size. Missing samples are replaced by
    samples whose targets are ignored.
    """
    micro_batch_size = plan.config.train.micro_batch_size
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)  # of losses, of targets
    for start in range(0, num_samples, micro_batch_size * world.size):
        world.mark("validating")
        first = start + world.rank * micro_batch_size
        chosen = np.arange(first, first + micro_batch_size)
        counts = chosen < num_samples
        spread = np.where(counts, chosen, 0) * len(windows) // num_samples
        samples = read_samples(windows, spread, pin=False).to(engine.device)
        labels = samples.masked_fill(~torch.from_numpy(counts).to(engine.device)[:, None], IGNORED)
        num_counted = int(counts.sum())
        losses = list(pass_losses(engine, samples, labels, plan, num_samples=num_counted, window=plan.largest_window))
        loss, num_targets = torch.stack(losses).mean(), num_counted * plan.targets_per_sample
        if num_targets:
            sums += torch.stack([loss.double() * num_targets, sums.new_tensor(num_targets)])
    engine.train()
    if world.size > 1:
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()
