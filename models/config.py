"""The configuration of a Pythia-style model with an attention sink."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig, PreTrainedConfig

DEFAULT_NUM_KEPT = 4  # for a model without sink tokens (Xiao et al. 2024, Table 2)
SINK_KINDS = ("none", "token", "zero", "logit", "kv_bias", "gate")


@strict
class SinkGPTNeoXConfig(GPTNeoXConfig):
    """`GPTNeoXConfig` with the additional field ``sink``, which configures the attention sink.

    ``sink`` is a dictionary:

    - ``kind``: ``"none"`` (plain GPT-NeoX), ``"token"`` (learnable sink tokens, Xiao et al. 2024,
      section 3.3), or an arm without sink tokens: ``"zero"``, ``"logit"``, ``"kv_bias"``,
      ``"gate"`` (see `sinklm.models.arms`);
    - ``num_tokens``: number of sink tokens that the model prepends (``token`` only, default 1);
    - ``first_token_id``: vocabulary id of the first sink token; the others have the ids after it
      (``token`` only). The default is 50277, the first of the ids 50277 to 50303 that Pythia's
      tokenizer does not use.

    Raises:
        ValueError: unknown kind or key, or sink ids outside the vocabulary.
    """

    model_type = "sink_gpt_neox"

    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    sink: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs):
        self.sink = _normalised(self.sink)
        super().__post_init__(**kwargs)

    def validate_sink(self) -> None:
        first, last = self.sink.get("first_token_id", 0), self.sink.get("first_token_id", 0) + self.num_sinks - 1
        if self.num_sinks and last >= self.vocab_size:
            raise ValueError(
                f"the sink token ids {first}…{last} are outside the vocabulary of "
                f"{self.vocab_size}: raise vocab_size or lower sink.first_token_id"
            )

    @property
    def sink_kind(self) -> str:
        return self.sink["kind"]

    @property
    def num_sinks(self) -> int:
        """Number of sink tokens that the model prepends; 0 unless the kind is ``token``."""
        return self.sink.get("num_tokens", 0)

    @property
    def sink_token_ids(self) -> list[int]:
        if not self.num_sinks:
            return []
        first = self.sink["first_token_id"]
        return list(range(first, first + self.num_sinks))


def sink_config(config: PreTrainedConfig) -> SinkGPTNeoXConfig:
    """Return the configuration of the sink of a model of sinklm or of an export.

    Other models have no sink. For the sink tokens that the model itself adds to a text, see
    `num_prepended_sinks`.

    Raises:
        ValueError: the key ``sink`` of an export is wrong.
    """
    if isinstance(config, SinkGPTNeoXConfig):
        return config
    sink = getattr(config, "sink", None)
    if config.model_type != "gpt_neox" or not isinstance(sink, dict):
        return SinkGPTNeoXConfig()
    return SinkGPTNeoXConfig(vocab_size=config.vocab_size, sink=sink)


def num_prepended_sinks(config: PreTrainedConfig) -> int:
    """Return how many sink tokens the model itself adds to a text: 0 if its tokenizer does."""
    return config.num_sinks if isinstance(config, SinkGPTNeoXConfig) else 0


def default_num_kept(config: PreTrainedConfig) -> int:
    """Return how many first tokens a cache keeps by default: the sinks, or `DEFAULT_NUM_KEPT`."""
    return sink_config(config).num_sinks or DEFAULT_NUM_KEPT


def tokens_per_sample(seq_length: int, num_sinks: int) -> int:
    """Return the number of text tokens in a training sample of ``seq_length`` positions.

    With n sinks the positions are ``sink×n, t0 … t_{seq_length-1-n}``, and the target of the last
    position is the following token. Every arm thus computes ``seq_length`` positions.
    """
    if num_sinks >= seq_length:
        raise ValueError(
            f"seq_length is {seq_length}, which leaves no room for text after {num_sinks} sink tokens: raise it"
        )
    return seq_length + 1 - num_sinks


def _normalised(sink: dict[str, Any]) -> dict[str, Any]:
    allowed = {"kind", "num_tokens", "first_token_id"}
    if unknown := set(sink) - allowed:
        raise ValueError(f"unknown key sink.{sorted(unknown)[0]}: use only {', '.join(sorted(allowed))}")
    kind = sink.get("kind", "none")
    if kind not in SINK_KINDS:
        raise ValueError(f"sink.kind is {kind!r}: choose one of {', '.join(SINK_KINDS)}")
    if kind != "token":
        return {"kind": kind}
    num_tokens, first_token_id = sink.get("num_tokens", 1), sink.get("first_token_id", 50277)
    if not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(
            f"sink.num_tokens is {num_tokens!r}: it must be an integer of at least 1; for no sink set sink.kind to none"
        )
    if not isinstance(first_token_id, int) or first_token_id < 0:
        raise ValueError(f"sink.first_token_id is {first_token_id!r}: it must be a vocabulary id (0 or higher)")
    return {"kind": kind, "num_tokens": num_tokens, "first_token_id": first_token_id}
