"""The keys of a recipe, their types and their limits.

The defaults are Pythia's recipe (Biderman et al. 2023), so the recipe of a model only sets its
sizes and learning rate.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ..models.config import SINK_KINDS
from .attention_section import AttentionSection
from .deepspeed_section import DeepSpeedSection
from .section import Count, LargeCount, Name, PathName, Ratio, Section
from .windows import layer_kinds


class SinkSection(Section):
    """The attention sink."""

    kind: str = Field(
        default="token",
        description="`token`: learnable sink tokens before every text; `none`: plain Pythia; "
        "`zero`, `logit`, `kv_bias`, `gate`, `head_gate`: an arm without sink tokens",
    )
    num_tokens: Count = Field(default=1, description="number of sink tokens (only with `kind: token`)")

    @model_validator(mode="after")
    def _tokens_are_of_their_kind(self) -> "SinkSection":
        if self.kind != "token" and self.num_tokens != 1:
            raise ValueError(f"num_tokens is {self.num_tokens}, but kind {self.kind} has no sink tokens: set it to 1")
        return self

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in SINK_KINDS:
            raise ValueError(f"it must be one of {', '.join(SINK_KINDS)}")
        return kind


class ModelSection(Section):
    """The sizes of the model."""

    hidden_size: Count = Field(description="width of the hidden states")
    num_hidden_layers: int = Field(ge=1, le=10_000, description="number of layers")
    num_attention_heads: Count = Field(description="number of attention heads in a layer")
    intermediate_size: Count | None = Field(default=None, description="width of the MLP; null: 4 × `hidden_size`")
    vocab_size: Count | None = Field(
        default=None,
        description="rows of the embedding; null: tokenizer plus sink tokens, rounded up to a multiple of 128",
    )
    rotary_pct: Ratio = Field(default=0.25, description="fraction of each head's dimensions that are rotated")
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary frequencies")
    parallel_residual: bool = Field(default=True, description="attention and MLP read the same input, as in Pythia")
    max_position_embeddings: Count | None = Field(
        default=None, description="maximum sequence length, sink tokens included; null: `train.seq_length`"
    )
    init_from: PathName | None = Field(
        default=None,
        description="initial weights: a run, checkpoint or transformers folder, or a Hub name; null: random",
    )
    sink: SinkSection = SinkSection()
    attention: AttentionSection = AttentionSection()

    @model_validator(mode="after")
    def _windows_fit(self) -> "ModelSection":
        pattern, num_kept = self.attention.pattern, self.attention.num_kept
        try:
            layer_kinds(pattern, self.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"attention.pattern is {pattern}: {error}") from None
        if num_kept is not None and num_kept < self.num_sinks:
            raise ValueError(
                f"attention.num_kept is {num_kept}, but the first {self.num_sinks} tokens are sink tokens, which are "
                "always kept: set attention.num_kept=null to keep just these"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelSection":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "change one of them"
            )
        rotated = int(self.hidden_size // self.num_attention_heads * self.rotary_pct)
        if rotated % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} rotates {rotated} dimensions of a head, which must be an even number: "
                "choose another rotary_pct"
            )
        return self

    @property
    def num_sinks(self) -> int:
        return self.sink.num_tokens if self.sink.kind == "token" else 0

    @property
    def layer_windows(self) -> list[int | None] | None:
        """The window of each layer, None for full attention; None if all layers have that."""
        window = self.attention.window
        largest = window[1] if isinstance(window, list) else window
        kinds = layer_kinds(self.attention.pattern, self.num_hidden_layers)
        return None if largest is None else [largest if kind == "window" else None for kind in kinds]

    @property
    def num_kept(self) -> int:
        """First tokens that the windowed layers keep."""
        return self.num_sinks if self.attention.num_kept is None else self.attention.num_kept


class DataSection(Section):
    """The token store and its sets."""

    path: PathName | None = Field(default=None, description="the token store, a folder made by `sinklm prepare`")
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        default=None,
        description="share of each set in the samples, in any unit; every set must be named, 0 excludes it; null: "
        "all documents once in an epoch",
    )

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        if weights is not None and not any(weights.values()):
            raise ValueError("at least one weight must be greater than 0")
        return weights


def weights_precision(precision: str) -> str:
    """Return the precision of the weights under a ``train.precision``."""
    return "bf16" if precision == "fp8" else precision


class TrainSection(Section):
    """Steps, batch, precision and the run's folder."""

    run_dir: PathName | None = Field(default=None, description="folder of the run; null: `runs/<recipe name>`")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1234, description="random seed of the initial weights and the data order"
    )
    num_steps: LargeCount = Field(default=143_000, description="total number of optimizer steps")
    seq_length: Count = Field(default=2048, description="positions in a sample, sink tokens included")
    segment_length: Count | None = Field(
        default=None,
        description="positions of a sample in one forward and backward pass, which carries the keys of the windows to "
        "the next one without gradient; null: the whole sample",
    )
    batch_size_tokens: LargeCount = Field(default=1024 * 2048, description="positions in one step, over all ranks")
    micro_batch_size: Count = Field(
        default=16,
        description="samples per rank in one forward pass; affects memory and speed, not the result",
    )
    precision: Literal["bf16", "fp16", "fp32", "fp8"] = Field(
        default="bf16",
        description="data type of the forward and backward pass; fp32 is the fastest on most CPUs; fp8: bf16 with the "
        "layers' matrix products in float8, for widths of at least 768 on H100, H200 and newer",
    )
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    deterministic: bool = Field(
        default=False,
        description="make runs on the same GPUs equal bit for bit, at some cost in speed; ZeRO stages 0 to 2",
    )
    only_sinks: bool = Field(
        default=False,
        description="train only the embedding rows of the sink tokens, and leave all other weights as they are in "
        "`model.init_from`; with `deepspeed.zero_stage=0`",
    )
    hang_timeout_minutes: float | None = Field(
        default=10.0,
        gt=0,
        allow_inf_nan=False,
        description="the run ends after this time without progress; the first step and saves get more time; "
        "null: never",
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="time limit, counted from the start of the process; before the limit, an unfinished run saves and "
        "ends with status 75; null: no limit",
    )
    on_spike: Literal["warn", "skip", "stop"] = Field(
        default="warn",
        description="at a spike of the loss or of the gradient's norm: `warn`; `skip` its update; `stop` the run",
    )
    compile: bool | None = Field(
        default=None, description="use torch.compile; null: yes on a GPU except with ZeRO-3, no on a CPU"
    )

    @model_validator(mode="after")
    def _whole_samples(self) -> "TrainSection":
        if self.batch_size_tokens % self.seq_length:
            nearest = max(round(self.batch_size_tokens / self.seq_length), 1) * self.seq_length
            raise ValueError(
                f"batch_size_tokens {self.batch_size_tokens} is not a multiple of seq_length {self.seq_length}: set it "
                f"to {nearest}, or change seq_length"
            )
        if self.segment_length is not None and self.seq_length % self.segment_length:
            raise ValueError(
                f"seq_length {self.seq_length} is not a multiple of segment_length {self.segment_length}: change one"
            )
        return self


