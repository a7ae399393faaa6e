"""How a run is asked to stop: signals and ``train.max_minutes``, and the exit status for each."""

import math
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

SECOND_INTERRUPT_AFTER = 3.0  # seconds; launchers send several signals for one Ctrl-C
# Stop codes besides the numbers of signals:
TIME_IS_UP = 254  # `train.max_minutes` is over
SAVE_FAILED = 255  # a checkpoint could not be written
REQUEUE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the state is saved, run the same command again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def exit_status(code: int) -> int:
    """Return the exit status of a run that stopped early with its state saved.

    Schedulers announce the end of a job by SIGUSR1, SIGUSR2 or SIGHUP, and `TIME_IS_UP` is planned
    too: ``REQUEUE_STATUS``. After SIGTERM and SIGINT it is 128 + n, as usual.
    """
    return 128 + code if code in (signal.SIGTERM, signal.SIGINT) else REQUEUE_STATUS


def stop_reason(code: int) -> str:
    """Return the name of what stopped the run."""
    return "train.max_minutes" if code == TIME_IS_UP else signal.Signals(code).name


@contextmanager
def restored_handlers() -> Iterator[None]:
    """Restore the handlers of signals at the end, if this is the main thread.

    Until a `StopRequest`, signals that ask to be run again end the process with their status.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number, handler in before.items():
            if exit_status(number) == REQUEUE_STATUS and handler == signal.SIG_DFL:
                signal.signal(number, lambda number, frame: sys.exit(exit_status(number)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Records a signal until the step is done. On exit it restores the old handlers.

    After an error it does not: a launcher sends SIGTERM when it notices that a rank has died, which
    must not end this rank before it has reported the error. `restored_handlers` restores them then.

    A second SIGINT more than 3 seconds after the first ends the process immediately. Signals that
    the process ignores (``nohup``) stay ignored.

    Args:
        say: called with a message when the first signal arrives, from the thread of the watchdog.

    Attributes:
        code: number of the first signal received, or 0.
    """

    def __init__(self, say: Callable[[str], None] = lambda message: None) -> None:
        self.code = 0
        self._say = say
        self._received_at = 0.0
        self._is_announced = False

    def __enter__(self) -> "StopRequest":
        current = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._previous = {number: handler for number, handler in current.items() if handler != signal.SIG_IGN}
        for number in self._previous:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def announce(self, number: int) -> None:
        """Say what happens next. The watchdog calls it, so it also works while a step computes."""
        if not self._is_announced:
            self._is_announced = True
            again = "; to stop without saving, wait 3 seconds and press Ctrl-C again" if number == signal.SIGINT else ""
            self._say(f"{signal.Signals(number).name}: finishing the current steps, then saving{again}")

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if not self.code:
            self.code, self._received_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > SECOND_INTERRUPT_AFTER:
            raise KeyboardInterrupt


class TimeLimit:
    """``train.max_minutes``: says when to stop, so that the last save ends in time.

    Args:
        max_minutes: time from the start of the process; None: no limit.
        save_seconds: estimated time of a save, until one was measured.
        validation_seconds: the same for a validation.
    """

    MARGIN = 10.0  # seconds
    SAVES = 2.5  # a save that is under way, the last one, and a margin
    LARGEST_ESTIMATE = 0.1  # of the time in all

    def __init__(self, max_minutes: float | None, save_seconds: float, validation_seconds: float = 60.0):
        self._max_minutes = max_minutes
        self._estimated = {"save": save_seconds, "validation": validation_seconds}
        self._measured: dict[str, float] = {}

    def measure(self, what: Literal["save", "validation"], seconds: float) -> None:
        """Record how long a save or a validation took. The longest counts."""
        self._measured[what] = max(self._measured.get(what, 0.0), seconds)

    def is_up(self, age: float, step_seconds: float, *, validates: bool = False) -> bool:
        """Whether to stop after the next step.

        Args:
            age: seconds since the process started.
            step_seconds: duration of a step; NaN if not known yet.
            validates: a validation follows the next step.
        """
        if self._max_minutes is None:
            return False
        limit = 60 * self._max_minutes
        needed = self.SAVES * self._seconds("save", limit) + validates * self._seconds("validation", limit)
        if not math.isnan(step_seconds):
            needed += 2 * step_seconds
        return age + needed + self.MARGIN > limit

    def _seconds(self, what: str, limit: float) -> float:
        """Return the time of a save or a validation: as measured, or estimated."""
        return self._measured.get(what, min(self._estimated[what], self.LARGEST_ESTIMATE * limit))
