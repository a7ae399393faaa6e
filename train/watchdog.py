"""A thread on each rank that ends the run if a rank has died or hangs.

A collective waits for a dead rank, and while it waits, the main thread handles no signal. This
thread uses no collective. The main thread calls `Watchdog.mark` before everything that may block,
and the threads exchange these marks (`peers.Peers`). A rank whose connection closes has died. A
rank without progress for too long hangs. Rank 0 decides which one it is, and all ranks end.
"""

import atexit
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from .hangs import RESUME, Mark, RankState, describe_hang, find_hang
from .peers import SIGNAL, Address, Peers
from .stopping import SECOND_INTERRUPT_AFTER, STOP_SIGNALS, StopRequest, exit_status

TICK = 0.5  # seconds between two looks at the ranks
HEARTBEAT = 1.0  # seconds between two messages to another rank
SUSPICION = 5.0  # from the first sign of a hang until the states of all ranks have arrived
PATIENCE = 10.0  # how much later than rank 0 the others decide, in case rank 0 cannot
GRACE = 3.0  # for the main thread to end by itself, because its collective failed
EXIT_TIMEOUT = 30.0  # from an error of the main thread to the end of the process
STOP_GRACE = 20.0  # from a signal to the next mark; launchers kill 30 s after the signal
INTERRUPT_GRACE = 2.0  # from a second Ctrl-C to the end
STACK_FRAMES = 12


