"""One training step: first queued on the device; its result is read later."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from .host_copy import HostCopy
from .launch import SameOnAllRanks, World
from .plan import Plan
from .segments import pass_losses
from .spikes import Spike, describe_spikes, find_spikes

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SAMPLES = "The numbers of its samples are in metrics.jsonl"  # written by the loop


@dataclass(frozen=True)
class StepResult:
    """The result of a step."""

    loss: float  # mean over all targets of the global batch
    grad_norm: float  # of the global batch, before clipping; infinite if the update was skipped
    is_skipped: bool  # float16 only: the scaled gradients overflowed, so there was no update
    loss_scale: float | None  # float16 only
    stop_code: int  # why to stop after this step (`stopping.stop_reason`), the largest of all ranks; 0: go on
    losses: list[float]  # of each rank
    spikes: dict[str, Spike]  # by quantity (`spikes.QUANTITIES`); empty if the step is none


class BadStep(SameOnAllRanks):
    """A step after which training must not go on.

    Attributes:
        step: number of updates including this one.
        losses: of each rank.
    """

    def __init__(self, message: str, step: int, losses: list[float]):
        super().__init__(message)
        self.step, self.losses = step, losses


@dataclass(frozen=True)
class PendingStep:
    """A step that is queued on the device and whose result has not been read."""

    step: int  # number of updates including this one
    lr: float
    host_seconds: float  # time that the host needed to queue it
    by_rank: HostCopy  # (ranks, 2): the loss of a rank, and its stop code
    grad_norm: HostCopy
    is_refused: bool  # True if the host already detected that there was no update
    loss_scale: float | None  # float16 only
    verdict: HostCopy | None  # (2, 3): `SpikeGuard.verdict`; None if there was no update
    stops_at_spike: bool

    def result(self) -> StepResult:
        """Wait until the device has computed the result.

        Raises:
            BadStep: a loss or the gradient is not finite, and there was no update; or the step is a
                spike at which the run stops.
        """
        by_rank = self.by_rank.read()
        losses = [loss for loss, _ in by_rank]
        _check_losses(losses, self.step)
        is_skipped = self.is_refused and self.loss_scale is not None and self.loss_scale > 1
        grad_norm = math.inf if self.is_refused else self.grad_norm.read()
        if not is_skipped and not math.isfinite(grad_norm):
            raise BadStep(
                f"step {self.step}: the gradient is not finite, but the loss is. Training stopped before the update "
                "and saved nothing; the newest checkpoint is intact. Lower optimizer.lr, or try train.precision=fp32. "
                f"{SAMPLES}",
                self.step,
                losses,
            )
        loss = math.fsum(losses) / len(losses)
        spikes = {} if self.verdict is None else find_spikes(self.verdict.read(), loss, grad_norm)
        if spikes and self.stops_at_spike:
            raise BadStep(
                f"step {self.step}: {describe_spikes(spikes)}. Training stopped (train.on_spike=stop) and saved "
                "nothing; the newest checkpoint is intact. Lower optimizer.lr, resume from an older checkpoint, or set "
                f"train.on_spike=skip. {SAMPLES}",
                self.step,
                losses,
            )
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            is_skipped=is_skipped,
            loss_scale=self.loss_scale,
            stop_code=max(int(code) for _, code in by_rank),
            losses=losses,
            spikes=spikes,
        )


def train_step(
    engine: "DeepSpeedEngine",
    batches: Iterator[torch.Tensor],
    plan: Plan,
    world: World,
    *,
    step: int,
    lr: float,
    stop_code: int = 0,
    before_update: Callable[[], None] = lambda: None,
) -> PendingStep:
    """Queue one optimizer step on the next micro-batches ``(b, tokens_per_sample)``.

    Every sample has the same number of targets, so the mean over the global batch is the mean over
    micro-batches, and that of a micro-batch the mean of its `pass_losses`. With `FusedUpdate` the
    host does not wait for the device, so it can queue the next step before it reads this one. If a
    loss or gradient is not finite, this step and the steps queued after it do not change the
    weights.

    Args:
        stop_code: why this rank asks all ranks to stop after this step; 0: it does not.
        before_update: called before the update is queued.

    Raises:
        BadStep: as `PendingStep.result`, if the host already detected that the step failed.
    """
    began = time.perf_counter()
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=engine.device)
    num_left = plan.num_passes
    for _ in range(plan.num_accumulation_steps):
        world.mark("reading samples", step=step)
        samples = next(batches)
        world.mark("computing a micro-batch")
        for loss in pass_losses(engine, samples, samples, plan, window=plan.window(step)):
            loss_sum += loss.detach()
            engine.backward(_nan_unless_finite(loss))
            num_left -= 1
            if num_left:
                engine.step()  # counts the pass

    code = loss_sum.new_full((), float(stop_code))
    world.mark("updating the weights")
    gathered = _gather(torch.stack([loss_sum / plan.num_passes, code]), world)
    by_rank = HostCopy(gathered)
    engine.spike_guard.begin(gathered[:, 0].mean())
    before_update()
    grad_norm, is_refused = _update(engine, plan)
    pending = PendingStep(
        step=step,
        lr=lr,
        host_seconds=time.perf_counter() - began,
        by_rank=by_rank,
        grad_norm=grad_norm,
        is_refused=is_refused,
        loss_scale=_loss_scale(engine) if plan.config.train.precision == "fp16" else None,
        verdict=None if is_refused else HostCopy(engine.spike_guard.verdict),
        stops_at_spike=plan.config.train.on_spike == "stop",
    )
    if is_refused:
        pending.result()  # raises, except after a float16 overflow, so that no step follows
    return pending


def _nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss. If it is not finite, its gradient is NaN, and so is the norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _gather(values: torch.Tensor, world: World) -> torch.Tensor:
    """Return the values of every rank, ``(ranks, …)``."""
    if world.size == 1:
        return values[None]
    by_rank = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(by_rank, values)
    return torch.stack(by_rank)


def _check_losses(losses: list[float], step: int) -> None:
    bad = [f"{loss} on rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise BadStep(
            f"step {step}: the loss is {', '.join(bad)}. Training stopped before the update and saved nothing; the "
            f"newest checkpoint is intact. Lower optimizer.lr or optimizer.clip, or check the data. {SAMPLES}",
            step,
            losses,
        )


def _update(engine: "DeepSpeedEngine", plan: Plan) -> tuple[HostCopy, bool]:
    """Clip and update if the gradient is finite. Returns its norm, and ``is_refused``."""
    if plan.config.deepspeed.zero_stage == 0:
        return _update_without_zero(engine, plan)
    engine.step()
    if engine.fused_update is not None:
        return engine.fused_update.grad_norm, False
    grad_norm, is_refused = torch.as_tensor(engine.get_global_grad_norm()), engine.optimizer.overflow
    if not is_refused and engine.spike_guard.verdict is None:  # DeepSpeed's own CPU updates call no hook
        engine.spike_guard.judge(grad_norm)
    return HostCopy(grad_norm), is_refused


def _update_without_zero(engine: "DeepSpeedEngine", plan: Plan) -> tuple[HostCopy, bool]:
    scaler = engine.torch_autocast_z0_gradscaler  # with float16 only
    if scaler is not None:
        scaler.unscale_(engine.optimizer)
    max_norm = plan.config.optimizer.clip or math.inf
    norm = nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm)
    grad_norm = HostCopy(norm)
    is_finite = math.isfinite(grad_norm.read())
    if is_finite:
        engine.spike_guard.judge(norm)
    if is_finite or scaler is not None:  # a scaler skips the update itself
        engine.step()
    return grad_norm, not is_finite


def _loss_scale(engine: "DeepSpeedEngine") -> float:
    scaler = engine.torch_autocast_z0_gradscaler
    return float(scaler.get_scale() if scaler is not None else engine.optimizer.loss_scale)
