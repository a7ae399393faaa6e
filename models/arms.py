"""The arms (``sink.kind``) without a sink token: an extra softmax column, or gates on the output.

- ``zero``: softmax-off-by-one (Miller 2023);
- ``logit``: a learned logit per head, as in gpt-oss (OpenAI 2025);
- ``kv_bias``: explicit attention bias (Sun et al. 2024; Gu et al., ICLR 2025);
- ``gate``: elementwise output gate (Qiu et al., NeurIPS 2025);
- ``head_gate``: one output gate per head (the same paper; OLMo-core).

docs/arms.md compares them.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig
from transformers import initialization as init

from .attention import SinkAttention, score_dtype
from .sink_column import SinkColumn


class ZeroSinkAttention(SinkAttention):
    """``exp(x) / (1 + Σ exp(x))``: a column with score 0 and value 0."""

    def column(self, query: Tensor) -> SinkColumn:
        return SinkColumn(torch.zeros((), dtype=score_dtype(query), device=query.device))


class LogitSinkAttention(SinkAttention):
    """A column with a learned score for each head and value 0."""

    def __init__(self, config: GPTNeoXConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.sink_logit = nn.Parameter(torch.empty(config.num_attention_heads))

    def column(self, query: Tensor) -> SinkColumn:
        return SinkColumn(self.sink_logit.to(score_dtype(query))[:, None])

    def initialise(self) -> None:
        init.zeros_(self.sink_logit)


class KeyValueSinkAttention(SinkAttention):
    """A column with a learned key and value for each head.

    The score uses the query before rotary embedding, so it does not depend on the query's position.
    """

    column_reads_query = True

    def __init__(self, config: GPTNeoXConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.sink_key = nn.Parameter(torch.empty(config.num_attention_heads, self.head_size))
        self.sink_value = nn.Parameter(torch.empty(config.num_attention_heads, self.head_size))

    def column(self, query: Tensor) -> SinkColumn:
        dtype = score_dtype(query)
        scores = (query.to(dtype) * self.sink_key.to(dtype)[:, None]).sum(-1)
        return SinkColumn(scores * self.scaling, self.sink_value)

    def initialise(self) -> None:
        init.zeros_(self.sink_key)
        init.zeros_(self.sink_value)


class Gate(nn.Linear):
    """The matrix of a layer's gates.

    It is initialised from its own random generator. With the same seed, all arms therefore start
    with the same values in the weights that they share.
    """

    def __init__(self, hidden_size: int, num_gates: int, layer_idx: int):
        self.layer_idx = layer_idx
        super().__init__(hidden_size, num_gates, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: `initialise` sets the weights."""

    def initialise(self) -> None:
        if self.weight.is_meta:
            return
        seed = (torch.initial_seed() + 1 + self.layer_idx) % 2**63
        generator = torch.Generator(self.weight.device).manual_seed(seed)
        init.normal_(self.weight, std=math.sqrt(2 / (5 * self.in_features)), generator=generator)


class GatedAttention(SinkAttention):
    """Multiplies the heads' outputs elementwise by ``sigmoid(W x)``.

    x is the layer's normalised input.
    """

    def __init__(self, config: GPTNeoXConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate = Gate(config.hidden_size, config.hidden_size, layer_idx)

    def gated(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        return out * self.gate(hidden_states).sigmoid()


class HeadGatedAttention(SinkAttention):
    """Multiplies the output of each head by one number, ``sigmoid(w x)``.

    x is the layer's normalised input.
    """

    def __init__(self, config: GPTNeoXConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_gate = Gate(config.hidden_size, config.num_attention_heads, layer_idx)

    def gated(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        gates = self.head_gate(hidden_states).sigmoid()  # (B, T, H)
        return (out.unflatten(-1, (-1, self.head_size)) * gates[..., None]).flatten(2)


ARMS: dict[str, type[SinkAttention]] = {
    "zero": ZeroSinkAttention,
    "logit": LogitSinkAttention,
    "kv_bias": KeyValueSinkAttention,
    "gate": GatedAttention,
    "head_gate": HeadGatedAttention,
}
ARM_PARAMETERS = r"attention\.(sink_|gate\.|head_gate\.)"  # matches the names of parameters that only one arm has
