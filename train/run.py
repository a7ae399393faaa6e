"""A training run, from the recipe to the last checkpoint (`sinklm train`)."""

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoints.folders import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LOCK_FILE,
    damaged_checkpoints,
    interrupted_checkpoints,
)
from ..checkpoints.warm_start import load_weights
from ..compilers import compile_failure
from ..console import Console
from ..data import open_store
from ..data.store import TokenSource
from ..files import locked, write_json, write_text
from ..models import SinkGPTNeoXForCausalLM
from ..models.cost import count_parameters
from .batches import open_windows
from .config import TrainingConfig
from .determinism import deterministic
from .disk import space_warning
from .engine import check_precision, compiles, make_engine
from .hosts import check_same, check_settings, check_shared, has_other_copy, say_ranks
from .launch import SameOnAllRanks, World, connected
from .loop import TrainingLoop
from .metrics import check_wandb
from .plan import Plan
from .progress import RunProgress
from .ranks import own_rank
from .recipe import config_yaml, load_config
from .resume import Resume, check_run_dir, find_resume
from .start import check_start
from .stopping import exit_status
from .summary import describe_run, dry_run
from .validation import sets_left_out

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

LARGEST_DRAWN_ON_CPU = 1_000_000_000  # parameters
SETUP_SECONDS = 7200.0  # verifying the store, making or loading the weights, converting a checkpoint
RECORDED_PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "numpy", "safetensors")


def train(
    recipe: str,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    only_describe: bool = False,
    trust_checkpoint: bool = False,
) -> None:
    """Train a model, or only describe the run.

    If started by ``deepspeed``, ``torchrun`` or ``srun``, this process is one of several ranks;
    otherwise it is the only one.

    Args:
        recipe: name or path, see `sinklm.train.recipe.load_config`.
        overrides: ``section.key=value``.
        only_describe: print the resolved configuration and its cost without training.
        trust_checkpoint: resume also from a checkpoint without checksums, or whose pickles could
            run code.

    Raises:
        ValueError: a key, a value or the data is invalid, or training diverged.
        OSError: a file cannot be read or written, or (ConnectionError) another rank is lost.
        SystemExit: the run ended early and its state is saved (`stopping.exit_status`); or status 1
            on ranks other than 0 for an error that all ranks share, which rank 0 reports.
    """
    rank, local_rank = own_rank(os.environ)
    try:
        config = load_config(recipe, overrides)
        if trust_checkpoint and config.checkpoint.resume == "never":
            raise ValueError("--trust-checkpoint has no effect with checkpoint.resume=never: leave out one of them")
        if only_describe:
            dry_run(config)
            return
    except (ValueError, OSError):
        if local_rank:
            sys.exit(1)  # the first rank of each host reports it, because the hosts may have different files
        raise
    if rank == 0:
        others = " and connecting to the other ranks" if _is_one_of_several() else ""
        Console().note(f"loading DeepSpeed{others} …")
    try:
        with (
            deterministic(config.train.deterministic),
            connected(
                patches=config.deepspeed.patches, hang_timeout_minutes=config.train.hang_timeout_minutes
            ) as world,
        ):
            code = _train_rank(config, world, trust_checkpoint)
    except SameOnAllRanks:
        if rank == 0:
            raise
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if code:
        sys.exit(exit_status(code))


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) != "1"


@contextmanager
def locked_run(run_dir: Path) -> Iterator[None]:
    """Lock a run's folder, so that no other training writes to it.

    Raises:
        ValueError: another training uses the folder.
        OSError: the folder cannot be written.
    """
    busy = f"train.run_dir={run_dir} is in use by another training: wait until it ends, or set another train.run_dir"
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir / LOCK_FILE, busy))
        except OSError as error:
            raise OSError(f"cannot write to {run_dir}: {error}; set another train.run_dir") from error
        yield


def _train_rank(config: TrainingConfig, world: World, trust_checkpoint: bool) -> int:
    """Train as one rank. Returns why the run ended early (`stopping.stop_reason`), or 0."""
    try:
        with ExitStack() as held:
            with world.longer(SETUP_SECONDS):
                loop = _set_up(config, world, held, trust_checkpoint)
            return loop.run() if loop is not None else 0
    except torch.OutOfMemoryError as error:
        less = "" if config.train.activation_checkpointing else ", set train.activation_checkpointing=true"
        raise ValueError(
            f"rank {world.rank} is out of GPU memory: lower train.micro_batch_size{less}, or raise "
            f"deepspeed.zero_stage with more GPUs or an offloaded optimizer ({error})"
        ) from error
    except Exception as error:
        if (failure := compile_failure(error)) is None:
            raise
        is_needed = torch.cuda.is_available() and "Triton" in failure  # by the loss, without torch.compile too
        remedy = "" if is_needed else "; train.compile=false trains without torch.compile"
        raise ValueError(f"rank {world.rank}: {failure}{remedy}") from error


