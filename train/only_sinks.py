"""Training of the sink tokens alone (`train.only_sinks`): all other weights stay as they are.

The rows of the sinks are part of the embedding, so the optimizer gets the whole embedding, and the
gradient of its other rows is zero. AdamW without weight decay does not change a row whose gradients
were always zero. The weights must be the float32 ones of ZeRO stage 0: the 16-bit weights of higher
stages are rounded, and so would be the frozen ones in a checkpoint.
"""

from torch import Tensor

from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.cost import count_parameters
from .config import TrainingConfig


def freeze_others(model: SinkGPTNeoXForCausalLM) -> None:
    """Let gradients reach the rows of the sinks only."""
    rows = slice(model.config.sink_token_ids[0], model.config.sink_token_ids[-1] + 1)

    def of_sinks(gradient: Tensor) -> Tensor:
        masked = gradient.new_zeros(gradient.shape)
        masked[rows] = gradient[rows]
        return masked

    model.requires_grad_(False)
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(True).register_hook(of_sinks)


def count_frozen_parameters(config: TrainingConfig, model: SinkGPTNeoXConfig) -> int:
    """Count the parameters that get no gradient: all but the embedding, or 0 without the key."""
    return count_parameters(model) - model.vocab_size * model.hidden_size if config.train.only_sinks else 0
