"""The section `deepspeed` of a recipe: the ZeRO stage, and keys that DeepSpeed gets unchanged."""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..text import near_hint

# Keys of DeepSpeed's configuration that are derived from the recipe, and what to do instead.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "set train.batch_size_tokens",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "set train.batch_size_tokens or train.micro_batch_size",
    "gradient_clipping": "set optimizer.clip",
    "optimizer": "use the section optimizer",
    "scheduler": "use the section optimizer",
    "bf16.enabled": "set train.precision",
    "fp16.enabled": "set train.precision",
    "torch_autocast": "set train.precision",
    "bf16.check_grad_overflow": "remove this key; non-finite steps do not update the weights",
    "zero_optimization.compute_grad_norm": "remove this key; the norm is computed in every step",
    "data_types.grad_accum_dtype": "remove this key; gradients are accumulated in float32",
    "zero_optimization.stage": "set deepspeed.zero_stage",
    "zero_optimization.round_robin_gradients": "remove this key; with it DeepSpeed cannot resume on another rank count",
    "checkpoint.load_universal": "remove this key; it is detected automatically",
    "activation_checkpointing": "remove this key, and set train.activation_checkpointing",
}

# Keys of the section zero_optimization that DeepSpeed would ignore outside of it.
ZERO_KEYS = (
    *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "cpu_offload", "offload_optimizer"),
    *("offload_param", "overlap_comm", "reduce_bucket_size", "reduce_scatter", "stage", "sub_group_size", "zenflow"),
    *("cpu_offload_param", "elastic_checkpoint", "ignore_unused_parameters", "legacy_stage1", "load_from_fp32_weights"),
    *("mics_shard_size", "prefetch_bucket_size", "round_robin_gradients", "zero_hpz_partition_size"),
    *("zero_quantized_gradients", "zero_quantized_weights"),
)

# Keys that DeepSpeed no longer has, or that need parts of it that sinklm does not use.
UNSUPPORTED_KEYS = {
    **dict.fromkeys(("amp", "compression_training", "curriculum_learning", "eigenvalue"), "DeepSpeed has removed it"),
    **dict.fromkeys(("elasticity", "graph_harvesting", "nebula", "progressive_layer_drop"), "DeepSpeed has removed it"),
    **dict.fromkeys(("quantize_training", "sparse_attention", "sparse_gradients"), "DeepSpeed has removed it"),
    **dict.fromkeys(("data_efficiency", "dataloader_drop_last"), "sinklm reads the data itself"),
    **dict.fromkeys(("sequence_parallel_size", "tensor_parallel", "pipeline"), "sinklm has data parallelism only"),
    "autotuning": "it needs DeepSpeed's own launcher and loop",
    "hybrid_engine": "it is for reinforcement learning",
}

# Switches and sections of DeepSpeed's configuration. DeepSpeed ignores unknown ones silently, so
# they are refused here. Keys within sections are not compared.
DEEPSPEED_SECTIONS = (
    *("activation_checkpointing", "aio", "bf16", "checkpoint", "comet", "comms_logger", "compile", "csv_monitor"),
    *("data_types", "flops_profiler", "fp16", "tensorboard", "timers", "wandb", "zero_optimization"),
)
DEEPSPEED_KEYS = (
    *DEEPSPEED_SECTIONS,
    *("communication_data_type", "disable_python_gc", "dump_state", "gradient_allreduce_op"),
    *("gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients", "steps_per_print"),
    *("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("patches", "zero_stage"),  # our own keys
)


class DeepSpeedSection(BaseModel):
    """The ZeRO stage, sinklm's patches, and any key of DeepSpeed's own configuration."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="what ZeRO partitions over the ranks: 1 optimizer, 2 + gradients, 3 + weights"
    )
    patches: bool = Field(default=True, description="replace slow parts of DeepSpeed; false: use DeepSpeed's own code")

    @property
    def extra_keys(self) -> dict[str, Any]:
        """The keys passed to DeepSpeed unchanged."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _no_derived_keys(self) -> "DeepSpeedSection":
        for key, ours in DERIVED_DEEPSPEED_KEYS.items():
            section, _, name = key.rpartition(".")
            values = self.extra_keys.get(section) if section else self.extra_keys
            if isinstance(values, dict) and name in values:
                raise ValueError(f"{key} is derived: {ours}")
        return self

    @model_validator(mode="after")
    def _sections_have_keys(self) -> "DeepSpeedSection":
        for key, value in self.extra_keys.items():
            if key in DEEPSPEED_SECTIONS and not isinstance(value, dict):
                raise ValueError(
                    f"{key} is {value!r}: it is a section of DeepSpeed; set its keys, as deepspeed.{key}.KEY=VALUE"
                )
            if isinstance(value, dict) and (wrong := [name for name in value if not isinstance(name, str)]):
                raise ValueError(f"{key}.{wrong[0]}: no key of DeepSpeed has such a name; correct it")
        return self

    @model_validator(mode="after")
    def _no_unknown_keys(self) -> "DeepSpeedSection":
        for key, value in self.extra_keys.items():
            if key in UNSUPPORTED_KEYS:
                raise ValueError(f"{key} is not supported ({UNSUPPORTED_KEYS[key]}): remove this key")
            if value is not None and (key in ZERO_KEYS or key.startswith("stage3_")):
                there = f"zero_optimization.{key}"
                remedy = DERIVED_DEEPSPEED_KEYS.get(there, f"set deepspeed.{there}")
                raise ValueError(f"{key} has no effect here: {remedy}")
            if key not in DEEPSPEED_KEYS:
                near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=3, cutoff=0.8)
                hint = (
                    near_hint("", (), others=near)
                    or "DeepSpeed has none of this name that a run of sinklm uses; remove it"
                )
                raise ValueError(f"unknown key {key}: {hint}")
        return self
