"""Finds spikes of the loss and of the gradient's norm, and can hold back their updates.

The rule is that of OLMo-core's `SkipStepOptimizer` (`optim/skip_step_optimizer.py`): a value is a
spike if it is more than ``NUM_DEVIATIONS`` standard deviations above the mean of the last
``WINDOW`` steps. Spikes are part of the window, so a level that lasts is no spike for long. The
window is too short to judge the first steps; until then only a loss above ``MAX_RELATIVE_LOSS``
times that of a uniform guess is a spike.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .fused_update import FusedUpdate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WINDOW = 128  # steps
MIN_STEPS = WINDOW // 2
NUM_DEVIATIONS = 6.0
MAX_RELATIVE_LOSS = 2.0
QUANTITIES = ("loss", "grad_norm")


class SpikeGuard:
    """Judges each step by the steps before it. The values and the window stay on the device.

    In a step, `begin` gets the loss and `judge` the norm. They are the same on every rank, so all
    ranks judge alike.

    Args:
        device: device of the loss.
        vocab_size: size of the vocabulary; a uniform guess has the loss ``log(vocab_size)``.
        holds_back: whether a spike does not update the weights.

    Attributes:
        verdict: float64 ``(2, 3)`` for `QUANTITIES`: whether it is a spike, mean and standard
            deviation of the window (NaN while it is too short). None until the step is judged.
    """

    def __init__(self, device: torch.device, vocab_size: int, *, holds_back: bool):
        self.verdict: Tensor | None = None
        self.holds_back = holds_back
        max_loss = MAX_RELATIVE_LOSS * math.log(vocab_size)
        self._first_limit = torch.tensor([max_loss, math.inf], dtype=torch.float64, device=device)
        self._values = torch.zeros(WINDOW, 2, dtype=torch.float64, device=device)  # a ring
        self._num_steps = 0
        self._loss = torch.zeros((), device=device)

    def begin(self, loss: Tensor) -> None:
        """Begin a step with the mean loss over the global batch, a scalar."""
        self._loss, self.verdict = loss, None

    @torch.no_grad()
    def judge(self, grad_norm: Tensor | float) -> Tensor:
        """Judge the step by its loss and its norm before clipping, and add it to the window.

        Returns:
            1 if the update is held back, else 0, a float32 scalar on the device.
        """
        values = self._values
        current = torch.stack([torch.as_tensor(value).to(values) for value in (self._loss, grad_norm)])
        if self._num_steps < MIN_STEPS:
            mean = std = torch.full_like(current, math.nan)
            limit = self._first_limit
        else:
            std, mean = torch.std_mean(values[: self._num_steps], dim=0)
            limit = mean + NUM_DEVIATIONS * std
        is_spike = (current > limit).to(values.dtype)
        values[self._num_steps % WINDOW] = current
        self._num_steps += 1
        self.verdict = torch.stack([is_spike, mean, std], dim=1)
        return is_spike.amax().float() * self.holds_back

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the window, which decides about later steps, on the CPU."""
        return {"values": self._values.to("cpu", copy=True), "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values.copy_(state["values"])
        self._num_steps = state["num_steps"]


@dataclass(frozen=True)
class Spike:
    """A value with the window's mean and standard deviation; NaN while the window is too short."""

    value: float
    mean: float
    deviation: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return f"{self.value:.4g} is more than twice the loss of a uniform guess"
        return (
            f"{self.value:.4g} is a spike (last steps: mean {self.mean:.4g}, standard deviation {self.deviation:.2g})"
        )


def find_spikes(verdict: list[list[float]], loss: float, grad_norm: float) -> dict[str, Spike]:
    """Return the spikes of a step by quantity, from its verdict on the host."""
    judged = zip(QUANTITIES, (loss, grad_norm), verdict, strict=True)
    return {name: Spike(value, mean, std) for name, value, (is_spike, mean, std) in judged if is_spike}


def describe_spikes(spikes: dict[str, Spike]) -> str:
    names = {"loss": "the loss", "grad_norm": "the gradient norm"}
    return " and ".join(f"{names[name]} {spike}" for name, spike in spikes.items())


def guard_updates(engine: "DeepSpeedEngine", guard: SpikeGuard) -> None:
    """Make an engine judge each step just before its update, with the norm that is known by then.

    An update is held back by ``found_inf`` of torch's fused AdamW, which then changes neither
    weights nor state, and does not make the host wait.
    """
    engine.spike_guard = guard
    fused: FusedUpdate | None = engine.fused_update
    if fused is not None:
        fused.judge = guard.judge
        return

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if guard.verdict is None:  # ZeRO steps once for each group of parameters
            if not hasattr(engine.optimizer, "_global_grad_norm"):
                return  # without ZeRO `step` judges before, unless the gradient is not finite
            guard.judge(engine.optimizer._global_grad_norm)
        if guard.holds_back and guard.verdict is not None:
            device = next(p.device for group in optimizer.param_groups for p in group["params"])
            optimizer.found_inf = guard.verdict[:, 0].amax().float().to(device)  # type: ignore[attr-defined]

    engine.basic_optimizer.register_step_pre_hook(before_step)
