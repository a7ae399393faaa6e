"""The DeepSpeed engine: its configuration, optimizer and construction."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from .. import models
from ..models import SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM
from ..models.float8 import use_float8
from ..text import one_line
from . import deepspeed_patches
from .config import OptimizerSection, TrainingConfig, weights_precision
from .launch import silent_stdout
from .muon import Muon
from .only_sinks import freeze_others
from .plan import Plan
from .recipe import saved_values
from .spikes import SpikeGuard, guard_updates

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine  # imported late elsewhere: DeepSpeed selects its device on import


FLOAT8_CAPABILITY = (8, 9)  # the first compute capability with float8 tensor cores
FUSED_ATTENTION = "query_key_value"  # in the name of a weight with queries, keys and values by head
EVEN_SIZE = 8  # 16-bit numbers in 16 bytes, the alignment of arguments that is fastest in cuBLAS


def deepspeed_config(plan: Plan, *, load_universal: bool = False, is_saved: bool = False) -> dict:
    """Return DeepSpeed's configuration: keys derived from the recipe, and keys passed through.

    Args:
        is_saved: return it as it may be stored, see `recipe.saved_values`.
    """
    config = plan.config
    stage = config.deepspeed.zero_stage
    ours = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": plan.num_passes,
        # Without ZeRO, DeepSpeed clips without reporting the norm, so `step` clips instead.
        "gradient_clipping": config.optimizer.clip if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on CPUs and needs no compiler
        # Of Muon, DeepSpeed knows only its own, which is not the same under all stages.
        "zero_allow_untested_optimizer": config.optimizer.name == "muon",
        "timers": {"throughput": {"enabled": False}},  # they would synchronize the device twice per micro-batch
        "checkpoint": {"tag_validation": "Ignore", "load_universal": load_universal},
        **_precision(config),
    }
    extra = config.deepspeed.extra_keys
    if is_saved:
        section = saved_values(config)["deepspeed"]
        extra = {key: section[key] for key in extra} if isinstance(section, dict) else {}
    return _merge(ours, extra)


def _precision(config: TrainingConfig) -> dict:
    """Return the keys for the precision. Gradients are always accumulated in float32.

    With ZeRO, the weights are 16-bit, with float32 copies in the optimizer. Without ZeRO, DeepSpeed
    could only accumulate the gradients of 16-bit weights in 16 bits, so the weights stay float32
    and autocast casts the matrix products.
    """
    precision = weights_precision(config.train.precision)
    if precision == "fp32":
        return {}
    if config.deepspeed.zero_stage == 0:
        dtype = "bfloat16" if precision == "bf16" else "float16"
        return {"torch_autocast": {"enabled": True, "dtype": dtype}}
    scale = {"initial_scale_power": 12} if precision == "fp16" else {}  # Pythia's first loss scale
    return {precision: {"enabled": True, **scale}, "data_types": {"grad_accum_dtype": "fp32"}}


def _merge(ours: dict, extra: dict) -> dict:
    merged = dict(ours)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parameter_groups(model: nn.Module, optimizer: OptimizerSection) -> list[dict[str, nn.Parameter]]:
    """Return parameters by name, in the optimizer's order: matrices; biases, layer norms and sinks.

    Those that are not trained are left out. With Muon, the first group is the matrices of the
    layers, and the second one the embedding and the head.

    ZeRO concatenates the weights of a group. Parameters whose size is not a multiple of 8 (such as
    a logit for each of twelve heads) come last, because biases after them would not be aligned to
    16 bytes and matrix products would be slower.
    """
    hidden: dict[str, nn.Parameter] = {}
    matrices: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.endswith("weight")  # excludes a sink's keys and values
            is_hidden = is_matrix and optimizer.name == "muon" and ".layers." in name
            (hidden if is_hidden else matrices if is_matrix else others)[name] = parameter
    others = dict(sorted(others.items(), key=lambda item: item[1].numel() % EVEN_SIZE != 0))
    return [hidden, matrices, others] if optimizer.name == "muon" else [matrices, others]


def groups_of(model_config: SinkGPTNeoXConfig, config: TrainingConfig) -> list[dict[str, nn.Parameter]]:
    """Return `parameter_groups` of a model that need not exist; they have shapes and no values."""
    with torch.device("meta"):
        model = SinkGPTNeoXForCausalLM(model_config)
    if config.train.only_sinks:
        freeze_others(model)
    return parameter_groups(model, config.optimizer)


def group_names(plan: Plan) -> list[list[str]]:
    """Return the names of the parameters of each group of the optimizer, in its order."""
    return [list(group) for group in groups_of(plan.model_config, plan.config)]


def optimizer_layout(plan: Plan) -> str:
    """Return a sha256 of what determines the order of weights in DeepSpeed's optimizer files.

    The files can only be loaded into an optimizer with the same layout.
    """
    sub_groups = deepspeed_config(plan)["zero_optimization"].get("sub_group_size")  # ZeRO-3 saves by sub-group
    return hashlib.sha256(json.dumps([group_names(plan), sub_groups]).encode()).hexdigest()


def make_optimizer(model: PreTrainedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return fused AdamW or `Muon`, with weight decay on matrices only.

    There is none with ``train.only_sinks``: the other rows of the embedding would decay too.
    """
    optimizer = config.optimizer
    groups = parameter_groups(model, optimizer)
    decay = 0.0 if config.train.only_sinks else optimizer.weight_decay
    decays = [*[decay] * (len(groups) - 1), 0.0]
    for_torch = [{"params": list(g.values()), "weight_decay": decay} for g, decay in zip(groups, decays, strict=True)]
    adamw: dict[str, Any] = {"lr": optimizer.lr, "betas": tuple(optimizer.betas), "eps": optimizer.eps, "fused": True}
    if optimizer.name == "adamw":
        return torch.optim.AdamW(for_torch, **adamw)
    num_heads = [model.config.num_attention_heads if FUSED_ATTENTION in name else None for name in groups[0]]
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    return Muon(for_torch[0], num_heads, for_torch[1:], dtype=dtype, **adamw)