class OptimizerSection(Section):
    """AdamW or Muon with weight decay on matrices only, and a cosine schedule."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="`adamw`; `muon`: Muon for the matrices of the layers, AdamW for the rest; ZeRO stages 0 to 2",
    )
    lr: float = Field(gt=0, description="peak learning rate, reached after warm-up")
    min_lr_ratio: Ratio = Field(default=0.1, description="final learning rate as a fraction of `lr`")
    warmup_ratio: Ratio = Field(default=0.01, description="fraction of the steps used for linear warm-up")
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.95], description="decay rates of AdamW's averages of the gradient and of its square"
    )
    eps: float = Field(default=1e-8, gt=0, description="term of AdamW's denominator")
    weight_decay: float = Field(default=0.1, ge=0, description="weight decay of the matrices")
    clip: float = Field(default=1.0, ge=0, description="maximum norm of the gradient; 0: no clipping")

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each value must be at least 0 and less than 1")
        return betas


class ValidationSection(Section):
    """The loss on held-out text, and what is measured with it."""

    every_steps: Count | None = Field(default=1000, description="steps between validations; null: no validation")
    num_samples: Count = Field(default=512, description="samples, evenly spaced in the validation split; at most all")
    by_set: bool = Field(
        default=False,
        description="also measure the loss of each set, over as many samples; for stores made with `--split-sets`",
    )
    streaming_tokens: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="also stream this many tokens of the split through a cache of constant size; null: none",
    )
    sample_tokens: Count | None = Field(
        default=None, description="also continue the first 32 tokens of the split by this many tokens; null: none"
    )
    sink_rate: bool = Field(default=False, description="also measure the attention to the first positions")

    @model_validator(mode="after")
    def _is_validated(self) -> "ValidationSection":
        for key in ("by_set", "streaming_tokens", "sample_tokens", "sink_rate"):
            if getattr(self, key) and self.every_steps is None:
                raise ValueError(f"{key} is set, but every_steps is null: set every_steps, or remove {key}")
        return self


class CheckpointSection(Section):
    """When checkpoints are saved and deleted."""

    every_steps: Count | None = Field(default=1000, description="steps between checkpoints; null: only at the end")
    pythia_steps: bool = Field(
        default=False, description="also save at steps 0, 1, 2, 4 … 512 and every 1000, and never delete these"
    )
    keep: Count | None = Field(default=3, description="number of newest checkpoints to keep; null: all")
    asynchronous: bool | None = Field(
        default=None,
        description="write checkpoints from a copy in host memory while training goes on, if the memory is free; "
        "null: yes on a GPU, no on a CPU",
    )
    resume: PathName = Field(
        default="auto",
        description="`auto`: the run's newest complete checkpoint, if any; `never`; or a checkpoint folder",
    )


FLOAT8_MULTIPLE = 16  # of the sizes of a product in float8
FLOAT8_WIDTH = 768  # smallest `model.hidden_size` with float8: the narrower, the larger the share of the casts

# Switches of `zero_optimization` with which DeepSpeed moves the optimizer's state (`cpu_offload` is
# the old name of `offload_optimizer`), or partitions or loads it in another way.
NOT_WITH_MUON = ("offload_optimizer", "cpu_offload", "elastic_checkpoint", "parameter_alignment")
# ZeRO stages from which on keys of `zero_optimization` have an effect. Those with `cpu_` are old
# names.
OF_STAGE_3 = (
    *("offload_param", "cpu_offload_param", "sub_group_size", "prefetch_bucket_size", "zero_hpz_partition_size"),
    *("param_persistence_threshold", "model_persistence_threshold", "max_live_parameters", "max_reuse_distance"),
    *("gather_16bit_weights_on_model_save", "module_granularity_threshold", "use_all_reduce_for_fetch_params"),
    *("allgather_sequential", "log_trace_cache_warnings"),
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
    *("memory_efficient_linear", "override_module_apply"),
)
LOWEST_STAGE = {"offload_optimizer": 1, "cpu_offload": 1, **dict.fromkeys(OF_STAGE_3, 3)}
OFF = ("none", "false", "0", "no", "off")  # what DeepSpeed reads as off, and no device


class WandbSection(Section):
    """Logging to Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="`auto`: that of WANDB_MODE, else online if you are logged in, else offline"
    )
    project: Name | None = Field(
        default=None, description="project on Weights & Biases; null: WANDB_PROJECT, or `sinklm`"
    )
    entity: Name | None = Field(default=None, description="user or team; null: WANDB_ENTITY, or your default one")
    name: Name | None = Field(default=None, description="name of the run; null: WANDB_NAME, or that of its folder")
    group: Name | None = Field(default=None, description="group in which wandb shows the run; null: WANDB_RUN_GROUP")
    tags: list[Name] = Field(default=[], description="tags of the run; none: WANDB_TAGS")


