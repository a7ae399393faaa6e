"""The loop over steps: train, record, validate, save, stop."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.folders import METRICS_FILE, list_checkpoints
from ..data import TokenWindows
from ..data.store import TokenSource
from ..models.cost import peak_flops
from .batches import MicroBatches, Windows, sample_order, samples_of_step
from .launch import World
from .metrics import MetricsFile, WandbRun
from .plan import Plan
from .probes import Probes, describe_probes
from .progress import RunProgress, Speedometer, peak_memory_gib, process_age
from .saving import SLOW_DISK, TYPICAL_DISK, CheckpointWriter
from .schedule import is_every, learning_rate, saves_after
from .spikes import describe_spikes
from .step import SAMPLES, BadStep, PendingStep, StepResult, train_step
from .stopping import SAVE_FAILED, TIME_IS_UP, StopRequest, TimeLimit, stop_reason
from .validation import set_windows, validation_loss

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CLOSE_SECONDS = 1800.0  # how much longer than a step the end of a run may take, with online logging
FIRST_STEP_SECONDS = 1800.0  # how much longer the first step may take, which may compile


class TrainingLoop:
    """Trains an engine from ``first_step`` to the last step. Every rank has one.

    Args:
        engine: engine in the state after ``first_step`` updates.
        windows: training samples.
        validation_windows: held-out samples; None for no validation.
        progress: output of rank 0.
    """

    def __init__(
        self,
        engine: "DeepSpeedEngine",
        plan: Plan,
        world: World,
        store: TokenSource,
        windows: Windows,
        validation_windows: TokenWindows | None,
        progress: RunProgress,
        *,
        first_step: int,
    ):
        config = plan.config
        self._engine, self._plan, self._world, self._progress = engine, plan, world, progress
        self._validation_windows = validation_windows
        with world.all_or_none():
            self._set_windows = set_windows(store, plan)
        self._probes = Probes(plan, world, store, validation_windows) if validation_windows is not None else None
        self._first_step, self._num_steps = first_step, config.train.num_steps
        self._run_dir = Path(config.train.run_dir or "")
        self._saves_after = saves_after(self._num_steps, config.checkpoint)
        self._writer = CheckpointWriter(
            self._run_dir,
            plan,
            world,
            fingerprint=store.fingerprint,
            tokenizer_path=store.tokenizer_path,
            on_saved=self._report_save,
            say=progress.say,
        )
        self._order = sample_order(store, windows, plan)
        self._batches = MicroBatches(
            windows,
            self._order,
            samples_per_step=plan.samples_per_step,
            micro_batch_size=config.train.micro_batch_size,
            first_step=first_step,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
        )
        peak = peak_flops(world.device, config.train.precision)
        self._speed = Speedometer(
            config.train.batch_size_tokens,
            plan.flops_per_token(),
            peak * world.size if peak else None,
        )
        self._time_limit = TimeLimit(config.train.max_minutes, self._writer.num_bytes / TYPICAL_DISK)
        self._runs_ahead = runs_ahead(world.device)
        self._pending: PendingStep | None = None
        self._is_in_spike = self._has_validated = False
        with world.all_or_none():
            self._records: list[MetricsFile | WandbRun] = []
            if world.is_main:
                self._records.append(MetricsFile(self._run_dir / METRICS_FILE, first_step))
                self._records.append(WandbRun(config, self._run_dir, progress.say))

    def run(self) -> int:
        """Train to the last step.

        Returns:
            0, or why the run ended early, after saving its state (`stopping.stop_reason`).
        """
        try:
            with self._stoppable() as stop:
                code = self._train(stop)
                self._writer.finish()
        except BadStep as error:
            with suppress(BadStep):
                self._read_pending()  # of the step before, if the host noticed this one first
            self._write({"step": error.step, "error": str(error), **self._batch(error.step, error.losses)})
            raise
        except KeyboardInterrupt:
            self._writer.abandon()
            raise
        finally:
            with self._world.longer(self._writer.num_bytes / SLOW_DISK, is_saving=True):
                self._close()
        if code:
            reason = stop_reason(code)
            self._progress.say(f"stopped by {reason}; the state is saved: run the same command again to resume")
        else:
            self._progress.say(f"done: {self._run_dir}")
        with self._world.longer(CLOSE_SECONDS):
            self._world.gather(None)  # no rank leaves while another still closes its records
        return code

    def _train(self, stop: StopRequest) -> int:
        """Run all steps. Returns why to stop, or 0."""
        if self._first_step == 0 and self._saves_after(0):
            self._save(0)
        self._speed.start()
        for step in range(self._first_step, self._num_steps):
            with self._world.longer(FIRST_STEP_SECONDS if step == self._first_step else 0.0):
                code = self._step(step, stop)
            if code:
                return code
        return 0

    @contextmanager
    def _stoppable(self) -> Iterator[StopRequest]:
        """Context in which signals are recorded, and the watchdog is told of them."""
        watchdog = self._world.watchdog
        with StopRequest(self._progress.say) as stop:
            if watchdog is not None:
                watchdog.stop_request = stop
            try:
                yield stop
            finally:
                if watchdog is not None:
                    watchdog.stop_request = None

    def _step(self, step: int, stop: StopRequest) -> int:
        """Run update ``step``, and validate and save if due. Returns why to stop, or 0."""
        num_done = step + 1
        is_first, is_last = num_done == self._first_step + 1, num_done == self._num_steps
        validates = is_every(num_done, self._plan.config.validation.every_steps) or is_last
        queued = train_step(
            self._engine,
            self._batches,
            self._plan,
            self._world,
            step=num_done,
            lr=learning_rate(step, self._num_steps, self._plan.config.optimizer),
            stop_code=SAVE_FAILED if self._writer.has_failed else stop.code or self._time_code(validates),
            before_update=self._writer.before_update,
        )
        code = self._read_pending()  # the previous step, while the device computes this one
        self._pending = queued
        saves = self._saves_after(num_done)
        if code or is_first or validates or saves or not self._runs_ahead:
            code = self._read_pending() or code
        if code == SAVE_FAILED:
            self._writer.finish()  # raises the error, in the same step on all ranks
        if is_first:
            self._progress.say(f"first step done {process_age():.0f} s after process start")
        if code:  # before the validation, for which there may be no time
            self._save(num_done)
            self._writer.finish()
        if validates and (is_last or code != TIME_IS_UP):
            with self._world.longer(0.0 if self._has_validated else FIRST_STEP_SECONDS):  # it may compile
                self._validate(num_done)
            self._has_validated = True
        if saves and not code:
            self._save(num_done)
        if is_first or validates or saves:
            self._speed.start()
        return 0 if is_last else code

    def _time_code(self, validates: bool) -> int:
        """Return `TIME_IS_UP` if the run must end. Rank 0 decides for all ranks."""
        seconds = self._speed.seconds_per_step
        is_up = self._world.is_main and self._time_limit.is_up(process_age(), seconds, validates=validates)
        return TIME_IS_UP if is_up else 0

    def _read_pending(self) -> int:
        """Read and record the pending step, if any. Returns its stop code."""
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        self._world.mark("waiting for the results of a step")
        result = pending.result()
        seconds = self._speed.lap(at_least=pending.host_seconds)
        if self._world.is_main:
            self._record(pending.step, pending.lr, result, seconds)
        return result.stop_code

    def _record(self, step: int, lr: float, result: StepResult, seconds: float) -> None:
        values: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm if not result.is_skipped else None,
            "positions": step * self._plan.config.train.batch_size_tokens,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(self._speed.positions_per_second(seconds), 1),
            "memory_gib": round(peak_memory_gib(self._world.device), 3),
        }
        if (window := self._plan.window(step)) is not None:
            values["window"] = window
        if (mfu := self._speed.mfu(seconds, self._plan.flops_per_token(window))) is not None:
            values["mfu"] = round(mfu, 5)
        if result.loss_scale is not None:
            values |= {"loss_scale": result.loss_scale, "is_skipped": result.is_skipped}
        self._add_spikes(values, result)
        self._write(values)
        is_kept = step in (self._first_step + 1, self._num_steps)
        self._progress.update(step, {**values, "grad_norm": result.grad_norm}, self._speed, is_kept=is_kept)

    def _add_spikes(self, values: dict[str, Any], result: StepResult) -> None:
        """Add the spikes of a step to its record and say so, once if steps in a row have them."""
        if result.spikes:
            is_skipped = self._plan.config.train.on_spike == "skip"
            values["spikes"] = {
                name: {key: value if math.isfinite(value) else None for key, value in asdict(spike).items()}
                for name, spike in result.spikes.items()
            }
            values |= {"is_skipped": is_skipped, **self._batch(values["step"], result.losses)}
            if not self._is_in_spike:
                done = "its update was skipped" if is_skipped else "training goes on (train.on_spike=warn)"
                self._progress.say(f"step {values['step']:,}: {describe_spikes(result.spikes)}; {done}. {SAMPLES}")
        self._is_in_spike = bool(result.spikes)

    def _batch(self, step: int, losses: list[float]) -> dict[str, Any]:
        """Return the samples of a step, in the order of the data, and the loss of each rank."""
        samples = samples_of_step(self._order, step - 1, self._plan.samples_per_step)
        return {
            "samples": samples.tolist(),
            "loss_by_rank": [loss if math.isfinite(loss) else None for loss in losses],
        }

    def _validate(self, step: int) -> None:
        if self._validation_windows is None or self._probes is None:
            return
        started = time.perf_counter()
        loss, num_samples = self._validation_loss(self._validation_windows)
        by_set = {name: self._validation_loss(windows)[0] for name, windows in self._set_windows.items()}
        with self._world.all_or_none():
            others = self._probes.measure(self._engine)
        self._time_limit.measure("validation", time.perf_counter() - started)
        if self._world.is_main:
            others |= {"validation_loss_by_set": by_set} if by_set else {}
            self._write({"step": step, "validation_loss": loss, "num_validation_samples": num_samples, **others})
            sets = ", ".join(f"{name} {value:.4f}" for name, value in by_set.items())
            self._progress.say(
                f"step {step:,}: validation loss {loss:.4f} over {num_samples:,} samples{f' ({sets})' if sets else ''}"
            )
            for line in describe_probes(others):
                self._progress.say(line)

    def _validation_loss(self, windows: TokenWindows) -> tuple[float, int]:
        """Return the mean loss and the number of samples."""
        num_samples = min(self._plan.config.validation.num_samples, len(windows))
        return validation_loss(self._engine, windows, num_samples, self._plan, self._world), num_samples

    def _save(self, step: int) -> None:
        if step in list_checkpoints(self._run_dir):
            return
        self._writer.save(self._engine, step)

    def _report_save(self, path: Path, seconds: float) -> None:
        self._time_limit.measure("save", seconds)
        self._progress.say(f"saved {path}")

    def _write(self, values: dict[str, Any]) -> None:
        for record in self._records:
            record.write(values)

    def _close(self) -> None:
        with ExitStack() as stack:  # closes everything even if one of them fails
            for record in reversed(self._records):
                stack.callback(record.close)
            stack.callback(self._read_pending)
            stack.callback(self._writer.close)
            stack.callback(self._batches.close)


def runs_ahead(device: torch.device) -> bool:
    """Whether to queue a step before reading the previous one. On a CPU, calls are synchronous."""
    return device.type == "cuda"
