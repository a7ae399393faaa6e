"""Export of models with windowed layers, which plain GPT-NeoX and llama.cpp do not have.

With full attention in place of the windows, a model computes something else than it was trained
for. Exports therefore refuse such a model unless the caller asks for it, and measure the cost.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.config import WINDOW_FIELDS, SinkGPTNeoXConfig
from ..parsing import named_damage, parse_yaml
from .folders import CONFIG_FILE, STATE_FILE, resolve_model_folder
from .loading import load_model, load_tokenizer

SAMPLE_LENGTH = 4096  # longest sample of the text, unless the windows are longer than half of it
NUM_POSITIONS = 16_384  # of all samples together


class AttentionCost(NamedTuple):
    """Mean loss of a text in nats per token.

    Args:
        windowed: with the model's windows.
        full: with full attention.
        num_tokens: number of tokens.
        num_samples: number of samples into which the text was cut.
        stderr: standard error of ``full - windowed`` over the samples; None with one sample.
    """

    windowed: float
    full: float
    num_tokens: int
    num_samples: int
    stderr: float | None

    def __str__(self) -> str:
        difference = f"{self.full - self.windowed:+z.3f}"
        if self.stderr is not None:
            difference += f" ± {self.stderr:.3f}, one standard error over {self.num_samples} samples"
        return (
            f"with full attention, the loss on {self.num_tokens:,} tokens is {self.full:.3f} nats per token, and "
            f"{self.windowed:.3f} with the windows that the model was trained with ({difference})"
        )


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

    Samples have the trained length, but at most `SAMPLE_LENGTH` positions, or twice the largest
    window if that is more: a model may have far more positions than can be measured in minutes.

    Args:
        checkpoint: a run, a checkpoint or the folder of a sinklm model.
        text: default: the help texts of Python.

    Returns:
        The losses of samples with `NUM_POSITIONS` positions in total, if the text has as many, or
        None if the model has no windows.

    Raises:
        ValueError: the text is so short that windows and full attention are the same.
    """
    model = load_model(checkpoint)
    if not getattr(model.config, "has_windows", False):
        return None
    num_sinks = model.config.num_sinks
    largest = max(window for window in model.config.windows if window is not None)
    num_positions = min(_trained_length(checkpoint, model.config), max(SAMPLE_LENGTH, 2 * largest))
    length = num_positions - num_sinks
    num_samples = max(NUM_POSITIONS // num_positions, 1)
    ids = load_tokenizer(checkpoint)(_help_texts() if text is None else text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(ids[: num_samples * length])
    needed = max(min(model.config.num_kept + largest + 2, num_positions) - num_sinks, 2)
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids)} tokens, and the windows hide none of them: pass at least {needed}")
    windowed, num_targets = _sample_losses(model, ids, length)
    use_full_attention(model.config)
    full, _ = _sample_losses(model, ids, length)
    return AttentionCost(
        windowed=(windowed.sum() / num_targets.sum()).item(),
        full=(full.sum() / num_targets.sum()).item(),
        num_tokens=len(ids),
        num_samples=len(num_targets),
        stderr=_ratio_stderr(full - windowed, num_targets),
    )


def measured_cost(checkpoint: str | Path, full_attention: bool, text: str | None) -> AttentionCost | None:
    """Return `full_attention_cost` for an export that asks for full attention, and None otherwise.

    Warns:
        UserWarning: says the cost, or that the model has no windows.
    """
    cost = full_attention_cost(checkpoint, text) if full_attention else None
    if full_attention:
        unchanged = f"{checkpoint} has full attention in all layers: --full-attention changes nothing"
        warnings.warn(unchanged if cost is None else str(cost), stacklevel=3)
    return cost


def _trained_length(checkpoint: str | Path, config: PreTrainedConfig) -> int:
    """Return the positions of a sample of the training, or of the model if that is unknown."""
    folder = Path(resolve_model_folder(checkpoint)).absolute().parent
    if not (folder / STATE_FILE).exists():
        return config.max_position_embeddings
    with named_damage(folder / CONFIG_FILE, "restore it, or use another checkpoint"):
        return parse_yaml((folder / CONFIG_FILE).read_bytes())["train"]["seq_length"]


@torch.inference_mode()
def _sample_losses(model: PreTrainedModel, ids: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the total loss ``(N)`` of each sample, and its number of targets ``(N)``."""
    samples = [sample for sample in ids.to(model.device).split(length) if len(sample) > 1]
    losses = [
        model(sample[None], labels=sample[None], skip_logits=True, num_items_in_batch=1).loss.item()
        for sample in samples
    ]
    num_targets = [len(sample) - (model.config.num_sinks == 0) for sample in samples]
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(num_targets, dtype=torch.float64)


def _ratio_stderr(totals: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Return the standard error of ``totals.sum() / counts.sum()`` over samples of any sizes."""
    if len(totals) < 2:
        return None
    residuals = totals - counts * (totals.sum() / counts.sum())
    return (residuals.std() * len(totals) ** 0.5 / counts.sum()).item()


def _help_texts() -> str:
    """Return Python's language reference, which every installation has: 600 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