class TrainingConfig(Section):
    """A complete recipe. `sinklm.train.recipe.load_config` creates it from YAML and overrides."""

    _interpolations: dict[tuple, str] = PrivateAttr(default_factory=dict)  # see `recipe.saved_values`

    model: ModelSection
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    wandb: WandbSection = WandbSection()

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainingConfig":
        longest = self.model.max_position_embeddings
        if longest is not None and self.train.seq_length > longest:
            raise ValueError(
                f"train.seq_length {self.train.seq_length} is longer than model.max_position_embeddings {longest}: "
                "lower the former or raise the latter"
            )
        if self.model.num_sinks >= self.train.seq_length:
            raise ValueError(
                f"model.sink.num_tokens {self.model.num_sinks} leaves no room for text in train.seq_length "
                f"{self.train.seq_length}: raise train.seq_length"
            )
        self._check_skipping()
        self._check_segments()
        if self.train.precision == "fp8":
            self._check_float8()
        self._check_muon()
        self._check_stages()
        if self.train.only_sinks:
            self._check_only_sinks()
        if self.train.deterministic and self.deepspeed.zero_stage == 3:
            raise ValueError("train.deterministic=true was not tested with deepspeed.zero_stage=3: use a lower stage")
        if self.train.compile and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "train.compile=true does not work with deepspeed.zero_stage=3, which partitions the weights: remove "
                "train.compile, or use a lower stage"
            )
        return self

    def _check_segments(self) -> None:
        """Refuse segments of models whose layers need more than the carried keys."""
        model, length = self.model, self.train.segment_length
        if length is None or length == self.train.seq_length:
            return
        if model.layer_windows is None or None in model.layer_windows:
            raise ValueError(
                f"train.segment_length is {length}, but a layer with full attention needs all keys of the sample: "
                "set model.attention.pattern=window and model.attention.window, or train.segment_length=null"
            )
        if model.num_kept != model.num_sinks:
            raise ValueError(
                f"train.segment_length is {length}, but the windows keep {model.num_kept} tokens, and only the sink "
                f"tokens ({model.num_sinks}) are in every segment: set model.attention.num_kept=null, or "
                "train.segment_length=null"
            )
        if length <= model.num_sinks:
            raise ValueError(
                f"model.sink.num_tokens {model.num_sinks} leaves no room for text in train.segment_length {length}: "
                "raise train.segment_length"
            )

    def _check_float8(self) -> None:
        """Refuse float8 for narrow models, and where it cannot be computed."""
        if self.deepspeed.zero_stage not in (1, 2):
            raise ValueError(
                f"train.precision=fp8 does not work with deepspeed.zero_stage={self.deepspeed.zero_stage}: set 1 or 2"
            )
        if self.train.segment_length not in (None, self.train.seq_length):
            raise ValueError(
                "train.precision=fp8 does not support segments: set train.precision=bf16 or train.segment_length=null"
            )
        width = self.model.hidden_size
        if width < FLOAT8_WIDTH:
            raise ValueError(
                f"train.precision=fp8 requires model.hidden_size of at least {FLOAT8_WIDTH}, but it is {width}: set "
                "train.precision=bf16"
            )
        sizes = {
            "model.hidden_size": width,
            "model.intermediate_size": self.model.intermediate_size or 4 * width,
            "train.micro_batch_size × train.seq_length": self.train.micro_batch_size * self.train.seq_length,
        }
        for key, size in sizes.items():
            if size % FLOAT8_MULTIPLE:
                raise ValueError(
                    f"train.precision=fp8 requires multiples of {FLOAT8_MULTIPLE}, but {key} is {size}: change it, or "
                    "set train.precision=bf16"
                )

    def _check_skipping(self) -> None:
        """Refuse `skip` where DeepSpeed updates weights outside of torch's AdamW."""
        zero = _section(self.deepspeed.extra_keys, "zero_optimization")
        offload = _section(zero, "offload_optimizer")
        others = {
            "zenflow": zero.get("zenflow") is not None,
            "offload_optimizer.super_offload": _is_on(offload.get("super_offload")),
            "offload_optimizer.ratio": _is_on(offload) and offload.get("ratio", 1) != 1,
        }
        for key, is_set in others.items():
            if self.train.on_spike == "skip" and is_set:
                raise ValueError(
                    f"train.on_spike=skip does not work with deepspeed.zero_optimization.{key}: remove one of them"
                )

    def _check_only_sinks(self) -> None:
        """Refuse to train the sinks alone where there are none, or others would change."""
        kind = self.model.sink.kind
        needed = {
            f"model.sink.kind=token, whose rows are trained (sink.kind {kind} has no rows)": kind == "token",
            "model.init_from, the model that gets the sinks": self.model.init_from is not None,
            "deepspeed.zero_stage=0, which keeps the other weights in float32": self.deepspeed.zero_stage == 0,
            "optimizer.name=adamw, because no matrix of a layer is trained": self.optimizer.name == "adamw",
        }
        if missing := [what for what, is_met in needed.items() if not is_met]:
            raise ValueError(f"train.only_sinks=true requires {'; '.join(missing)}: set it, or train.only_sinks=false")

    def _check_muon(self) -> None:
        """Refuse Muon where DeepSpeed would store matrices or state in a way it does not know."""
        zero = _section(self.deepspeed.extra_keys, "zero_optimization")
        others = {
            "zero_stage=3": self.deepspeed.zero_stage == 3,
            "zero_allow_untested_optimizer=false": not self.deepspeed.extra_keys.get(
                "zero_allow_untested_optimizer", True
            ),
            "zero_optimization.zenflow": zero.get("zenflow") is not None,
            **{f"zero_optimization.{key}": _is_on(zero.get(key)) for key in NOT_WITH_MUON},
        }
        for key, is_set in others.items():
            if self.optimizer.name == "muon" and is_set:
                raise ValueError(f"optimizer.name=muon does not work with deepspeed.{key}: change one of them")

    def _check_stages(self) -> None:
        """Refuse keys that DeepSpeed only reads in a higher stage, such as those that offload."""
        zero, stage = _section(self.deepspeed.extra_keys, "zero_optimization"), self.deepspeed.zero_stage
        for key, value in zero.items():
            lowest = LOWEST_STAGE.get(key, 3 if key.startswith("stage3_") else 0)
            if stage < lowest and _is_on(value):
                raise ValueError(
                    f"deepspeed.zero_optimization.{key} has no effect with deepspeed.zero_stage={stage}: set {lowest} "
                    f"or more, or remove {key}"
                )


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a section of DeepSpeed's configuration, empty if there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _is_on(value: object) -> bool:
    """Whether a switch, a device or the section of a device in DeepSpeed's configuration is set."""
    if isinstance(value, dict):
        value = value.get("device")
    return str(value).lower() not in OFF
