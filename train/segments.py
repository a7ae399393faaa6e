"""The forward passes over a micro-batch: one, or one for each segment of its samples.

A segment's pass gets the last keys and values of the segment before it, without gradient
(Transformer-XL, Dai et al. 2019). So memory depends on the length of a segment and not on that of
the sample, and the losses equal those of one pass over the whole sample.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.carried import CarriedKeys
from .plan import Plan


def pass_losses(
    engine: Callable[..., Any],
    samples: Tensor,
    labels: Tensor,
    plan: Plan,
    *,
    num_samples: int | None = None,
    window: int | None = None,
) -> Iterator[Tensor]:
    """Yield the loss of each forward pass over a micro-batch; their mean is that of its targets.

    The graph of a pass does not reach into those before it, so each can be freed by a backward pass
    before the next one.

    Args:
        engine: the engine, or the model itself.
        samples: ``(b, tokens_per_sample)``.
        labels: the same, or -100 in the samples that do not count.
        num_samples: how many samples count; None: all.
        window: the window that was drawn, see `Plan.window`; None: that of the configuration.
    """
    arguments: dict[str, Any] = {"skip_logits": True, "use_cache": False}
    if window is not None:
        arguments["window"] = torch.tensor(window)  # not an int, for each of which torch would compile again
    if plan.num_segments == 1:
        yield engine(input_ids=samples[:, :-1], labels=labels, **arguments).loss
        return
    num_counted = len(samples) if num_samples is None else num_samples
    num_targets = float(num_counted * plan.targets_per_sample)
    arguments["num_items_in_batch"] = samples.new_full((), num_targets, dtype=torch.float32)
    carried = CarriedKeys()
    for start, stop in segment_bounds(plan):
        inputs, targets = samples[:, start:stop], labels[:, start : stop + 1]
        output = engine(input_ids=inputs, labels=targets, carried=carried, **arguments)
        carried = output.carried
        yield output.loss * plan.num_segments


def segment_bounds(plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield start and end of the input tokens of each segment of a sample.

    The positions of the sink tokens belong to the first segment.
    """
    length = plan.config.train.seq_length // plan.num_segments
    for end in range(length, plan.config.train.seq_length + 1, length):
        yield max(end - length - plan.num_sinks, 0), end - plan.num_sinks
