"""The space that checkpoints take on disk."""

import shutil
from pathlib import Path

from ..checkpoints.folders import list_checkpoints
from ..models.cost import count_parameters
from .config import TrainingConfig
from .memory import count_muon_parameters, size_text
from .only_sinks import count_frozen_parameters
from .plan import Plan
from .schedule import is_pythia_step, num_saved_before, saves_after

RANK_BYTES = 19_400  # the random states of a rank
FILE_BYTES = 60_000  # descriptions, and the headers of the other files
SLACK = 2**24  # bytes; gaps between tensors, and small ones
TOKENIZER_BYTES = 2_200_000  # Pythia's tokenizer.json


def checkpoint_bytes(plan: Plan, tokenizer_path: Path | None = None) -> int:
    """Return the size of a checkpoint, to 1 % for models of over a million parameters.

    Bytes per parameter, for all numbers of ranks:

    ===== ============================ ============================
    stage 16-bit                       float32
    ===== ============================ ============================
    0     4 ``model/`` + 12            the same
    1, 2  2 ``model/`` + 2 + 12        4 ``model/`` + 4 + 12
    3     2 ``model/`` + 12            4 ``model/`` + 12
    ===== ============================ ============================

    12 is the float32 weights and AdamW's two moments; 8 for the matrices that Muon updates, and 4
    for frozen weights.
    """
    config, stage = plan.config, plan.config.deepspeed.zero_stage
    weight = 4 if stage == 0 or config.train.precision == "fp32" else 2
    per_parameter = weight + 12 + (weight if stage in (1, 2) else 0)
    tokenizer = tokenizer_path.stat().st_size if tokenizer_path else TOKENIZER_BYTES
    weights = count_parameters(plan.model_config) * per_parameter - _without_moments(plan)
    return weights + tokenizer + plan.world_size * RANK_BYTES + FILE_BYTES


def run_bytes(plan: Plan, num_checkpoints: int, tokenizer_path: Path | None = None) -> int:
    """Return the size of a run's checkpoints; the one at step 0 has no moments yet."""
    size = num_checkpoints * checkpoint_bytes(plan, tokenizer_path)
    has_first = saves_after(plan.config.train.num_steps, plan.config.checkpoint)(0)
    return size - has_first * (8 * count_parameters(plan.model_config) - _without_moments(plan))


def snapshot_bytes(plan: Plan, *, is_main: bool) -> int:
    """Return the size of what one rank writes to a checkpoint, and a little more."""
    stage, parameters = plan.config.deepspeed.zero_stage, count_parameters(plan.model_config)
    weight = 4 if stage == 0 or plan.config.train.precision == "fp32" else 2
    in_optimizer = 12 * parameters - _without_moments(plan)
    optimizer = in_optimizer // plan.world_size if stage else in_optimizer * is_main
    weights = weight * parameters * is_main * (2 if stage in (1, 2) else 1)
    return int(1.01 * (optimizer + weights)) + SLACK


def _without_moments(plan: Plan) -> int:
    """Return the bytes of moments that Muon's matrices and frozen weights do not have."""
    settings = plan.config, plan.model_config
    return 4 * count_muon_parameters(*settings) + 8 * count_frozen_parameters(*settings)


def checkpoints_kept(config: TrainingConfig) -> tuple[int, int]:
    """Return how many checkpoints a run leaves at its end, and how many exist at once at most.

    An old checkpoint is deleted only when a new one is complete, so one more exists until then. The
    most exist at the last save.
    """
    section, num_steps = config.checkpoint, config.train.num_steps
    permanent, passing = num_saved_before(num_steps, section)
    most_passing = section.keep or num_steps
    most = permanent + min(passing, most_passing) + 1
    if section.pythia_steps and is_pythia_step(num_steps):
        permanent += 1
    else:
        passing += 1
    return permanent + min(passing, most_passing), most


def check_free_space(folder: Path, needed: int) -> None:
    """Raise an OSError if the disk of ``folder`` has less than ``needed`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"it takes {size_text(needed)}, but {size_text(free)} are free on its disk: delete files, or set "
            "checkpoint.keep lower"
        )


def space_warning(plan: Plan, run_dir: Path, tokenizer_path: Path) -> str | None:
    """Return a warning if the disk has too little space for the checkpoints of the run, or None."""
    _, most = checkpoints_kept(plan.config)
    missing = max(most - len(list_checkpoints(run_dir)), 1)
    needed, free = missing * checkpoint_bytes(plan, tokenizer_path), shutil.disk_usage(run_dir).free
    if free >= needed:
        return None
    return (
        f"warning: {size_text(free)} are free on the disk of {run_dir}, but the checkpoints still to be written "
        f"take up to {size_text(needed)} ({missing} at once): free space, or set checkpoint.keep lower"
    )
