"""Processes that are the ranks of one world, forked from one that has imported torch and DeepSpeed.

Importing them takes six seconds of a core, so it is done once and not in each rank.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORKSERVER = multiprocessing.get_context("forkserver")
# The last one imports torch's compiler. DeepSpeed imports it when it makes an engine.
FORKSERVER.set_forkserver_preload(["tests.train.worker", "deepspeed", "deepspeed.runtime.zero.muon.original_muon"])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_module(name: str, arguments: list[str]) -> None:
    """Do what ``python -m NAME ARGUMENT…`` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


class Ranks:
    """Processes that call a function as the ranks of one world, as if a launcher had started them.

    Args:
        function: a function of a module. Its `SystemExit` is the exit status.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, world_size: int):
        world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [Path(self._folder.name) / f"rank-{rank}.log" for rank in range(world_size)]
        self.processes = [
            FORKSERVER.Process(
                target=_run_rank,
                args=(log, {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, function, arguments),
            )
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: signal.Signals, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, timeout: float = 600) -> list[tuple[int | None, str]]:
        """Exit status and output of each."""
        try:
            for process in self.processes:
                process.join(timeout)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return [(process.exitcode, log.read_text()) for process, log in zip(self.processes, self._logs, strict=True)]


def run_python(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Do what ``subprocess.run([sys.executable, "-m", NAME, …])`` does, in a forked process."""
    _, option, name, *arguments = command
    assert option == "-m"
    ((status, output),) = Ranks(run_module, name, arguments, world_size=1).wait()
    return subprocess.CompletedProcess(command, 1 if status is None else status, "", output)


def _run_rank(log: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    gc.freeze()  # see `tests/conftest.py`
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # that of a program
    os.environ.clear()
    os.environ.update(environment)
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing leaves them out
