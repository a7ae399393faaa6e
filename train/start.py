"""The model from whose weights a run starts (``model.init_from``)."""

from dataclasses import replace
from pathlib import Path

from ..checkpoints.warm_start import check_source, check_tokenizer, describe_change
from .plan import Plan
from .recipe import saved_values


def check_start(plan: Plan, tokenizer_path: Path | None) -> list[str]:
    """Check that a run can start from ``model.init_from``, without reading its weights.

    Args:
        tokenizer_path: the ``tokenizer.json`` of the data; None: unknown.

    Returns:
        Lines that say what is taken from the model; none if the initial weights are random.

    Raises:
        ValueError: its tokenizer, architecture, sink or weights do not fit the run.
        FileNotFoundError: no model was found.
    """
    name = plan.config.model.init_from
    if name is None:
        return []
    if tokenizer_path is not None:
        check_tokenizer(name, tokenizer_path)
    source = check_source(name, plan.model_config)
    saved = saved_values(plan.config)["model"]["init_from"]
    if saved != name:  # an interpolation, whose value may be secret
        source = replace(source, folder=saved)
    lines = [source.describe(plan.model_config)]
    if plan.config.train.only_sinks and source.num_sinks:
        lines.append("train.only_sinks begins with its sink: for a new one, start from a model without a sink")
    if change := describe_change(name, plan.model_config):
        lines.append(change)
    return lines
