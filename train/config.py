"""What a recipe may say: the keys, their types and their limits.

The defaults are Pythia's recipe (Biderman et al. 2023): the recipe of a model names only its sizes and learning rate.
"""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..models.config import SINK_KINDS

Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class SinkSection(Section):
    """Where surplus attention can go."""

    kind: str = Field(
        default="token",
        description="`token`: learnable sink tokens before every text; `none`: plain Pythia; "
        "`zero`, `logit`, `kv_bias` or `gate`: an arm without tokens",
    )
    num_tokens: Count = Field(default=1, description="how many sink tokens (`kind: token` only)")

    @model_validator(mode="after")
    def _tokens_are_of_their_kind(self) -> "SinkSection":
        if self.kind != "token" and self.num_tokens != 1:
            raise ValueError(f"num_tokens is {self.num_tokens}, but kind {self.kind} has no tokens: set it to 1")
        return self

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in SINK_KINDS:
            raise ValueError(f"choose one of {', '.join(SINK_KINDS)}")
        return kind


class ModelSection(Section):
    """The sizes of the model."""

    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count | None = Field(default=None, description="width of the MLP; null is 4 × `hidden_size`")
    vocab_size: Count | None = Field(
        default=None,
        description="rows of the embedding; null is the tokenizer and the sinks, rounded up to a multiple of 128",
    )
    rotary_pct: Ratio = Field(default=0.25, description="share of each head's dimensions that are rotated")
    rope_theta: float = Field(default=10_000.0, gt=0)
    parallel_residual: bool = True
    max_position_embeddings: Count | None = Field(
        default=None, description="longest sequence, sinks included; null is `train.seq_length`"
    )
    init_from: str | None = Field(
        default=None,
        description="start from these weights: a run, checkpoint or transformers folder, or a Hub name; null is random",
    )
    sink: SinkSection = SinkSection()

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelSection":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        rotated = int(self.hidden_size // self.num_attention_heads * self.rotary_pct)
        if rotated % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} rotates {rotated} dimensions of a head: make it an even number"
            )
        return self

    @property
    def num_sinks(self) -> int:
        return self.sink.num_tokens if self.sink.kind == "token" else 0


class DataSection(Section):
    path: str | None = Field(default=None, description="the token store, a folder made by `sinklm prepare`")


class TrainSection(Section):
    run_dir: str | None = Field(default=None, description="folder of the run; null is `runs/<recipe name>`")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=1234, description="of the first weights and the data order"
    )
    num_steps: Count = Field(default=143_000, description="optimizer steps in all")
    seq_length: Count = Field(default=2048, description="positions of a sample, sinks included")
    batch_size_tokens: Count = Field(default=1024 * 2048, description="positions of one step, over all ranks")
    micro_batch_size: Count = Field(
        default=16,
        description="samples that a rank takes through the model at once; sets memory and speed, never the result",
    )
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    compile: bool | None = Field(
        default=None, description="torch.compile; null is yes on a GPU but with ZeRO-3, no on a CPU"
    )

    @model_validator(mode="after")
    def _whole_samples(self) -> "TrainSection":
        if self.batch_size_tokens % self.seq_length:
            raise ValueError(
                f"batch_size_tokens {self.batch_size_tokens} is not a multiple of seq_length {self.seq_length}"
            )
        return self


class OptimizerSection(Section):
    """AdamW, with weight decay on matrices only, and a cosine schedule."""

    lr: float = Field(gt=0, description="the highest learning rate, reached after warm-up")
    min_lr_ratio: Ratio = Field(default=0.1, description="share of `lr` at the end")
    warmup_ratio: Ratio = Field(default=0.01, description="share of the steps over which the rate rises from 0")
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 is no limit")

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must be at least 0 and less than 1")
        return betas


class ValidationSection(Section):
    every_steps: Count | None = Field(default=1000, description="null is never")
    num_samples: Count = Field(default=512, description="the first ones of the validation split; all if it has fewer")


class CheckpointSection(Section):
    every_steps: Count | None = Field(default=1000, description="null is at the end only")
    pythia_steps: bool = Field(
        default=False, description="save also at steps 0, 1, 2, 4 … 512 and every 1000, and never delete those"
    )
    keep: Count | None = Field(default=3, description="how many of the newest checkpoints stay; null is all")
    resume: str = Field(
        default="auto",
        description="`auto`: the run's newest complete checkpoint, if any; `never`; or a checkpoint folder",
    )


# Keys of DeepSpeed's configuration that follow from ours, and the key to set in their place.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size_tokens or train.micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "bf16.check_grad_overflow": "nothing: a step that is not finite is never taken",
    "zero_optimization.compute_grad_norm": "nothing: the norm is watched in every step",
    "data_types.grad_accum_dtype": "nothing: gradients are accumulated in float32",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.round_robin_gradients": "nothing: DeepSpeed could not go on from its checkpoints on other ranks",
    "checkpoint.load_universal": "nothing: it is found out by itself",
}


# Sections and switches of DeepSpeed's configuration. It passes over a key that it does not know, so a slip of the pen
# in one of these would change nothing and say nothing.
DEEPSPEED_KEYS = (
    *("activation_checkpointing", "aio", "amp", "autotuning", "bf16", "checkpoint", "comet", "comms_logger"),
    *("communication_data_type", "compile", "compression_training", "csv_monitor", "curriculum_learning"),
    *("data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather", "dump_state", "elasticity"),
    *("flops_profiler", "fp16", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients"),
    *("sequence_parallel_size", "sparse_gradients", "steps_per_print", "tensor_parallel", "tensorboard"),
    *("use_node_local_storage", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "zero_optimization"),
    *("patches", "zero_stage"),  # our own keys
)


class DeepSpeedSection(BaseModel):
    """ZeRO's stage, our patches, and any key of DeepSpeed's own configuration, passed through."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="what ZeRO splits over the ranks: 1 optimizer, 2 + gradients, 3 + weights"
    )
    patches: bool = Field(
        default=True, description="replace slow parts of DeepSpeed; false uses DeepSpeed's own code for them"
    )

    @property
    def extra_keys(self) -> dict[str, Any]:
        """What goes to DeepSpeed as it is."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _no_derived_keys(self) -> "DeepSpeedSection":
        for key, ours in DERIVED_DEEPSPEED_KEYS.items():
            section, _, name = key.rpartition(".")
            values = self.extra_keys.get(section) if section else self.extra_keys
            if isinstance(values, dict) and name in values:
                raise ValueError(f"{key} is derived: set {ours}")
        return self

    @model_validator(mode="after")
    def _no_misspelt_keys(self) -> "DeepSpeedSection":
        for key in self.extra_keys:
            near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.8)
            if near and key not in DEEPSPEED_KEYS:
                raise ValueError(f"unknown key {key}: did you mean {near[0]}?")
        return self


class WandbSection(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="`auto` is online if you are logged in, and offline if not"
    )
    project: str = "sinklm"


class TrainingConfig(Section):
    """A recipe, complete. `sinklm.train.recipe.load_config` makes it from YAML and overrides."""

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
                "lower the first or raise the second"
            )
        if self.model.num_sinks >= self.train.seq_length:
            raise ValueError(
                f"model.sink.num_tokens {self.model.num_sinks} leaves no room for text in train.seq_length "
                f"{self.train.seq_length}"
            )
        if self.train.compile and self.deepspeed.zero_stage == 3:
            raise ValueError(
                "train.compile=true and deepspeed.zero_stage=3 exclude each other: compiling needs the weights in "
                "place; leave train.compile out, or take a lower stage"
            )
        return self
