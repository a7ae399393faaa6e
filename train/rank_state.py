"""The part of a checkpoint that each rank writes: random states, loss scale, window of losses."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..checkpoints.folders import RANDOM_STATES_FOLDER

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def rank_path(checkpoint: Path, rank: int) -> Path:
    return checkpoint / RANDOM_STATES_FOLDER / f"rank-{rank:05d}.pt"


def rank_state(engine: "DeepSpeedEngine") -> dict:
    """Return random states, the loss scale that DeepSpeed does not save (fp16, no ZeRO), and the
    window by which spikes are judged.
    """
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (the global state is saved)
    scaler = engine.torch_autocast_z0_gradscaler
    return {
        "python": json.dumps(random.getstate()),
        "numpy": [torch.from_numpy(numpy_state[1].astype(np.int64)), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "spikes": engine.spike_guard.state_dict(),
    }


def restore_window(engine: "DeepSpeedEngine", state: dict) -> None:
    """Restore the window of losses and norms, which is the same on every rank."""
    if "spikes" in state:  # not in checkpoints from before it existed
        engine.spike_guard.load_state_dict(state["spikes"])


def restore_rank_state(engine: "DeepSpeedEngine", state: dict) -> None:
    """Restore the state that `rank_state` returned, on the same rank."""
    restore_window(engine, state)
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state["scaler"] is not None and engine.torch_autocast_z0_gradscaler is not None:
        engine.torch_autocast_z0_gradscaler.load_state_dict(state["scaler"])