def make_engine(
    model: PreTrainedModel, plan: Plan, device: torch.device, *, load_universal: bool = False
) -> "DeepSpeedEngine":
    """Create the DeepSpeed engine, which moves, casts, partitions and may compile the model.

    Raises:
        ValueError: the device does not support the recipe's precision, DeepSpeed rejects a key
            passed through, a key changes the partition that Muon needs, or this version of
            DeepSpeed cannot create a second engine in a process.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfigError

    deepspeed_patches.reset_process()
    config = plan.config
    if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("train.precision=fp16 is not supported on this device: set bf16 or fp32")
    if config.train.precision == "fp8":
        check_float8(device)
        use_float8(model)
    if config.train.activation_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.train.only_sinks:
        freeze_others(model)
    optimizer = make_optimizer(model, config)
    deepspeed_patches.support_optimizer(type(optimizer))
    try:
        with silent_stdout(), deepspeed_patches.no_memory_reports(config):
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(plan, load_universal=load_universal),
            )
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"DeepSpeed rejects keys of the section deepspeed ({error.title}); fix or remove them: {reasons}"
        ) from error
    except (DeepSpeedConfigError, ImportError) as error:
        raise ValueError(
            f"DeepSpeed cannot use the section deepspeed ({one_line(error)}): correct or remove its keys, or install "
            "what they need"
        ) from error
    if isinstance(optimizer, Muon):
        optimizer.check_partition()
    engine.fused_update = deepspeed_patches.fused_update(engine, config)
    holds_back = config.train.on_spike == "skip"
    guard_updates(engine, SpikeGuard(device, plan.vocab_size, holds_back=holds_back))
    if compiles(config, device):
        compile_model(engine, plan)
    engine.train()
    return engine


def compile_model(engine: "DeepSpeedEngine", plan: Plan) -> None:
    """Let torch compile the model in its first passes.

    Each shape is compiled for training and for validation. Beyond the limit, torch would run the
    model without compiling it.
    """
    from torch._dynamo import config as dynamo

    cache_traced_models()
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * plan.num_pass_shapes + 4)
    engine.compile(compile_kwargs={"dynamic": False})


def cache_traced_models() -> None:
    """Let torch cache a compiled model by its graph, so that it need not be traced again.

    The graph has custom autograd functions, which are not cached by default. It calls Triton
    kernels by name, without the Python code that starts them, so the key has a hash of that code.
    """
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    code = b"".join(path.read_bytes() for path in sorted(Path(models.__file__).parent.glob("*.py")))
    tag = torch.compiler.config.cache_key_tag.partition(" sinklm ")[0]  # of the user
    torch.compiler.config.cache_key_tag = f"{tag} sinklm {hashlib.sha256(code).hexdigest()}"


def check_precision(config: TrainingConfig, device: torch.device) -> None:
    """Raise a ValueError if the recipe needs float8 and the device cannot compute it."""
    if config.train.precision == "fp8":
        check_float8(device)


def check_float8(device: torch.device) -> None:
    """Raise a ValueError if the device has no float8 tensor cores."""
    if device.type != "cuda":
        name = device.type.upper()
        raise ValueError(f"train.precision=fp8 needs a GPU, but this device is a {name}: set bf16 or fp32")
    capability = torch.cuda.get_device_capability(device)
    if capability < FLOAT8_CAPABILITY:
        raise ValueError(
            f"train.precision=fp8 is not supported on {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}; 8.9 or higher is needed): set bf16"
        )


def compiles(config: TrainingConfig, device: torch.device) -> bool:
    """Whether to use torch.compile. With ZeRO-3, weights are not available during tracing."""
    if config.train.compile is None:
        return device.type == "cuda" and config.deepspeed.zero_stage < 3
    return config.train.compile
