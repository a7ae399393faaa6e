"""The DeepSpeed engine: its configuration, its optimizer, and how it is made."""

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from ..models import SinkGPTNeoXForCausalLM
from . import deepspeed_patches
from .config import OptimizerSection, TrainingConfig
from .launch import silent_stdout
from .plan import Plan

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine  # imported late: it looks for its device as it is imported


EVEN_SIZE = 8  # 16-bit numbers that make 16 bytes, which is how cuBLAS likes its arguments aligned


def deepspeed_config(plan: Plan, *, load_universal: bool = False) -> dict:
    """DeepSpeed's own configuration, from ours and the keys passed through."""
    config = plan.config
    stage = config.deepspeed.zero_stage
    ours = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": plan.num_accumulation_steps,
        # Without ZeRO, DeepSpeed would clip without telling the norm: `step` clips.
        "gradient_clipping": config.optimizer.clip if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs as well, and needs no compiler
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in each micro-batch
        "checkpoint": {"tag_validation": "Ignore", "load_universal": load_universal},
        **_precision(config),
    }
    return _merge(ours, config.deepspeed.extra_keys)


def _precision(config: TrainingConfig) -> dict:
    """Keys for the compute type. Gradients are added up in float32 in every case.

    With ZeRO the weights are 16-bit, with float32 copies in the optimizer. Without it, DeepSpeed can only accumulate
    16-bit weights' gradients in 16 bit; there the weights stay float32 and autocast lowers the matrix products.
    """
    precision = config.train.precision
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


def parameter_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Parameters by name, in the optimizer's order: matrices; biases, layer norms and sinks.

    ZeRO lays the weights of a group end to end. Those of odd sizes, as a logit for each of twelve heads, come last:
    behind them biases would not lie where the fastest matrix products want them.
    """
    matrices: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and name.endswith("weight")  # a sink's key and value for each head is none
            (matrices if is_matrix else others)[name] = parameter
    return matrices, dict(sorted(others.items(), key=lambda item: item[1].numel() % EVEN_SIZE != 0))


def optimizer_layout(plan: Plan) -> str:
    """sha256 of what the order in DeepSpeed's files of an optimizer depends on: they fit only one of the same."""
    with torch.device("meta"):
        model = SinkGPTNeoXForCausalLM(plan.model_config)
    names = [list(group) for group in parameter_groups(model)]
    sub_groups = deepspeed_config(plan)["zero_optimization"].get("sub_group_size")  # in which ZeRO-3 saves them
    return hashlib.sha256(json.dumps([names, sub_groups]).encode()).hexdigest()


def make_optimizer(model: nn.Module, optimizer: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices alone."""
    matrices, others = parameter_groups(model)
    groups = [
        {"params": list(matrices.values()), "weight_decay": optimizer.weight_decay},
        {"params": list(others.values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optimizer.lr, betas=(optimizer.betas[0], optimizer.betas[1]), eps=optimizer.eps, fused=True
    )


def make_engine(
    model: PreTrainedModel, plan: Plan, device: torch.device, *, load_universal: bool = False
) -> "DeepSpeedEngine":
    """Hand the model over to DeepSpeed, which moves, casts, splits and perhaps compiles it.

    Raises:
        ValueError: the device does not support the recipe's precision, DeepSpeed refuses a key
            passed through, or this version of DeepSpeed cannot make a second engine in a process.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed_patches.reset_process()
    config = plan.config
    if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("train.precision=fp16 is not for this device: set bf16 or fp32")
    if config.train.activation_checkpointing:
        # transformers 5.23 gave it a new name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    try:
        with silent_stdout(), deepspeed_patches.no_memory_reports(config):
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(model, config.optimizer),
                config=deepspeed_config(plan, load_universal=load_universal),
            )
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"DeepSpeed refuses a key under deepspeed ({error.title}): {reasons}") from error
    engine.fused_update = deepspeed_patches.fused_update(engine, config)
    if compiles(config, device):
        # The loss has a gradient of its own, which keeps torch from caching the traced model without this.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        engine.compile(compile_kwargs={"dynamic": False})
    engine.train()
    return engine


def compiles(config: TrainingConfig, device: torch.device) -> bool:
    """Whether the model runs through torch.compile. Under ZeRO-3 weights are not there when the model is traced."""
    if config.train.compile is None:
        return device.type == "cuda" and config.deepspeed.zero_stage < 3
    return config.train.compile
