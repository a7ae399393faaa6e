"""Progress output: a live line on a terminal, periodic lines in a log file."""

import errno
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
from rich.live import Live
from rich.text import Text

from ..console import Console
from .memory import GIB

WINDOW = 20  # steps over which the speed is averaged
LOG_INTERVAL = 10.0  # seconds between lines if there is no terminal
LIVE_INTERVAL = 0.25  # seconds between updates of the live line
LOST = (errno.EPIPE, errno.EIO)  # the reader of a pipe has ended, or the terminal was closed


class Speedometer:
    """Positions per second over the last steps, excluding pauses (validation, saving).

    Args:
        positions_per_step: positions of all ranks.
        flops_per_position: see `sinklm.models.cost.flops_per_token`.
        peak_flops: sum over the devices of all ranks; None if not known.
    """

    def __init__(self, positions_per_step: int, flops_per_position: float, peak_flops: float | None):
        self._positions_per_step = positions_per_step
        self._flops_per_position, self._peak_flops = flops_per_position, peak_flops
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._started = time.perf_counter()

    def start(self) -> None:
        """Start timing a step, at the start of the run and after a pause."""
        self._started = time.perf_counter()

    def lap(self, at_least: float = 0.0) -> float:
        """End the timing of a step and start that of the next. Returns the step's seconds.

        Args:
            at_least: seconds that the host needed to queue the step, a lower bound. If the host
                runs one step ahead, the last step before a pause may already be done when it is
                read.
        """
        now = time.perf_counter()
        seconds, self._started = max(now - self._started, at_least), now
        self._seconds.append(seconds)
        return seconds

    @property
    def seconds_per_step(self) -> float:
        """Median of the last steps, which is robust against compilation in the first one."""
        return sorted(self._seconds)[len(self._seconds) // 2] if self._seconds else float("nan")

    def positions_per_second(self, seconds: float | None = None) -> float:
        return self._positions_per_step / (seconds or self.seconds_per_step)

    def mfu(self, seconds: float | None = None, flops_per_position: float | None = None) -> float | None:
        """Model FLOPs utilisation: the model's operations divided by the devices' peak.

        Args:
            flops_per_position: of this step; None: as at construction.
        """
        if self._peak_flops is None:
            return None
        return self.positions_per_second(seconds) * (flops_per_position or self._flops_per_position) / self._peak_flops


class RunProgress:
    """Context manager that prints progress on rank 0 and nothing on other ranks.

    If nobody reads the output any more, training goes on without it.
    """

    def __init__(self, num_steps: int, *, is_silent: bool):
        self.console = Console(quiet=is_silent, highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        # Without a thread of its own, which would end with a traceback if the terminal is closed.
        self._live = Live(console=self.console, auto_refresh=False, transient=True) if self._is_live else None
        self._last_line = self._last_refresh = 0.0
        self._first: tuple[int, float] | None = None  # step of this process, which may compile, and when it was done

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal and not self.console.quiet

    def __enter__(self) -> "RunProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            with self._unread():
                self._live.stop()

    def say(self, message: str) -> None:
        """Print a message above the live line."""
        with self._unread():
            self.console.print(message)

    @contextmanager
    def _unread(self) -> Iterator[None]:
        """Context in which the output may turn out to be lost. Later output is then discarded."""
        try:
            yield
        except OSError as error:
            if error.errno not in LOST:
                raise
            self.console.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def update(self, step: int, values: dict, speed: Speedometer, *, is_kept: bool = False) -> None:
        """Show the values of ``step``; with ``is_kept`` the line remains on screen."""
        now = time.monotonic()
        line = self._line(step, values, speed, now)
        if self._live and now - self._last_refresh >= LIVE_INTERVAL:
            with self._unread():
                self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            self._last_refresh = now
        if is_kept or (not self._live and now - self._last_line >= LOG_INTERVAL):
            self.say(line)
            self._last_line = now

    def _line(self, step: int, values: dict, speed: Speedometer, now: float) -> str:
        parts = [
            f"step {step:,}/{self._num_steps:,}",
            f"loss {values['loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"grad {values['grad_norm']:.2f}",
            f"{human(speed.positions_per_second())} tokens/s",
        ]
        if (mfu := speed.mfu()) is not None:
            parts.append(f"MFU {mfu:.1%}")
        parts.append(f"{values['memory_gib']:.1f} GiB")
        if self._first is None:
            self._first = step, now
        elif step < self._num_steps:  # a validation and a save follow the last one
            first_step, started = self._first
            seconds_per_step = (now - started) / (step - first_step)  # with validations and saves
            left = timedelta(seconds=round((self._num_steps - step) * seconds_per_step))
            parts.insert(1, f"{left} left")  # where a terminal of 80 columns does not cut it
        return "  ".join(parts)


def process_age() -> float:
    """Seconds since this process started."""
    return time.time() - psutil.Process().create_time()


def human(number: float) -> str:
    """Format a number with three digits and a unit: 512K, 1.23M."""
    number = float(f"{number:.3g}")  # 999,700 is 1M, not 1e+03K
    for unit in ("", "K", "M", "B", "T"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}P"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
