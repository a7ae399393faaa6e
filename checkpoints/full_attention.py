"""Export of models with windowed layers, which plain GPT-NeoX and llama.cpp do not have.

With full attention in place of the windows, a model computes something else than it was trained
for. Exports therefore refuse such a model unless the caller asks for it, and can measure the cost.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.config import WINDOW_FIELDS, SinkGPTNeoXConfig
from .loading import load_model, load_tokenizer

NUM_SAMPLES = 4  # of the trained length


class AttentionCost(NamedTuple):
    """Mean loss of a text in nats per token.

    Args:
        windowed: with the model's windows.
        full: with full attention.
        num_tokens: number of scored tokens.
    """

    windowed: float
    full: float
    num_tokens: int


def check_windows(config: PreTrainedConfig, checkpoint: str | Path, full_attention: bool) -> None:
    """Check that a model may be exported with full attention.

    Raises:
        ValueError: it has windowed layers, and ``full_attention`` is False.
    """
    windows = [window for window in getattr(config, "layer_windows", None) or () if window is not None]
    if windows and not full_attention:
        raise ValueError(
            f"{checkpoint} has {len(windows)} windowed layers, which neither plain GPT-NeoX nor llama.cpp has: pass "
            "--full-attention to export it with full attention in all layers, which it was not trained with"
        )


def use_full_attention(config: SinkGPTNeoXConfig) -> None:
    """Remove the windows from a configuration, and so from its model."""
    for name in WINDOW_FIELDS:
        setattr(config, name, None)


def full_attention_cost(checkpoint: str | Path, text: str | None = None) -> AttentionCost | None:
    """Measure the loss of a model with its windows and without.

    Args:
        checkpoint: a run, a checkpoint or the folder of a sinklm model.
        text: default: the help texts of Python.

    Returns:
        The losses of at most `NUM_SAMPLES` samples of the trained length, or None if the model has
        no windows.

    Raises:
        ValueError: the text is too short.
    """
    model = load_model(checkpoint)
    if not getattr(model.config, "has_windows", False):
        return None
    length = model.config.max_position_embeddings - model.config.num_sinks
    ids = load_tokenizer(checkpoint)(_help_texts() if text is None else text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids[: NUM_SAMPLES * length])
    if len(ids) < 2:
        raise ValueError("the text has fewer than two tokens: pass a longer one")
    windowed = _mean_loss(model, ids, length)
    use_full_attention(model.config)
    return AttentionCost(windowed, _mean_loss(model, ids, length), len(ids))


@torch.inference_mode()
def _mean_loss(model: PreTrainedModel, ids: torch.Tensor, length: int) -> float:
    losses, num_targets = 0.0, 0
    for sample in ids.to(model.device).split(length):
        if len(sample) < 2:
            continue
        output = model(sample[None], labels=sample[None], skip_logits=True, num_items_in_batch=1)
        losses += output.loss.item()
        num_targets += len(sample) - (model.config.num_sinks == 0)
    return losses / num_targets


def _help_texts() -> str:
    """Return Python's language reference, which every installation has: 600 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
