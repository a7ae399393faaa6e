"""One rank of a world that makes several training runs behind each other: starting Python is what takes the time.

``python -m tests.train.worker CALLS.json``: a list of {"recipe", "overrides"}, and where wanted
{"copy": [run_dir, step, run_dir]} (first, copy a checkpoint) and {"file_limit": bytes, "file_limit_rank": rank} (the
disk is full on one rank). The outcome of each call is printed as one JSON line.
"""

import json
import os
import resource
import sys
from pathlib import Path

import torch.distributed as dist
from sinklm.train.run import train

from .tiny import copy_checkpoint


def main() -> None:
    rank = int(os.environ["RANK"])
    for call in json.loads(Path(sys.argv[1]).read_text()):
        if "copy" in call:
            source, step, target = call["copy"]
            if rank == 0:
                copy_checkpoint(Path(source), step, Path(target))
            dist.barrier()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if call.get("file_limit_rank") == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (call["file_limit"], limits[1]))
        outcome = "done"
        try:
            train(call["recipe"], call["overrides"])
        except (ValueError, OSError) as error:
            outcome = f"{type(error).__name__}: {error}"
        except SystemExit as exit_:
            outcome = f"exit {exit_.code}"
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        print(json.dumps({"outcome": outcome}), flush=True)


if __name__ == "__main__":
    main()