def _set_up(config: TrainingConfig, world: World, held: ExitStack, trust_checkpoint: bool) -> TrainingLoop | None:
    """Open the data and the run's folder, and make the engine. Returns None if all steps are done.

    Args:
        held: holds the lock of the folder, and the progress output.
    """
    world.mark("comparing the ranks")
    say_ranks(world)
    check_settings(config, world)
    with world.all_or_none():
        check_precision(config, world.device)
        if world.is_main:
            check_wandb(config)
    world.mark("opening the data")
    run_dir = Path(config.train.run_dir or "")
    store = _open_store(config, world)
    with world.all_or_none():
        plan = Plan(config, world.size, store.tokenizer_size, store.eod_id)
        windows, validation_windows = open_windows(store, plan)
    with world.all_or_none():
        if world.is_main:
            check_run_dir(run_dir)
            held.enter_context(locked_run(run_dir))
    check_shared(run_dir, world)
    world.mark("verifying the newest checkpoint")
    resume = find_resume(plan, store.fingerprint, world, is_trusted=trust_checkpoint)
    with world.all_or_none():
        start = check_start(plan, store.tokenizer_path) if resume is None else []
    with world.all_or_none(f"cannot write to {run_dir}: "):
        if world.is_main:
            _write_run_files(run_dir, config)

    progress = held.enter_context(RunProgress(config.train.num_steps, is_silent=not world.is_main))
    for line in describe_run(plan, store, windows, resume):
        progress.say(line)
    for line in start:
        progress.say(f"start: {line}")
    if names := sets_left_out(store, plan):
        progress.say(f"validation.by_set leaves out sets without a held-out sample: {', '.join(names)}")
    for path in interrupted_checkpoints(run_dir):
        progress.say(f"ignoring {path}, which was interrupted; the next save deletes it")
    for path in damaged_checkpoints(run_dir):
        progress.say(f"ignoring {path}, which is damaged; delete it when you do not need it")
    if warning := space_warning(plan, run_dir, store.tokenizer_path):
        progress.say(warning)
    first_step = resume.step if resume else 0
    if first_step >= config.train.num_steps:
        progress.say(
            f"all {config.train.num_steps:,} steps are done: raise train.num_steps to train further, or set another "
            "train.run_dir to train anew"
        )
        return None
    engine = _ready_engine(plan, world, resume, progress)
    return TrainingLoop(engine, plan, world, store, windows, validation_windows, progress, first_step=first_step)


def _ready_engine(plan: Plan, world: World, resume: Resume | None, progress: RunProgress) -> "DeepSpeedEngine":
    """Make the engine in the state from which training starts."""
    config = plan.config
    if resume is None:
        progress.say(f"{'drawing' if config.model.init_from is None else 'reading'} the initial weights …")
    world.mark("making the model")
    with world.all_or_none():
        reads_initial = resume is None or resume.needs_initial_weights
        model = _build_model(plan, world.device, config.model.init_from if reads_initial else None)
    progress.say("setting up DeepSpeed …")
    world.mark("setting up DeepSpeed")
    is_converted = resume is not None and resume.is_converted
    engine = make_engine(model, plan, world.device, load_universal=is_converted)
    if resume is not None:
        if is_converted:
            progress.say(f"converting the checkpoint, which differs in {', '.join(resume.mismatches)} …")
        world.mark(f"loading {resume.path}")
        resume.restore(engine, plan, world, scratch=Path(config.train.run_dir or ""))
    if world.device.type == "cpu" and config.train.precision == "bf16":
        progress.say("hint: on most CPUs train.precision=fp32 is about three times as fast as bf16")
    if compiles(config, world.device):
        progress.say("compiling the model in the first step: one or two minutes, less if it is in the compile cache …")
    return engine


def _say_reading(num_bytes: int) -> None:
    print(f"reading {num_bytes / 1e6:,.1f} MB of data.path to verify checksums, which is done once …", flush=True)


def _open_store(config: TrainingConfig, world: World) -> TokenSource:
    """Open the data. Rank 0 verifies its content, and so does one rank of each host with a copy."""
    with world.all_or_none():
        if config.data.path is None:
            raise ValueError(
                "data.path is not set: set it to a folder made by `sinklm prepare`, e.g. data.path=stores/pile"
            )
        store = open_store(config.data.path, verify="auto" if world.is_main else "size", on_read=_say_reading)
    fingerprint = {"the fingerprint of data.path": store.fingerprint[:12]}
    check_same(world, fingerprint, "copy the store of rank 0 to all hosts, or share it")
    is_other_copy = has_other_copy(store.path, world)
    with world.all_or_none():
        if is_other_copy:
            open_store(config.data.path, verify="auto")
    return store


def _build_model(plan: Plan, device: torch.device, init_from: str | None) -> SinkGPTNeoXForCausalLM:
    """Create the model in float32 with the weights of another one, or random ones."""
    torch.manual_seed(plan.config.train.seed)
    if init_from is not None:
        return load_weights(init_from, plan.model_config)
    with _drawing_device(count_parameters(plan.model_config), device):
        return SinkGPTNeoXForCausalLM(plan.model_config)


def _drawing_device(num_parameters: int, device: torch.device) -> torch.device:
    """Return the device on which to draw the initial weights.

    On the CPU, a seed gives the same weights for all devices. But a billion parameters take ten
    seconds, and every rank needs memory for them, so larger models are drawn on the GPU if they fit
    there in float32, before ZeRO casts and partitions them.
    """
    if device.type == "cpu" or num_parameters < LARGEST_DRAWN_ON_CPU:
        return torch.device("cpu")
    can_hold = 4 * num_parameters < 0.75 * torch.cuda.get_device_properties(device).total_memory
    return device if can_hold else torch.device("cpu")


def _write_run_files(run_dir: Path, config: TrainingConfig) -> None:
    write_text(run_dir / CONFIG_FILE, config_yaml(config))
    environment = {
        "python": platform.python_version(),
        "sinklm": {"version": importlib.metadata.version("sinklm"), "commit": _commit()},
        **{name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or platform.processor(),
    }
    write_json(run_dir / ENVIRONMENT_FILE, environment)


def _commit() -> str | None:
    """Return the commit of the code if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
