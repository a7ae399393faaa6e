"""One rank that executes several training runs in sequence.

`run_calls` gets a list of calls {"recipe", "overrides"}, each with optional events:

- "only": [rank, overrides]: a rank has other settings than the rest;
- "copy": [run_dir, step, run_dir]: first, a checkpoint is copied;
- "damage": [run_dir, run_dir, file]: first, a run is copied, and a bit of a file is flipped;
- "file_limit": [rank, bytes]: the disk of a rank is full;
- "signal": [rank, number, step, run_dir]: a rank receives a signal after the run has done that
  step;
- "bad_loss": [rank, step, num_micro_batches]: a rank's loss is NaN in that step, or multiplied by a
  fourth number;
- "min_steps": steps after which spikes are judged;
- "hang": [rank, step, num_micro_batches]: a rank waits forever for the samples of that step;
- "watchdog": constants of the module `watchdog` that are smaller in this call;
- "unpinned": a rank cannot pin host memory;
- "ahead": true: a step is queued before the previous one is read, as on a GPU.

The outcome of each call is printed as one JSON line.
"""

import json
import os
import resource
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from sinklm.train import hosts, spikes, watchdog
from sinklm.train.run import train
from sinklm.train.snapshot import HostMemory

from .tiny import ahead, bad_loss_in, copy_checkpoint, flip_bit, hang_in, wait_for_step


def run_calls(calls: list[dict]) -> None:
    for call in calls:
        print(json.dumps({"outcome": make(call, int(os.environ["RANK"]))}), flush=True)


def make(call: dict, rank: int) -> str:
    if "copy" in call:
        source, step, target = call["copy"]
        if rank == 0:
            copy_checkpoint(Path(source), step, Path(target))
        dist.barrier()
    if "damage" in call:
        source, target, name = call["damage"]
        if rank == 0:
            shutil.copytree(source, target)
            flip_bit(Path(target) / name)
        dist.barrier()
    if "signal" in call and call["signal"][0] == rank:
        threading.Thread(target=send_signal, args=call["signal"][1:], daemon=True).start()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if "file_limit" in call and call["file_limit"][0] == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call["file_limit"][1], limits[1]))
    try:
        with ExitStack() as stack:
            if call.get("ahead"):
                stack.enter_context(ahead())
            if "bad_loss" in call and call["bad_loss"][0] == rank:
                stack.enter_context(bad_loss_in(*call["bad_loss"][1:]))
            if "min_steps" in call:
                stack.enter_context(patch.object(spikes, "MIN_STEPS", call["min_steps"]))
            if "hang" in call and call["hang"][0] == rank:
                stack.enter_context(hang_in(*call["hang"][1:]))
            if "only" in call:
                stack.enter_context(patch.object(hosts, "APPEARS_WITHIN", 0.3))
            if call.get("unpinned") == rank:
                stack.enter_context(patch.object(HostMemory, "_pin", fail_to_pin))
            for name, seconds in call.get("watchdog", {}).items():
                stack.enter_context(patch.object(watchdog, name, seconds))
            train(call["recipe"], call["overrides"] + (call["only"][1] if call.get("only", [None])[0] == rank else []))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    except SystemExit as exit_:
        return f"exit {exit_.code}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "done"


def fail_to_pin(memory: HostMemory) -> None:
    memory._pinning_error = "no memory"


def send_signal(number: int, step: int, run_dir: str) -> None:
    try:
        wait_for_step(Path(run_dir), step)
    finally:  # or training would not end
        os.kill(os.getpid(), number)
