"""Functions of the step only: the learning rate, and when to validate and save."""

import math
from collections.abc import Callable

from .config import CheckpointSection, OptimizerSection

PYTHIA_EARLY_STEPS = frozenset({0} | {2**k for k in range(10)})  # 0, 1, 2, 4 … 512
PYTHIA_INTERVAL = 1000


def learning_rate(step: int, num_steps: int, optimizer: OptimizerSection) -> float:
    """Return the learning rate of update ``step`` (0 to ``num_steps - 1``).

    Linear warm-up, then a cosine to ``min_lr_ratio * lr``. It is a pure function, so it has no
    state to save, and skipped updates do not affect it.
    """
    num_warmup_steps = round(num_steps * optimizer.warmup_ratio)
    if step < num_warmup_steps:
        return optimizer.lr * (step + 1) / num_warmup_steps
    num_decay_steps = max(num_steps - 1 - num_warmup_steps, 1)
    progress = (step - num_warmup_steps) / num_decay_steps
    lowest = optimizer.lr * optimizer.min_lr_ratio
    return lowest + (optimizer.lr - lowest) * (1 + math.cos(math.pi * progress)) / 2


def is_pythia_step(step: int) -> bool:
    """Whether Pythia published a checkpoint after ``step`` updates (0, 1, 2, 4 … 512, 1000 …)."""
    return step in PYTHIA_EARLY_STEPS or step % PYTHIA_INTERVAL == 0


def saves_after(num_steps: int, checkpoint: CheckpointSection) -> Callable[[int], bool]:
    """Return a function of the number of updates that decides whether to save."""
    return lambda step: (
        is_every(step, checkpoint.every_steps)
        or step == num_steps
        or (checkpoint.pythia_steps and is_pythia_step(step))
    )


def num_saved_before(num_steps: int, checkpoint: CheckpointSection) -> tuple[int, int]:
    """Return how many of the steps ``0 … num_steps - 1`` are saved: Pythia's, and others.

    They are counted without a loop, since a run may have 10^15 steps.
    """
    last, every_steps = num_steps - 1, checkpoint.every_steps
    num_multiples = last // every_steps if every_steps else 0
    if not checkpoint.pythia_steps:
        return 0, num_multiples
    early = [step for step in PYTHIA_EARLY_STEPS if step <= last]
    num_pythia = len(early) + last // PYTHIA_INTERVAL
    num_both = sum(is_every(step, every_steps) for step in early)
    if every_steps:
        num_both += last // math.lcm(every_steps, PYTHIA_INTERVAL)
    return num_pythia, num_multiples - num_both


def is_every(step: int, every_steps: int | None) -> bool:
    """Whether ``step`` is a positive multiple of ``every_steps``; False if that is None."""
    return every_steps is not None and step > 0 and step % every_steps == 0
