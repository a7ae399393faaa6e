"""Runs commands in parallel, several on each GPU, with a time limit."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

SINKLM = (sys.executable, "-c", "from sinklm.cli.main import main; main()")
STATUS_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """A command. Its output goes to ``log``, a file renamed so when the command succeeds."""

    name: str
    command: tuple[str, ...]
    log: Path

    @property
    def is_done(self) -> bool:
        return self.log.exists()

    @property
    def unfinished_log(self) -> Path:
        return self.log.with_suffix(".unfinished.log")

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.name}: {text}", flush=True)

    def last_line(self) -> str:
        lines = self.unfinished_log.read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class JobQueue:
    """Runs all jobs that are not done, in order. A job that fails does not stop the others.

    Args:
        per_gpu: number of jobs that share a GPU, because a small model does not use all of it.
        minutes: after this time, running jobs receive SIGTERM, on which a training run saves.
            SIGTERM and Ctrl-C have the same effect.

    Attributes:
        is_interrupted: whether SIGTERM or Ctrl-C ended it.
    """

    is_interrupted = False

    def __init__(self, jobs: list[Job], *, per_gpu: int = 1, minutes: float | None = None):
        self._jobs = jobs
        self._waiting = deque(job for job in jobs if not job.is_done)
        self._free = deque(visible_gpus() * per_gpu)
        self._running: dict[Job, tuple[subprocess.Popen, str]] = {}
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._is_stopping = False
        self._next_status = time.monotonic() + STATUS_SECONDS

    def run(self) -> bool:
        """Run the jobs. Returns whether all are done."""
        num_done = len(self._jobs) - len(self._waiting)
        print(f"{len(self._jobs)} jobs, {num_done} already done; {len(self._free)} in parallel", flush=True)
        handlers = {number: signal.signal(number, self._end_soon) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._running or (self._waiting and not self._is_stopping):
                self._start_waiting()
                self._stop_if_due()
                self._collect()
                self._show_status()
                time.sleep(0.2)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        left = [job.name for job in self._jobs if not job.is_done]
        print(f"not done: {', '.join(left)}; run the same command again" if left else "all done", flush=True)
        return not left

    def _end_soon(self, number: int, frame: object) -> None:
        self._deadline = 0.0
        self.is_interrupted = True

    def _start_waiting(self) -> None:
        while self._waiting and self._free and not self._is_stopping:
            job, gpu = self._waiting.popleft(), self._free.popleft()
            job.log.parent.mkdir(parents=True, exist_ok=True)
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
            with open(job.unfinished_log, "a", encoding="utf-8") as log:
                process = subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self._running[job] = process, gpu
            job.say("started" + (f" on GPU {gpu}" if gpu else ""))

    def _stop_if_due(self) -> None:
        if self._is_stopping or time.monotonic() < self._deadline:
            return
        self._is_stopping = True
        for process, _ in self._running.values():
            process.terminate()

    def _collect(self) -> None:
        """Report the jobs that have ended and free their GPUs."""
        for job, (process, gpu) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[job]
            self._free.append(gpu)
            if process.returncode == 0:
                job.unfinished_log.replace(job.log)
                job.say("done")
            else:
                what = "stopped" if self._is_stopping else f"FAILED with status {process.returncode}"
                job.say(f"{what}: {job.last_line()} (see {job.unfinished_log})")

    def _show_status(self) -> None:
        if time.monotonic() < self._next_status:
            return
        self._next_status = time.monotonic() + STATUS_SECONDS
        for job in self._running:
            job.say(job.last_line())


def visible_gpus() -> list[str]:
    """Return GPUs by their names in ``CUDA_VISIBLE_DEVICES``; an empty name is the CPU."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(i) for i in range(torch.cuda.device_count())] or [""]
