"""All replacements and workarounds for DeepSpeed, one function each.

They use names that are not public, and are tested with the versions in `versions.TESTED`.
`skip_op_build`, `no_memory_reports` and `fused_update` save time. The recipe key
``deepspeed.patches`` enables them, and they are disabled with a RuntimeWarning under other versions
or if a name is missing.
`support_optimizer` saves a warning. `reset_process`, `collect_files` and `restore_settings` are
required for correctness, so they are always active; their docstrings state what happens if a name
is missing.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..versions import TESTED, is_tested, tested_range
from .config import OptimizerSection, TrainingConfig, weights_precision
from .fused_update import NAMES, FusedUpdate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

NEWEST_TESTED = TESTED["deepspeed"][1]
# Keys that say how gradients are reduced.
REDUCTION_KEYS = ("communication_data_type", "gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients")
_has_made_engine = False


def skip_op_build(*, is_main: bool) -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce for CPUs; gloo is used instead.

    Replaces the table of operations that it may compile, `deepspeed.ops.__compatible_ops__`.
    """
    import deepspeed

    if _is_tested("It may compile an all-reduce for CPUs, which takes about 40 s", is_main):
        deepspeed.ops.__compatible_ops__ = {}


@contextmanager
def no_memory_reports(config: TrainingConfig) -> Iterator[None]:
    """Skip the memory reports that `BF16_Optimizer` prints while an engine is made.

    Before each of them it collects garbage, which takes 1 to 2 seconds in all. Replaces
    `see_memory_usage` in its module.
    """
    from deepspeed.runtime import bf16_optimizer

    is_wanted = config.deepspeed.patches and weights_precision(config.train.precision) == "bf16"
    if not is_wanted or not _is_tested("An engine takes 1 to 2 s longer to make", torch.distributed.get_rank() == 0):
        yield
        return
    original = bf16_optimizer.see_memory_usage
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = original


def support_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    """Keep DeepSpeed from warning that an optimizer is untested with ZeRO, if it has its list."""
    from deepspeed.runtime.zero import utils

    supported = getattr(utils, "ZERO_SUPPORTED_OPTIMIZERS", [])
    if optimizer not in supported:
        supported.append(optimizer)


def fused_update(engine: "DeepSpeedEngine", config: TrainingConfig) -> FusedUpdate | None:
    """Replace the update of an engine's `BF16_Optimizer`, if it has one, with `FusedUpdate`.

    With one of `REDUCTION_KEYS`, which it would ignore, DeepSpeed's own is used.
    """
    is_bf16 = weights_precision(config.train.precision) == "bf16"
    if not config.deepspeed.patches or config.deepspeed.zero_stage != 1 or not is_bf16:
        return None
    if config.deepspeed.extra_keys.keys() & REDUCTION_KEYS:
        return None
    cost, is_main = "Its own update is used, and a small model's steps take 5 to 10 % longer", engine.global_rank == 0
    if not _is_tested(cost, is_main):
        return None
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    zero = engine.optimizer
    if not isinstance(zero, BF16_Optimizer) or zero.immediate_grad_update:
        return None
    if missing := [name for name in NAMES if not hasattr(zero, name)]:
        _warn(f"has no BF16_Optimizer.{missing[0]}, which {NEWEST_TESTED} has. {cost}", is_main)
        return None
    return FusedUpdate(engine, config.optimizer.clip)


def reset_process() -> None:
    """Reset the globals set by earlier engines of this process, which DeepSpeed never resets.

    ZeRO-0 in 16 bits sets `torch_autocast.TORCH_AUTOCAST_INITIALIZED`, which changes how ZeRO
    reduces gradients. ZeRO-3 replaces `torch.nn.functional.linear` for the whole process.

    Raises:
        ValueError: the flag is missing, and this is not the first engine of the process.
    """
    global _has_made_engine
    import deepspeed

    torch_autocast: Any = getattr(deepspeed.runtime, "torch_autocast", None)
    if hasattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED"):
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    elif _has_made_engine:
        _fail("torch_autocast.TORCH_AUTOCAST_INITIALIZED: run each training in its own process, or ")
    if nn.functional.linear.__module__.startswith("deepspeed."):
        nn.functional.linear = torch._C._nn.linear
    _has_made_engine = True


def collect_files(engine: "DeepSpeedEngine", folder: Path, tag: str, client_state: dict) -> list[tuple[Path, Any]]:
    """Call ``engine.save_checkpoint``, and return the files instead of writing them.

    So they can be written later, and an error in writing does not leave the other ranks waiting at
    the end of the call. Replaces `checkpoint_engine.save`, and `_copy_recovery_script`, whose
    script is not needed because the weights are saved beside these files.

    Returns:
        for each file of this rank its path and the object to pass to ``torch.save``.

    Raises:
        ValueError: `checkpoint_engine.save` is missing.
    """
    files: list[tuple[Path, Any]] = []
    writer = getattr(engine, "checkpoint_engine", None)
    if not hasattr(writer, "save"):
        _fail("checkpoint_engine.save, which saving needs: ")
    replaced: list[tuple[Any, str, Callable]] = [
        (writer, "save", lambda state_dict, path: files.append((Path(path), state_dict))),
        (engine, "_copy_recovery_script", lambda path: None),
    ]
    for owner, name, replacement in replaced:
        setattr(owner, name, replacement)
    try:
        engine.save_checkpoint(folder, tag=tag, client_state=client_state, save_latest=False)
    except (OSError, RuntimeError):  # the others wait at the final barrier
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        raise
    finally:
        for owner, name, _ in replaced:
            delattr(owner, name)  # makes the method of its class visible again
    return files


def restore_settings(engine: "DeepSpeedEngine", settings: OptimizerSection, *, zero_stage: int) -> None:
    """Replace the optimizer settings that DeepSpeed loads from a checkpoint with the recipe's.

    From a universal checkpoint, ZeRO-3 also sets every group's weight decay to that of the first
    one, and shares one step counter among all parameters, which would advance once for each of
    them.

    Raises:
        ValueError: ZeRO's ``clip_grad`` is missing, so that the checkpoint's clip could be in use.
    """
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        is_decayed = group is not optimizer.param_groups[-1]
        group["weight_decay"] = settings.weight_decay if is_decayed else 0.0
        if "betas" in group:
            group.update(betas=tuple(settings.betas), eps=settings.eps)
    for parameter, state in optimizer.state.items():
        if "step" in state:  # fused AdamW needs it on the device of the weights
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device).clone()
    if zero_stage:
        if not hasattr(engine.optimizer, "clip_grad"):
            _fail(f"{type(engine.optimizer).__name__}.clip_grad, which resuming needs: ")
        engine.optimizer.clip_grad = settings.clip


def _is_tested(cost: str, is_main: bool) -> bool:
    """Whether this is a tested version. If not, warn that an optional patch is disabled."""
    if is_tested("deepspeed", importlib.metadata.version("deepspeed")):
        return True
    silence = "deepspeed.patches=false turns this warning off"
    _warn(f"was not tested with sinklm, only {tested_range('deepspeed')}. {cost} ({silence})", is_main)
    return False


def _warn(message: str, is_main: bool) -> None:
    if is_main:
        message = f"DeepSpeed {importlib.metadata.version('deepspeed')} {message}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _fail(name_and_remedy: str) -> NoReturn:
    version = importlib.metadata.version("deepspeed")
    raise ValueError(f"DeepSpeed {version} has no {name_and_remedy}install deepspeed=={NEWEST_TESTED}")
