"""Initial rows of the embedding for sink tokens that a model was not trained with."""

from enum import StrEnum

import torch

from ..models import SinkGPTNeoXForCausalLM


class SinkRow(StrEnum):
    """The initial embedding of a new sink token.

    - ``mean``: the mean of the rows of all tokens. It has no direction of its own, and the model
      was trained with the rows that it is the mean of.
    - ``endoftext``: the row of the end-of-text token, which models such as Pythia have often seen
      before the first token of a document.
    - ``random``: drawn as in a new model, normal with standard deviation √(2 / 5D).
    """

    MEAN = "mean"
    ENDOFTEXT = "endoftext"
    RANDOM = "random"


@torch.no_grad()
def start_sink_rows(
    model: SinkGPTNeoXForCausalLM,
    token_ids: list[int],
    row: str = SinkRow.MEAN,
    *,
    seed: int | None = None,
) -> None:
    """Set the embedding ``(V, D)`` of new sink tokens; no other row and no other weight changes.

    With ``mean`` and ``endoftext``, only the first of them gets this row, and the others are drawn
    at random: sinks with equal rows would have equal hidden states in all layers.

    Args:
        token_ids: the new sinks. All ids before the model's first sink are tokens.
        row: one of `SinkRow`.
        seed: of the random rows; default: that of torch.
    """
    embedding = model.get_input_embeddings().weight
    seed = torch.initial_seed() if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    for i, token_id in enumerate(token_ids):
        drawn = torch.randn(embedding.shape[1], generator=generator) * (2 / (5 * embedding.shape[1])) ** 0.5
        new = drawn if i or row == SinkRow.RANDOM else _known_row(model, embedding, row)
        embedding[token_id] = new.to(embedding)


def _known_row(model: SinkGPTNeoXForCausalLM, embedding: torch.Tensor, row: str) -> torch.Tensor:
    if row == SinkRow.ENDOFTEXT:
        return embedding[model.config.eos_token_id]
    # Without the rows after the tokens, which only pad the matrix.
    return embedding[: model.config.sink_token_ids[0]].double().mean(dim=0)
