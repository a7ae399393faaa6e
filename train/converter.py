"""DeepSpeed's ``ds_to_universal`` as a process that can read the classes in DeepSpeed's files.

``python -m sinklm.train.converter --input_folder … --output_folder …``

It requires two moments of each parameter, but those of Muon have only one: see
`universal.add_second_moments`.
"""

from typing import Any

import torch
from deepspeed.checkpoint import DeepSpeedCheckpoint, ds_to_universal

from .universal import add_second_moments
from .unpickling import deepspeed_classes, pickle_enums_by_value

# At import, for workers that import this module again.
torch.serialization.add_safe_globals(deepspeed_classes())
pickle_enums_by_value()
read_state = DeepSpeedCheckpoint.get_zero_checkpoint_state


def read_complete_state(self: DeepSpeedCheckpoint, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the state of one rank, with two moments for each group of parameters."""
    state = read_state(self, *args, **kwargs)
    add_second_moments(state["optimizer_state_dict"]["base_optimizer_state"])
    return state


DeepSpeedCheckpoint.get_zero_checkpoint_state = read_complete_state

if __name__ == "__main__":
    ds_to_universal.main(ds_to_universal.parse_arguments())
