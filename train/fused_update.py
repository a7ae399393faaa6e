"""DeepSpeed's update for bfloat16 and ZeRO-1, on its own buffers, in a dozen kernels and without a wait of the host.

Its own way (`BF16_Optimizer`, 0.19.8) passes over the gradients a dozen times, rounds their sum to bfloat16 to reduce
it, starts several kernels for each parameter, and makes the host wait three times for the norm; with one micro-batch a
step that costs a small model 5 to 10 % of its time. Here gradients go once into the float32 buffer, each rank gets the
sum of its own part alone, and AdamW's kernel does the rest: it divides by ``grad_scale``, which clips, and does nothing
where ``found_inf`` is 1, as for a `torch.amp.GradScaler`.
"""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# What is used of `BF16_Optimizer`, none of it public.
NAMES = (
    "dp_process_group",
    "bf16_groups",
    "fp32_groups_gradients",
    "fp32_groups_gradients_flat",
    "fp32_groups_gradient_flat_partition",
    "fp32_groups_flat_partition",
    "update_hp_grads",
    "clear_hp_grads",
    "clear_lp_grads",
    "update_lp_params",
    "_lazy_init_hp_params_optimizer_state",
)


def has_fused_update(engine: "DeepSpeedEngine") -> bool:
    """Whether an engine's updates can be done so. It warns if a version of DeepSpeed is not the one known here."""
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    zero = engine.optimizer
    if not isinstance(zero, BF16_Optimizer) or zero.immediate_grad_update:
        return False
    missing = [name for name in NAMES if not hasattr(zero, name)]
    if missing and engine.global_rank == 0:
        warnings.warn(
            f"DeepSpeed {deepspeed.__version__} has no BF16_Optimizer.{missing[0]}, as 0.19.8 had. Its own update is "
            "used, and a small model's steps take 5 to 10 % longer",
            RuntimeWarning,
            stacklevel=2,
        )
    return not missing


class FusedUpdate:
    """Takes the place of some methods of an engine's `BF16_Optimizer`.

    Attributes:
        read_grad_norm: gives that of the last step's gradient, before clipping, and waits for the device to have it,
            which it has before the update. If it is not finite the weights stayed as they were, and stay so: steps may
            be queued behind this one before the host knows.
    """

    read_grad_norm: Callable[[], float]

    def __init__(self, engine: "DeepSpeedEngine", max_norm: float):
        self._zero, self._max_norm = engine.optimizer, max_norm or math.inf
        self._group = self._zero.dp_process_group
        self._parameters = [p for group in self._zero.bf16_groups for p in group]
        self._sums = [gradient for group in self._zero.fp32_groups_gradients for gradient in group]
        self._is_first = True
        self._zero.optimizer.found_inf = torch.zeros((), device=engine.device)
        engine.enable_backward_allreduce = False
        self._zero.update_hp_grads = self._accumulate
        self._zero.clear_hp_grads = self._begin_again
        self._zero.step = self._step

    @torch.no_grad()
    def _accumulate(self, clear_lp_grads: bool = False) -> None:
        """Add a micro-batch's gradients to the float32 sums, or begin with them."""
        gradients = [p.grad.view(-1) for p in self._parameters]
        (torch._foreach_copy_ if self._is_first else torch._foreach_add_)(self._sums, gradients)
        self._is_first = False
        self._zero.clear_lp_grads(set_to_none=True)

    def _begin_again(self) -> None:
        """The next micro-batch overwrites the sums, so they need not be zero."""
        self._is_first = True

    @torch.no_grad()
    def _step(self, closure: Any = None) -> None:
        zero = self._zero
        parts = zero.fp32_groups_gradient_flat_partition
        grad_norm = self._reduce(parts, zero.fp32_groups_gradients_flat)
        self.read_grad_norm = begin_reading(grad_norm)
        for weights, part in zip(zero.fp32_groups_flat_partition, parts, strict=True):
            weights.grad = part
        zero.optimizer.step()
        zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()
        self._begin_again()

    def _reduce(self, parts: list[torch.Tensor], wholes: list[torch.Tensor]) -> torch.Tensor:
        """Add up the ranks' gradients, each rank its own part, and tell AdamW's kernel what to divide them by.

        Returns:
            the norm of the ranks' mean.
        """
        num_ranks = dist.get_world_size(self._group)
        if num_ranks > 1:
            for part, whole in zip(parts, wholes, strict=True):
                dist.reduce_scatter_tensor(part, whole, group=self._group)
        square = torch.stack([torch.linalg.vector_norm(part) for part in parts]).square().sum()
        if num_ranks > 1:
            dist.all_reduce(square, group=self._group)
        grad_norm = square.sqrt() / num_ranks
        self._zero.optimizer.grad_scale = num_ranks * (grad_norm / self._max_norm).clamp(min=1.0)
        is_bad = 1.0 - grad_norm.isfinite().float()
        self._zero.optimizer.found_inf = torch.maximum(self._zero.optimizer.found_inf, is_bad)
        return grad_norm


def begin_reading(values: torch.Tensor) -> Callable[[], Any]:
    """Copy to the host when the device comes to it. What is returned waits for that, and for nothing queued later."""
    on_host = values.to("cpu", non_blocking=True)
    if not values.is_cuda:
        return on_host.tolist
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Any:
        copied.synchronize()
        return on_host.tolist()

    return read
