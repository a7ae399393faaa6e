"""DeepSpeed's ``ds_to_universal`` as a process that can read the classes in DeepSpeed's files.

``python -m sinklm.train.converter --input_folder … --output_folder …``
"""

import torch
from deepspeed.checkpoint import ds_to_universal

from .unpickling import deepspeed_classes

torch.serialization.add_safe_globals(deepspeed_classes())  # at import, for workers that import this module again

if __name__ == "__main__":
    ds_to_universal.main(ds_to_universal.parse_arguments())
