"""The DeepSpeed engine: how it is configured, and one training step on it."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from ..models import SinkGPTNeoXForCausalLM
from .config import OptimizerSection, TrainingConfig
from .fused_update import FusedUpdate, begin_reading, has_fused_update
from .launch import SameOnAllRanks, World, silent_stdout
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
        # Without ZeRO, DeepSpeed would clip without telling the norm: `_clip` does it.
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
    """Hand the model over to DeepSpeed: moved to its device, cast, split and perhaps compiled.

    Raises:
        ValueError: the device cannot do the recipe's precision, or DeepSpeed refuses a key passed through.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    # Of the process: an earlier run's ZeRO-0 and ZeRO-3 would set these for all.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = torch._C._nn.linear
    config = plan.config
    if config.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ValueError("train.precision=fp16 is not for this device: set bf16 or fp32")
    if config.train.activation_checkpointing:
        # transformers 5.23 gave it a new name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    try:
        with silent_stdout():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=make_optimizer(model, config.optimizer),
                config=deepspeed_config(plan, load_universal=load_universal),
            )
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"DeepSpeed refuses a key under deepspeed ({error.title}): {reasons}") from error
    if has_fused_update(engine):
        engine.fused_update = FusedUpdate(engine, config.optimizer.clip)
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


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over all targets of the global batch.
        grad_norm: of the global batch, before clipping; infinite if the update was skipped.
        is_skipped: float16 only: the scaled gradients overflowed, so there was no update.
        loss_scale: float16 only.
        is_stop_requested: some rank was told to stop.
    """

    loss: float
    grad_norm: float
    is_skipped: bool
    loss_scale: float | None
    is_stop_requested: bool


def train_step(
    engine: "DeepSpeedEngine",
    batches: Iterator[torch.Tensor],
    plan: Plan,
    world: World,
    *,
    step: int,
    lr: float,
    is_stop_requested: bool = False,
) -> Callable[[], StepResult]:
    """Queue one optimizer step on the next micro-batches ``(b, tokens_per_sample)``.

    Every sample has the same number of targets, so the mean over the global batch is the mean of the micro-batches'.
    With `FusedUpdate` the host waits for nothing, so a GPU need never wait for it: the next step can be queued before
    this one's result is read. What is not finite leaves the weights alone, in this step and those queued behind it.

    Returns:
        reads the result, and waits for the device to have it; it may raise the same.

    Raises:
        SameOnAllRanks: a loss or the gradient is not finite. The weights are those before the step.
    """
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr
    loss_sum = torch.zeros((), device=engine.device)
    for micro_step in range(plan.num_accumulation_steps):
        samples = next(batches)
        loss = engine(input_ids=samples[:, :-1], labels=samples, skip_logits=True, use_cache=False).loss
        loss_sum += loss.detach()
        engine.backward(_nan_unless_finite(loss))
        if micro_step < plan.num_accumulation_steps - 1:
            engine.step()  # counts the micro-batch

    is_stopping = loss_sum.new_full((), float(is_stop_requested))
    read_by_rank = begin_reading(_gather(torch.stack([loss_sum / plan.num_accumulation_steps, is_stopping]), world))
    read_grad_norm, is_refused = _update(engine, plan)
    loss_scale = _loss_scale(engine) if plan.config.train.precision == "fp16" else None

    def read() -> StepResult:
        by_rank = read_by_rank()
        losses = [loss for loss, _ in by_rank]
        _check_losses(losses, step)
        is_skipped = is_refused and loss_scale is not None and loss_scale > 1
        grad_norm = math.inf if is_refused else read_grad_norm()
        if not is_skipped and not math.isfinite(grad_norm):
            raise _bad_gradient(step)
        return StepResult(
            loss=math.fsum(losses) / len(losses),
            grad_norm=grad_norm,
            is_skipped=is_skipped,
            loss_scale=loss_scale,
            is_stop_requested=any(stop for _, stop in by_rank),
        )

    if is_refused:
        read()  # raises, but for a float16 overflow, so that no step follows
    return read


def _nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with NaN for its gradient if it is not finite: so the norm shows it, on all ranks, without a wait."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _gather(values: torch.Tensor, world: World) -> torch.Tensor:
    """The values of every rank, ``(ranks, …)``."""
    if world.size == 1:
        return values[None]
    by_rank = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(by_rank, values)
    return torch.stack(by_rank)


def _check_losses(losses: list[float], step: int) -> None:
    bad = [f"{loss} on rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        raise SameOnAllRanks(
            f"step {step}: the loss is {', '.join(bad)}. Training stopped before the update and saved nothing; the "
            "newest checkpoint is intact. Lower optimizer.lr or optimizer.clip, or look at the data of this step"
        )


Update = tuple[Callable[[], float], bool]  # gives the gradient's norm; whether the host knows there was no update


def _update(engine: "DeepSpeedEngine", plan: Plan) -> Update:
    """Clip and update, or leave the weights alone if the gradient is not finite."""
    if plan.config.deepspeed.zero_stage == 0:
        return _update_without_zero(engine, plan)
    engine.step()
    if isinstance(fused := getattr(engine, "fused_update", None), FusedUpdate):
        return fused.read_grad_norm, False
    return begin_reading(torch.as_tensor(engine.get_global_grad_norm())), engine.optimizer.overflow


def _update_without_zero(engine: "DeepSpeedEngine", plan: Plan) -> Update:
    scaler = engine.torch_autocast_z0_gradscaler  # with float16 only
    if scaler is not None:
        scaler.unscale_(engine.optimizer)
    max_norm = plan.config.optimizer.clip or math.inf
    grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), max_norm).item()
    is_finite = math.isfinite(grad_norm)
    if is_finite or scaler is not None:  # which skips the update by itself, and lowers its scale
        engine.step()
    return lambda: grad_norm, not is_finite


def _bad_gradient(step: int) -> SameOnAllRanks:
    return SameOnAllRanks(
        f"step {step}: the gradient is not finite, though the loss is. Training stopped before the update and saved "
        "nothing; the newest checkpoint is intact. Lower optimizer.lr, or try train.precision=fp32"
    )


def _loss_scale(engine: "DeepSpeedEngine") -> float:
    scaler = engine.torch_autocast_z0_gradscaler
    return float(scaler.get_scale() if scaler is not None else engine.optimizer.loss_scale)