class Watchdog:
    """Watches this rank and, on rank 0, all others. `close` ends it.

    Args:
        hang_timeout: seconds without progress after which the run ends; None: only dead ranks and
            signals are noticed.
        exchange: returns its argument of every rank, in rank order (a collective).
        warn: called with a message if this rank cannot connect to rank 0.

    Attributes:
        stop_request: told of a signal at once, if set.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        hang_timeout: float | None,
        exchange: Callable[[Any], list],
        warn: Callable[[str], None],
    ):
        self.stop_request: StopRequest | None = None
        self._rank, self._size, self._hang_timeout = rank, size, hang_timeout
        self._mark = Mark()
        self._peers = Peers(rank, size)
        addresses: list[Address] = exchange(self._peers.address())
        known = range(size) if rank == 0 else (0, rank)
        self._states = {number: RankState(addresses[number]) for number in known}
        self._suspected_at: float | None = None
        self._sent_at = 0.0
        self._slowest = 0.0  # longest time between two marks
        self._clock = 0.0  # seconds that this process ran; a process that is stopped does not count them
        self._signals: list[tuple[int, float]] = []  # number, and when it arrived
        self._signalled = Mark()  # the latest mark since a signal, and when it was made
        self._signalled_at = 0.0
        self._verdict = ""
        self._is_reported_here = True
        self._has_verdict, self._is_taken, self._is_closed = threading.Event(), threading.Event(), threading.Event()
        for state in self._states.values():
            state.is_connected = state.address.rank == rank
        if rank:
            try:
                self._peers.connect(addresses[0])
            except ConnectionError as error:
                warn(f"{error}: a rank that dies is noticed only when this rank has waited for it for too long")
        if not faulthandler.is_enabled():
            faulthandler.enable()
        self._watches_signals = threading.current_thread() is threading.main_thread()
        if self._watches_signals:
            self._previous_fd = signal.set_wakeup_fd(self._peers.signal_fd, warn_on_full_buffer=False)
        self._main_thread = threading.current_thread().ident
        self._thread = threading.Thread(target=self._run, name="sinklm watchdog", daemon=True)
        self._thread.start()

    def mark(self, where: str, *, step: int | None = None) -> None:
        """Record where the main thread is. See `hangs.Mark`."""
        last = self._mark
        self._mark = replace(last, count=last.count + 1, step=last.step if step is None else step, where=where)

    @contextmanager
    def longer(self, seconds: float, *, is_saving: bool = False) -> Iterator[None]:
        """Context in which everything may take ``seconds`` longer. See `hangs.Mark`."""
        before = self._mark
        self._mark = replace(before, count=before.count + 1, extra_seconds=seconds, is_saving=is_saving)
        try:
            yield
        finally:
            self._mark = replace(
                self._mark,
                count=self._mark.count + 1,
                extra_seconds=before.extra_seconds,
                is_saving=before.is_saving,
            )

    def verdict(self, wait: float = GRACE) -> tuple[str, bool]:
        """Return what happened to the other ranks, after a collective failed.

        The main thread must then end the process, which is ended after ``EXIT_TIMEOUT`` otherwise.

        Returns:
            the message, empty if nothing is known; and whether this rank should report it.
        """
        self._is_taken.set()
        self._has_verdict.wait(wait)
        return self._verdict, self._is_reported_here

    def close(self, error: str = "") -> None:
        """End the thread and tell the other ranks why this rank has left: they end if it failed."""
        self._is_closed.set()
        self._peers.wake()
        self._thread.join(2 * GRACE)
        if self._watches_signals:
            signal.set_wakeup_fd(self._previous_fd)
        self._peers.send({"left": error})
        self._peers.close()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._is_closed.is_set():
            events = self._peers.wait(TICK)
            now = time.monotonic()
            passed = min(now - before, 4 * TICK)  # a process that was stopped does not count that time
            self._clock += passed
            self._count(passed)
            before = now
            for rank, message in events:
                self._receive(rank, message)
            if now - self._sent_at > HEARTBEAT:
                self._send_state()
            self._look_for_hang(now)
            self._obey()
            if self._verdict:
                self._end()
                return

    def _count(self, seconds: float) -> None:
        for number, state in self._states.items():
            state.is_connected |= number in self._peers.lines
            state.idle += seconds
            state.silent = state.silent + seconds if state.is_connected else 0.0
        own = self._states[self._rank]
        own.silent = 0.0
        if own.mark is not self._mark:
            if not own.mark.extra_seconds:
                self._slowest = max(self._slowest, own.idle)
            own.mark, own.idle = self._mark, 0.0

    def _send_state(self, stack: str = "") -> None:
        own = self._states[self._rank]
        self._peers.send({"mark": asdict(own.mark), "idle": own.idle, "stack": stack})
        self._sent_at = time.monotonic()

    def _receive(self, rank: int, message: Any) -> None:
        if rank == SIGNAL:
            self._receive_signal(message)
            return
        state = self._states[rank]
        state.silent = 0.0
        if message is None:
            if not state.has_left:
                self._decide(f"{state} died. It was last seen {state.place}. All ranks have ended; {RESUME}")
        elif "left" in message:
            state.has_left = True
            if message["left"]:
                self._is_reported_here = rank != 0  # rank 0 has reported its own error
                self._decide(f"{state} failed: {message['left']}")
        elif "end" in message:
            self._is_reported_here = False
            self._decide(message["end"], message["kill"])
        elif "ask" in message:
            self._send_state(self._stack())
        else:
            state.mark, state.idle = Mark(**message["mark"]), message["idle"]
            state.stack = message["stack"] or state.stack

    def _look_for_hang(self, now: float) -> None:
        if self._hang_timeout is None or self._verdict:
            return
        # A step that is slower than the limit is not a hang if those before were as slow.
        limit = max(self._hang_timeout, 3 * self._slowest) + (PATIENCE if self._rank else 0)
        states = list(self._states.values())
        if not (behind := find_hang(states, limit)):
            self._suspected_at = None
        elif self._suspected_at is None:
            self._suspected_at = now
            self._states[self._rank].stack = self._stack()
            self._peers.send({"ask": "stack"})
        elif now - self._suspected_at > SUSPICION:
            silent = [state.address for state in behind if state.silent > SUSPICION]
            self._decide(
                describe_hang(behind, self._size, self._hang_timeout), kill=[[a.machine, a.pid] for a in silent]
            )

    def _decide(self, verdict: str, kill: list | None = None) -> None:
        """Record what happened, tell the other ranks, and kill those that do not answer."""
        if self._verdict:
            return
        self._verdict = verdict
        if self._rank == 0:
            self._peers.send({"end": verdict, "kill": kill or []})
        self._has_verdict.set()
        self._kill(kill or [])

    def _kill(self, processes: list) -> None:
        """Kill processes of this machine. SIGABRT makes them print their stack (`faulthandler`)."""
        own = self._states[self._rank].address.machine
        pids = [pid for machine, pid in processes if machine == own]
        for number in (signal.SIGABRT, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    os.kill(pid, number)
            time.sleep(0.5 if pids else 0)

    def _end(self) -> None:
        """End the process, unless the main thread does so because its collective failed."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if self._is_closed.is_set() or self._is_taken.is_set():
                # NCCL may wait for the dead rank while Python ends. Then only this timer runs.
                atexit.register(faulthandler.dump_traceback_later, EXIT_TIMEOUT, exit=True)
                return
            time.sleep(0.05)
        self._exit(f"error: {self._verdict}" if self._is_reported_here else "", status=1)

    def _exit(self, message: str, status: int) -> None:
        try:
            if sys.stdout.isatty():
                print("\x1b[?25h", end="", flush=True)  # the live line of progress hides the cursor
            if message:
                print(message, file=sys.stderr, flush=True)
        finally:  # also if the terminal is closed, or the reader of a pipe has ended
            os._exit(status)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main_thread or 0)
        return "".join(traceback.format_stack(frame)[-STACK_FRAMES:]) if frame else ""

    def _receive_signal(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        if not self._signals:
            self._signalled, self._signalled_at = self._mark, self._clock
            if self.stop_request and self._rank == 0:
                with contextlib.suppress(OSError):
                    self.stop_request.announce(number)
        self._signals.append((number, self._clock))

    def _obey(self) -> None:
        """End the process after a signal if the main thread is blocked, and cannot obey it."""
        if not self._signals or self._verdict or self._mark.is_saving:
            return
        (first, first_at), (last, last_at) = self._signals[0], self._signals[-1]
        is_again = last == signal.SIGINT and last_at - first_at > SECOND_INTERRUPT_AFTER
        if self._mark is not self._signalled:
            self._signalled, self._signalled_at = self._mark, self._clock
        waited = self._clock - (last_at if is_again else self._signalled_at)
        is_urgent = is_again or self.stop_request is None
        limit = INTERRUPT_GRACE if is_urgent else max(STOP_GRACE, 2 * self._slowest)
        if waited > limit:
            name = signal.Signals(first).name
            self._peers.send({"left": f"it was ended by {name}"})
            place = self._states[self._rank].place
            self._exit(f"{name}: ended without saving, because the process was blocked ({place})", exit_status(first))
