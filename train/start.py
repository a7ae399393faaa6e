"""Checks before a run starts: the tokenizer, and the model of ``model.init_from``."""

from dataclasses import replace
from pathlib import Path

from ..checkpoints.checks import read_tokenizer
from ..checkpoints.export import name_sinks
from ..checkpoints.warm_start import check_source, check_tokenizer, describe_change
from .plan import Plan
from .recipe import saved_values


def check_start(plan: Plan, tokenizer_path: Path | None) -> list[str]:
    """Check that the tokenizer can get the sinks, and that the run can start from its model.

    Weights are not read.

    Args:
        tokenizer_path: the ``tokenizer.json`` of the data; None: unknown.

    Returns:
        Lines that say what is taken from the model; none if the initial weights are random.

    Raises:
        ValueError: the tokenizer of the data cannot get the sinks; or the tokenizer, architecture,
            sink or weights of the model do not fit the run.
        FileNotFoundError: no model was found.
    """
    if tokenizer_path is not None:
        name_sinks(read_tokenizer(tokenizer_path), plan.model_config.sink_token_ids, tokenizer_path)
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
