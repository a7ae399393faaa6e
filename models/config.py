"""The configuration of a Pythia-style model with an attention sink."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPTNeoXConfig, PreTrainedConfig

DEFAULT_NUM_KEPT = 4  # for a model without sink tokens (Xiao et al. 2024, Table 2)
WINDOW_FIELDS = ("layer_windows", "num_kept", "window_range")
TRAINED_WINDOWS = "trained_windows"  # in `config.json` of an export with full attention: the windows before it
SINK_KINDS = ("none", "token", "zero", "logit", "kv_bias", "gate", "head_gate")


@strict
class SinkGPTNeoXConfig(GPTNeoXConfig):
    """`GPTNeoXConfig` with the additional field ``sink``, which configures the attention sink.

    ``sink`` is a dictionary:

    - ``kind``: ``"none"`` (plain GPT-NeoX), ``"token"`` (learnable sink tokens, Xiao et al. 2024,
      section 3.3), or an arm without sink tokens: ``"zero"``, ``"logit"``, ``"kv_bias"``,
      ``"gate"``, ``"head_gate"`` (see `sinklm.models.arms`);
    - ``num_tokens``: number of sink tokens that the model prepends (``token`` only, default 1);
    - ``first_token_id``: vocabulary id of the first sink token; the others have the ids after it
      (``token`` only). The default is 50277, the first of the ids 50277 to 50303 that Pythia's
      tokenizer does not use.

    Further fields describe layers with windowed attention (see `sinklm.models.windows`):

    - ``layer_windows``: for each layer, its number of recent tokens besides the query itself, or
      None for full attention. None instead of a list: all layers have full attention;
    - ``num_kept``: number of first tokens that windowed layers keep (default: the sink tokens);
    - ``window_range``: ``[low, high]`` if each step of the training drew its window from this
      range. The windows in ``layer_windows`` are then ``high``.

    Raises:
        ValueError: unknown kind or key, sink ids outside the vocabulary, or inconsistent windows.
    """

    model_type = "sink_gpt_neox"

    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    sink: dict[str, Any] = field(default_factory=dict)
    # `Any`, because transformers would raise its own error for other types; see `__setattr__`.
    layer_windows: Any = None
    num_kept: Any = None
    window_range: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and name in WINDOW_CHECKS:
            WINDOW_CHECKS[name](value)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        self.sink = _normalised(self.sink)
        super().__post_init__(**kwargs)
        if self.layer_windows is not None:
            _check_windows(self.layer_windows, self.num_hidden_layers)
            if all(window is None for window in self.layer_windows):
                self.layer_windows = None
        if self.layer_windows is not None and self.num_kept is None:
            self.num_kept = self.num_sinks
        self._check_rule()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        """Like the method of transformers, which would set sink and windows without checks."""
        ours = {key: kwargs.pop(key) for key in ("sink", *WINDOW_FIELDS) if key in kwargs}
        replaced = WINDOW_FIELDS if "layer_windows" in ours else ()  # other windows need another num_kept
        theirs = {key: value for key, value in config_dict.items() if key not in replaced}
        return super().from_dict(theirs | ours, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Like the method of transformers; a model without windows has none of their fields."""
        fields = super().to_dict()
        return {key: value for key, value in fields.items() if key not in WINDOW_FIELDS or value is not None}

    def _check_rule(self) -> None:
        if self.layer_windows is None:
            if unused := [name for name in ("num_kept", "window_range") if getattr(self, name) is not None]:
                raise ValueError(f"{unused[0]} is {getattr(self, unused[0])}, but no layer has a window: remove it")
            return
        if self.num_kept < self.num_sinks:
            raise ValueError(
                f"num_kept is {self.num_kept}, but a windowed layer always keeps the sink tokens: set it to "
                f"{self.num_sinks} or more"
            )
        largest = None if self.window_range is None else self.window_range[1]
        if largest and (other := [window for window in self.layer_windows if window not in (None, largest)]):
            raise ValueError(
                f"layer_windows contains {other[0]}, but the largest window of window_range is {largest}: with a "
                "range, all windows must be equal to it"
            )
        rope_type = self.rope_parameters["rope_type"]
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"windowed layers do not support rope_type {rope_type!r}, whose frequencies depend on the length of "
                "the text: use another type, or full attention"
            )

    def validate_sink(self) -> None:
        first, last = self.sink.get("first_token_id", 0), self.sink.get("first_token_id", 0) + self.num_sinks - 1
        if self.num_sinks and last >= self.vocab_size:
            raise ValueError(
                f"the sink token ids {first}…{last} are outside the vocabulary of "
                f"{self.vocab_size}: raise vocab_size or lower sink.first_token_id"
            )

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer; None for full attention."""
        return [None] * self.num_hidden_layers if self.layer_windows is None else self.layer_windows

    @property
    def has_windows(self) -> bool:
        """Whether a layer has windowed attention."""
        return self.layer_windows is not None

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


def trained_windows(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the `WINDOW_FIELDS` with which a model, or the origin of an export, was trained.

    Empty if all of its layers have full attention.

    Raises:
        ValueError: the record of an export is damaged.
    """
    if isinstance(config, SinkGPTNeoXConfig):
        return {name: getattr(config, name) for name in WINDOW_FIELDS} if config.has_windows else {}
    recorded = getattr(config, TRAINED_WINDOWS, None)
    if recorded is None:
        return {}
    sinks = sink_config(config)
    try:
        if not isinstance(recorded, dict) or recorded.get("layer_windows") is None or set(recorded) - {*WINDOW_FIELDS}:
            raise ValueError(f"it is {recorded!r}, which are not {', '.join(WINDOW_FIELDS)}")
        origin = SinkGPTNeoXConfig(
            num_hidden_layers=config.num_hidden_layers, vocab_size=sinks.vocab_size, sink=sinks.sink, **recorded
        )
    except ValueError as error:
        raise ValueError(f"the key {TRAINED_WINDOWS} of config.json is damaged ({error}): restore the file") from error
    return trained_windows(origin)


