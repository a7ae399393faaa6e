"""Reference: training without DeepSpeed and without a loader, on one rank."""

import itertools
from collections.abc import Container, Iterator
from types import SimpleNamespace

import torch
from torch import nn

from sinklm.data import SampleOrder, TokenStore, TokenWindows
from sinklm.models import SinkGPTNeoXForCausalLM
from sinklm.train import fused_update
from sinklm.train.config import TrainingConfig
from sinklm.train.plan import Plan
from sinklm.train.schedule import learning_rate


def plain_training(plan: Plan, num_steps: int) -> tuple[list[float], list[float], SinkGPTNeoXForCausalLM]:
    """Losses, gradient norms and the model after ``num_steps`` on whole batches."""
    config = plan.config
    torch.manual_seed(config.train.seed)
    model = SinkGPTNeoXForCausalLM(plan.model_config)
    muon: dict[nn.Parameter, torch.Tensor] = {}
    if config.optimizer.name == "muon":
        matrices = [m.weight for m in model.gpt_neox.layers.modules() if isinstance(m, nn.Linear)]
        muon = {weight: torch.zeros_like(weight) for weight in matrices}
    optimizer = plain_optimizer(model, plan, without=muon)
    losses, norms = [], []
    for step, tokens in zip(range(num_steps), batches_of(plan), strict=False):
        logits = model(tokens[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if plan.model_config.layer_windows is not None:
            loss = model(tokens[:, :-1], labels=tokens, window=plan.window(step + 1)).loss
        elif plan.num_sinks:  # the first token of each sample is a target as well
            sinks = torch.tensor(plan.model_config.sink_token_ids).expand(len(tokens), -1)
            everything = torch.cat([sinks, tokens], dim=1)
            logits = plain_logits(model, everything[:, :-1])[:, plan.num_sinks - 1 :]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or torch.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.num_steps, config.optimizer)
        optimizer.step()
        for weight, average in muon.items():
            plain_muon_(weight, average, config, optimizer.param_groups[0]["lr"])
        model.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def batches_of(plan: Plan) -> Iterator[torch.Tensor]:
    """Yield the whole batch of each step, ``(samples_per_step, tokens_per_sample)``."""
    store = TokenStore(plan.config.data.path)
    windows = TokenWindows(store, "train", tokens_per_sample=plan.tokens_per_sample, stride=plan.stride)
    order = SampleOrder(len(windows), plan.config.train.seed)
    for step in itertools.count():
        batch = range(step * plan.samples_per_step, (step + 1) * plan.samples_per_step)
        yield torch.stack([torch.from_numpy(windows[order(i)]) for i in batch])


def plain_optimizer(model: SinkGPTNeoXForCausalLM, plan: Plan, without: Container = ()) -> torch.optim.AdamW:
    settings = plan.config.optimizer
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in decayed)]
    decayed = [p for p in decayed if p not in without]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
    )


@torch.no_grad()
def plain_muon_(weight: nn.Parameter, average: torch.Tensor, config: TrainingConfig, lr: float) -> None:
    """One step of Muon, orthogonalized in float64. A weight of 3 D × D has query, key and value."""
    assert weight.grad is not None
    average.mul_(0.95).add_(weight.grad, alpha=0.05)
    update = (0.05 * weight.grad + 0.95 * average).double()
    num_rows, num_columns = weight.shape
    parts = [list(range(num_rows))]
    if num_rows == 3 * num_columns:
        head_dim = num_columns // config.model.num_attention_heads
        parts = [[row for row in range(num_rows) if row // head_dim % 3 == part] for part in range(3)]
    for rows in parts:
        size = max(len(rows), num_columns)
        update[rows] = plain_orthogonal(update[rows]) * 0.2 * size**0.5
    weight.copy_(weight * (1 - lr * config.optimizer.weight_decay) - lr * update.float())


def plain_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of Newton-Schulz by the formula of Jordan et al. 2024, in float64."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def plain_logits(model: SinkGPTNeoXForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits for ids that already contain the sink tokens."""
    return model.lm_head(model.gpt_neox(ids).last_hidden_state)


def plain_adamw_(weights, copy, gradient, exp_avg, exp_avg_sq, step, *, grad_scale, found_inf, **settings) -> None:
    """The kernel's reference: torch's AdamW on the same state."""
    weights = weights.detach()
    weights.grad = gradient.float().clone()
    optimizer = torch.optim.AdamW([weights], fused=True, **settings)
    optimizer.state[weights] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    optimizer.step()
    copy.copy_(weights)


def play_kernel(replace=setattr) -> None:
    """Replace the kernel by plain torch, for CPUs."""
    replace(fused_update, "kernel", SimpleNamespace(adamw_=plain_adamw_))
    replace(fused_update, "has_kernel", lambda device: True)
