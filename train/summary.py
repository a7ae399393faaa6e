"""The description of a run at its start, and its cost for ``--dry-run``."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.syntax import Syntax
from rich.table import Table

from ..checkpoints.warm_start import count_tokens
from ..console import Console
from ..data import SetWindows, open_store
from ..data.mixture import shares_of
from ..data.store import TokenSource
from ..hub import UnreachableError
from ..models.config import describe_windows, trained_windows
from ..models.cost import count_parameters
from .batches import Windows, open_windows
from .config import TrainingConfig
from .disk import checkpoint_bytes, checkpoints_kept, run_bytes
from .engine import check_precision
from .memory import GIB, count_muon_parameters, estimate_memory, size_text
from .metrics import check_wandb
from .plan import Plan
from .progress import human
from .recipe import config_yaml, saved_values
from .resume import preview_resume
from .start import check_start

if TYPE_CHECKING:
    from .resume import Resume

PYTHIA_TOKENIZER_SIZE = 50277
WORLD_SIZES = (1, 8, 64)


def describe_run(plan: Plan, store: TokenSource, windows: Windows, resume: "Resume | None") -> list[str]:
    """Return the lines printed at the start of a run."""
    config = plan.config
    lines = [
        f"model: {describe_model(plan)}",
        *attention_notes(plan),
        f"batch: {plan.world_size} rank{'s' * (plan.world_size > 1)} × {config.train.micro_batch_size} samples × "
        f"{_micro_batches(plan)} = {plan.samples_per_step:,} samples of "
        f"{config.train.seq_length:,} positions{_segments(plan)}; {config.train.precision}, "
        f"ZeRO-{config.deepspeed.zero_stage}",
        *([f"optimizer: {optimizer}"] if (optimizer := describe_optimizer(plan)) != "AdamW" else []),
        f"data: {store.path}, {_count(len(windows), 'sample')}; {_count(config.train.num_steps, 'step')} = "
        f"{epochs(plan, windows)}",
        f"run: {config.train.run_dir}",
    ]
    if resume is not None:
        lines.append(f"resuming from {resume.path} (step {resume.step:,})")
        lines += [f"changed since the checkpoint: {change}" for change in resume.changes]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _micro_batches(plan: Plan) -> str:
    count = plan.num_accumulation_steps
    return f"{count:,} micro-batch{'es' * (count > 1)}"


def _segments(plan: Plan) -> str:
    return f" in {plan.num_segments} segments" if plan.num_segments > 1 else ""


def describe_model(plan: Plan) -> str:
    kind = plan.config.model.sink.kind
    sink = {"none": "no sink", "token": _count(plan.num_sinks, "sink token")}.get(kind, f"sink.kind {kind}")
    parts = [f"{count_parameters(plan.model_config):,} parameters, vocabulary {plan.vocab_size:,}, {sink}"]
    windows = trained_windows(plan.model_config)
    return ", ".join(parts + [describe_windows(windows)] * bool(windows))


def attention_notes(plan: Plan) -> list[str]:
    """Return lines about settings of windowed layers that may not be wanted."""
    model, train = plan.config.model, plan.config.train
    largest = max(window or 0 for window in model.layer_windows or [0])
    pattern, notes = model.attention.pattern, [idle_windows(plan)]
    if ":" in pattern and None not in (model.layer_windows or []):
        notes.append(
            f"the pattern {pattern} has no layer with full attention in {_count(model.num_hidden_layers, 'layer')}: "
            "set another ratio, or model.attention.pattern=window if this is wanted"
        )
    if train.segment_length is not None and train.segment_length < min(largest, train.seq_length):
        notes.append(
            f"train.segment_length={train.segment_length} is shorter than the window of {largest:,}: until as many "
            "keys are carried, every pass has another shape, which is compiled anew; raise train.segment_length"
        )
    return [note for note in notes if note]


def idle_windows(plan: Plan) -> str | None:
    """Return a line about windows from which no token of a sample is hidden; None without any."""
    model, length = plan.config.model, plan.config.train.seq_length
    if model.layer_windows is None:
        return None
    low, high = model.attention.window_range or 2 * (max(window or 0 for window in model.layer_windows),)
    first = max(length - model.num_kept - 1, low)  # a query sees the kept tokens, the window and itself
    if first > high:
        return None
    share = math.log((high + 1) / first) / math.log((high + 1) / low)
    which = "the window" if low == high else f"from {first:,} on, in {share:.0%} of the steps, the window"
    remedies = []
    if high >= length - model.num_sinks - 1 or model.num_kept == model.num_sinks:
        remedies.append("window")
    if model.num_kept > model.num_sinks and (not remedies or length - model.num_kept - 1 <= 1):
        remedies.append("num_kept")
    return (
        f"{which} hides no token of a sample of {length:,} positions, which is full attention: lower "
        f"model.attention.{' and '.join(remedies)} or raise train.seq_length, unless this is wanted"
    )


def describe_optimizer(plan: Plan) -> str:
    """Return the optimizer, with the number of parameters if it does not update all."""
    if plan.config.train.only_sinks:
        rows = "the row of the sink token" if plan.num_sinks == 1 else "the rows of the sink tokens"
        return f"AdamW for {plan.num_sinks * plan.model_config.hidden_size:,} parameters: {rows}"
    num_muon = count_muon_parameters(plan.config, plan.model_config)
    if not num_muon:
        return "AdamW"
    return f"Muon for {num_muon:,} parameters, AdamW for {count_parameters(plan.model_config) - num_muon:,}"


def epochs(plan: Plan, windows: Windows) -> str:
    """Return the number of epochs, of each set if ``data.weights`` is set."""
    if isinstance(windows, SetWindows):
        shares = shares_of(plan.config.data.weights or {})
        sets = [
            f"{float(share):.3g} of the samples from {name} "
            f"({_epochs(float(plan.num_samples * share) / windows.num_windows[name])})"
            for name, share in shares.items()
        ]
        return ", ".join(sets)
    return _epochs(plan.num_samples / len(windows))


def _epochs(number: float) -> str:
    return f"{float(f'{number:.3g}'):,.12g} epoch{'s' * (number != 1)}"


def dry_run(config: TrainingConfig) -> None:
    """Print the resolved configuration, sizes, steps and memory, and where the run starts.

    Raises:
        ValueError, OSError: the run could not start, or its folder contains another one.
    """
    store = open_store(config.data.path, verify="size") if config.data.path else None
    resumed = preview_resume(config, store.fingerprint if store else None)
    missing = [missing_float8(config), _not_here(lambda: check_wandb(config))]
    try:
        tokenizer_size = store.tokenizer_size if store else _assumed_tokenizer_size(config, resumed is not None)
        plan = Plan(config, 1, tokenizer_size)
        start = check_start(plan, store.tokenizer_path if store else None) if resumed is None else []
    except UnreachableError as error:
        plan, start = Plan(config, 1, store.tokenizer_size if store else PYTHIA_TOKENIZER_SIZE), []
        missing.append(f"Not on this machine: {error}")
    table = Table(box=box.SIMPLE, show_header=False, title="The run", title_justify="left")
    for name, value in _facts(plan, store, start, resumed).items():
        table.add_row(name, value)

    console = Console(highlight=False)
    console.print(Syntax(config_yaml(config), "yaml", background_color="default"))
    console.print(table)
    console.print(_memory_table(plan))
    note = "Memory is an estimate. It excludes DeepSpeed's communication buffers and the allocator's fragmentation."
    is_float8 = config.train.precision == "fp8"
    console.print(f"{note} That of fp8 is estimated as bf16." if is_float8 else note, style="dim")
    for line in filter(None, missing):
        console.print(line)


def _assumed_tokenizer_size(config: TrainingConfig, is_resumed: bool) -> int:
    """Return the ids of the tokenizer of data that are not set: those of ``model.init_from``."""
    name = None if is_resumed else config.model.init_from
    found = None if name is None else count_tokens(name, config.model.num_sinks)
    return PYTHIA_TOKENIZER_SIZE if found is None else found


def missing_float8(config: TrainingConfig) -> str | None:
    """Return a line if this machine cannot train with the recipe's float8, and None otherwise."""
    return _not_here(lambda: check_precision(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def _not_here(check: Callable[[], object]) -> str | None:
    try:
        check()
    except ValueError as error:
        return f"Not on this machine: {error}"
    return None


def _facts(
    plan: Plan, store: TokenSource | None, start: list[str], resumed: tuple[Path, list[str]] | None
) -> dict[str, str]:
    train = plan.config.train
    num_warmup_steps = round(train.num_steps * plan.config.optimizer.warmup_ratio)
    num_operations = plan.flops_per_token() * plan.num_positions
    facts = {
        "model": describe_model(plan),
        **({"windows": "\n".join(notes)} if (notes := attention_notes(plan)) else {}),
        "batch": f"{_count(plan.samples_per_step, 'sample')} of {train.seq_length:,} positions = "
        f"{train.batch_size_tokens:,}",
        "on one rank": f"{_micro_batches(plan)} of {_count(train.micro_batch_size, 'sample')}{_segments(plan)}",
        "optimizer": describe_optimizer(plan),
        "steps": f"{train.num_steps:,}, including {_count(num_warmup_steps, 'warm-up step')}",
        "total positions": f"{plan.num_positions:,} ({human(plan.num_positions)})",
        "total compute": f"{num_operations:.3g} FLOP",
    }
    tokenizer_path = store.tokenizer_path if store else None
    kept, most = checkpoints_kept(plan.config)
    facts["on disk"] = (
        f"{size_text(checkpoint_bytes(plan, tokenizer_path))} for a checkpoint, "
        f"{size_text(run_bytes(plan, kept, tokenizer_path))} for the {kept:,} that {'is' if kept == 1 else 'are'} "
        f"kept, up to {size_text(run_bytes(plan, most, tokenizer_path))} while saving"
    )
    if start:
        facts["start"] = "\n".join(start)
    saved = saved_values(plan.config)
    facts["run"] = saved["train"]["run_dir"]
    if resumed is not None:
        path, changes = resumed
        whose = "" if plan.config.checkpoint.resume == "auto" else f" of {saved['checkpoint']['resume']}"
        facts["run"] += "\n".join([f", resumes from {path.name}{whose}", *(f"changed: {change}" for change in changes)])
    if store is None:
        is_from_start = plan.tokenizer_size != PYTHIA_TOKENIZER_SIZE
        whose = "the tokenizer of model.init_from," if is_from_start else "Pythia's tokenizer of"
        facts["data"] = f"data.path is not set; assuming {whose} {plan.tokenizer_size:,} ids"
    else:
        windows, _ = open_windows(store, plan)
        facts["data"] = f"{_count(len(windows), 'sample')} in {store.path}, {epochs(plan, windows)}"
    return facts


def _memory_table(plan: Plan) -> Table:
    """Return a table of memory by ZeRO stage and number of GPUs; the recipe's stage is bold."""
    table = Table(box=box.SIMPLE_HEAD, title="Memory per GPU in GiB: weights, gradients and optimizer + activations")
    table.title_justify = "left"
    table.add_column("ZeRO stage")
    for world_size in WORLD_SIZES:
        table.add_column(f"{world_size} GPU{'s' * (world_size > 1)}", justify="right")
    for stage in range(1 if plan.config.train.only_sinks else 4):
        cells = []
        for world_size in WORLD_SIZES:
            memory = estimate_memory(
                plan.config,
                plan.model_config,
                zero_stage=stage,
                world_size=world_size,
                is_compiled=plan.config.train.compile is not False and stage < 3,
            )
            cells.append(f"{memory.states / GIB:.1f} + {memory.activations / GIB:.1f}")
        table.add_row(str(stage), *cells, style="bold" if stage == plan.config.deepspeed.zero_stage else None)
    return table