def describe_windows(windows: dict[str, Any]) -> str:
    """Return in words what layers with these `WINDOW_FIELDS` see; with none, full attention."""
    if not windows:
        return "full attention in all layers"
    drawn, by_layer = windows["window_range"], windows["layer_windows"]
    sizes = sorted({window for window in by_layer if window is not None})
    num_windowed = sum(window is not None for window in by_layer)
    size = " or ".join(f"{window:,}" for window in sizes)
    size = size if drawn is None else f"{drawn[0]:,} to {drawn[1]:,} (drawn for each step)"
    which = "all" if num_windowed == len(by_layer) else f"{num_windowed} of {len(by_layer)}"
    num_kept = windows["num_kept"]
    return f"a window of {size} in {which} layers with {num_kept:,} kept token{'s' * (num_kept != 1)}"


def num_prepended_sinks(config: PreTrainedConfig) -> int:
    """Return how many sink tokens the model itself adds to a text: 0 if its tokenizer does."""
    return config.num_sinks if isinstance(config, SinkGPTNeoXConfig) else 0


def default_num_kept(config: PreTrainedConfig) -> int:
    """Return how many first tokens a cache keeps by default: the sinks, or `DEFAULT_NUM_KEPT`.

    They are at least those that windowed layers keep, or kept before an export.
    """
    kept_by_windows = trained_windows(config).get("num_kept") or 0
    return max(sink_config(config).num_sinks or DEFAULT_NUM_KEPT, kept_by_windows)


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


def _check_windows(windows: Any, num_layers: int | None = None) -> None:
    if not isinstance(windows, list) or num_layers not in (None, len(windows)):
        layers = "layer" if num_layers is None else f"of {num_layers} layers"
        raise ValueError(f"layer_windows is {windows!r}: it must be a list with one entry for each {layers}")
    if wrong := [window for window in windows if window is not None and not _is_count(window)]:
        raise ValueError(f"layer_windows contains {wrong[0]!r}: a window is an integer of at least 1, or null")


def _check_num_kept(num_kept: Any) -> None:
    if not isinstance(num_kept, int) or isinstance(num_kept, bool) or num_kept < 0:
        raise ValueError(f"num_kept is {num_kept!r}: it must be an integer of at least 0, or null")


def _check_range(window_range: Any) -> None:
    is_range = isinstance(window_range, list) and len(window_range) == 2 and all(map(_is_count, window_range))
    if not is_range or window_range[0] > window_range[1]:
        raise ValueError(f"window_range is {window_range!r}: it must be [low, high] with 1 <= low <= high")


WINDOW_CHECKS: dict[str, Callable[[Any], None]] = {
    "layer_windows": _check_windows,
    "num_kept": _check_num_kept,
    "window_range": _check_range,
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


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
