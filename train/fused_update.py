"""A faster update for bfloat16 and ZeRO-1, on the buffers of DeepSpeed's `BF16_Optimizer`.

`BF16_Optimizer` (0.19.8) passes over the gradients a dozen times, rounds their sum to bfloat16
before it reduces the sum, starts several kernels for each parameter, and makes the host wait three
times for the norm. With one micro-batch per step, that takes 5 to 10 % of a small model's time.
`FusedUpdate` copies the gradients into a buffer once, reduces to each rank only its own part, and
updates in one kernel: `adamw_kernel` on a GPU, torch's fused AdamW elsewhere. The kernel divides
the gradient by ``grad_scale``, which clips it, and does nothing if ``found_inf`` is 1, as for a
`torch.amp.GradScaler`. The matrices of `muon.Muon` are updated by it, on the same buffers and with
the same scalars. `deepspeed_patches.fused_update` decides whether an engine uses it.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .host_copy import HostCopy

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

try:
    from . import adamw_kernel as kernel
except ImportError:  # Triton comes with torch's CUDA builds
    kernel = None  # type: ignore[assignment]

# The attributes of `BF16_Optimizer` that `FusedUpdate` uses or replaces. None of them is public.
NAMES = (
    *("dp_process_group", "bf16_groups", "bf16_partitioned_groups", "fp32_groups_gradients_flat"),
    *("fp32_groups_flat_partition", "update_hp_grads", "clear_hp_grads", "clear_lp_grads", "update_lp_params"),
    "_lazy_init_hp_params_optimizer_state",
)


class FusedUpdate:
    """Replaces methods of an engine's `BF16_Optimizer`, from its construction on.

    Attributes:
        grad_norm: norm of the last step's gradient, before clipping. The device has it before the
            update. If it is not finite, this update and those of all steps that are queued behind
            it leave the weights unchanged.
        judge: called with the norm before the update; returns 1 on the device to hold this update
            back, else 0 (`spikes.SpikeGuard.judge`).
    """

    grad_norm: HostCopy
    judge: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, engine: "DeepSpeedEngine", max_norm: float):
        zero = engine.optimizer
        self._zero, self._max_norm, self._group = zero, max_norm or math.inf, zero.dp_process_group
        self._num_ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._has_kernel = has_kernel(engine.device)
        self._parameters = [p for group in zero.bf16_groups for p in group]
        self._wholes: list[torch.Tensor] = zero.fp32_groups_gradients_flat
        if self._has_kernel and self._num_ranks * engine.gradient_accumulation_steps() == 1:
            # Nothing is added to a gradient, so it stays in 16 bits, in half of its float32 buffer.
            # DeepSpeed's views of the buffer (`safe_get_full_grad`) are then meaningless.
            self._wholes = [whole.view(torch.bfloat16)[: whole.numel()] for whole in self._wholes]
        self._parts = [whole.chunk(self._num_ranks)[rank] for whole in self._wholes]
        self._copies = [parts[rank] for parts in zero.bf16_partitioned_groups]
        sizes = [[p.numel() for p in group] for group in zero.bf16_groups]
        self._sums = [
            gradient
            for group, whole in zip(sizes, self._wholes, strict=True)
            for gradient in whole[: sum(group)].split(group)
        ]
        self._is_first = True
        self._is_over = torch.zeros((), device=engine.device)  # 1 from the first step that is not finite
        engine.enable_backward_allreduce = False
        zero.update_hp_grads = self._accumulate
        zero.clear_hp_grads = self._begin_again
        zero.step = self._step

    @torch.no_grad()
    def _accumulate(self, clear_lp_grads: bool = False) -> None:
        """Add a micro-batch's gradients to the sums; the first one overwrites the sums."""
        gradients = [p.grad.view(-1) for p in self._parameters]
        (torch._foreach_copy_ if self._is_first else torch._foreach_add_)(self._sums, gradients)
        self._is_first = False
        self._zero.clear_lp_grads(set_to_none=True)

    def _begin_again(self) -> None:
        """Let the next micro-batch overwrite the sums, instead of setting them to zero."""
        self._is_first = True

    @torch.no_grad()
    def _step(self, closure: Any = None) -> None:
        zero = self._zero
        grad_norm = self._reduce()
        self.grad_norm = HostCopy(grad_norm)
        if self._has_kernel:
            self._update_in_one_pass()
        else:
            for weights, part in zip(zero.fp32_groups_flat_partition, self._parts, strict=True):
                weights.grad = part
            zero.optimizer.step()
        if not self._has_kernel or self._num_ranks > 1:
            zero.update_lp_params()  # copies this rank's part and gathers all parts
        zero._lazy_init_hp_params_optimizer_state()
        self._begin_again()

    def _reduce(self) -> torch.Tensor:
        """Reduce each part of the gradient to its rank; set ``grad_scale`` and ``found_inf``.

        Returns:
            the norm of the mean over ranks.
        """
        if self._num_ranks > 1:
            for part, whole in zip(self._parts, self._wholes, strict=True):
                dist.reduce_scatter_tensor(part, whole, group=self._group)
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in self._parts]
        square = torch.stack(norms).square().sum()
        if self._num_ranks > 1:
            dist.all_reduce(square, group=self._group)
        grad_norm = square.sqrt() / self._num_ranks
        optimizer = self._zero.optimizer
        optimizer.grad_scale = self._num_ranks * (grad_norm / self._max_norm).clamp(min=1.0)
        is_bad = 1.0 - grad_norm.isfinite().float()
        self._is_over = torch.maximum(self._is_over, is_bad)
        is_held = self._is_over if self.judge is None else torch.maximum(self._is_over, self.judge(grad_norm))
        optimizer.found_inf = is_held
        return grad_norm

    def _update_in_one_pass(self) -> None:
        """Update weights and state, AdamW's with the kernel, and the model's weights."""
        optimizer = self._zero.optimizer
        for group, copy, part in zip(optimizer.param_groups, self._copies, self._parts, strict=True):
            (weights,) = group["params"]
            if group.get("is_muon"):
                optimizer.update_matrices(group, [part])
                copy.copy_(weights)
                continue
            state = optimizer.state[weights]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
            kernel.adamw_(
                *(weights, copy, part, state["exp_avg"], state["exp_avg_sq"], state["step"]),
                **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
                grad_scale=optimizer.grad_scale,
                found_inf=optimizer.found_inf,
            )


def has_kernel(device: torch.device) -> bool:
    """Whether AdamW uses `adamw_kernel`."""
    return kernel is not None and device.type == "cuda"
