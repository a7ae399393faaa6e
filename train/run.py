"""A training run from recipe to last checkpoint: what `sinklm train` does."""

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..checkpoints.folders import CONFIG_FILE, ENVIRONMENT_FILE, interrupted_checkpoints
from ..checkpoints.warm_start import check_tokenizer, load_weights
from ..data import TokenWindows, open_store
from ..data.store import TokenSource
from ..files import locked, write_json
from ..models import SinkGPTNeoXForCausalLM
from ..models.cost import count_parameters
from .batches import open_windows
from .config import TrainingConfig
from .launch import SameOnAllRanks, World, connected
from .plan import Plan
from .progress import RunProgress
from .recipe import config_yaml, load_config
from .summary import describe_run, dry_run

LARGEST_DRAWN_ON_CPU = 1_000_000_000  # parameters
LOCK_NAME = "lock"
RECORDED_PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "numpy", "safetensors")


def train(recipe: str, overrides: list[str] | tuple[str, ...] = (), *, only_describe: bool = False) -> None:
    """Train a model, or describe what that would be.

    Started by ``deepspeed``, ``torchrun`` or ``srun`` it is one rank of many, else the only one.

    Args:
        recipe: name or path, see `sinklm.train.recipe.load_config`.
        overrides: ``section.key=value``.
        only_describe: print the resolved configuration and its cost, and do nothing.

    Raises:
        ValueError: a key, a value or the data is wrong, or training diverged.
        OSError: a file cannot be read or written, or (ConnectionError) another rank is lost.
        SystemExit: with status 128 + n if signal n ended the run early, its state saved; with 1 on the ranks that leave
            it to rank 0 to report an error they share.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    try:
        config = load_config(recipe, overrides)
        if only_describe:
            dry_run(config)
            return
    except (ValueError, OSError):
        if rank:
            sys.exit(1)
        raise
    if rank == 0:
        print("loading DeepSpeed and looking for the other ranks …", flush=True)
    with connected(patches=config.deepspeed.patches) as world:
        try:
            signal_number = _train_rank(config, world)
        except SameOnAllRanks:
            if world.is_main:
                raise
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except torch.OutOfMemoryError as error:
            less = "" if config.train.activation_checkpointing else ", set train.activation_checkpointing=true"
            raise ValueError(
                f"rank {world.rank} is out of GPU memory: lower train.micro_batch_size{less}, or raise "
                f"deepspeed.zero_stage with more GPUs or an offloaded optimizer ({error})"
            ) from error
    if signal_number:
        sys.exit(128 + signal_number)


@contextmanager
def locked_run(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder: each would take the other's files for its own.

    Raises:
        ValueError: another training uses it.
        OSError: it cannot be written.
    """
    busy = f"train.run_dir={run_dir} is in use by another training: wait, or set another"
    with ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir / LOCK_NAME, busy))
        except OSError as error:
            raise OSError(f"cannot write in {run_dir}: {error}") from error
        yield


def _train_rank(config: TrainingConfig, world: World) -> int:
    """One rank's part. Returns the number of the signal that ended it early, or 0."""
    run_dir = Path(config.train.run_dir or "")
    with world.all_or_none():
        store = _open_store(config, world)
        plan = Plan(config, world.size, store.tokenizer_size, store.eod_id)
        windows = open_windows(store, plan)
    with ExitStack() as held:
        with world.all_or_none():
            if world.is_main:
                held.enter_context(locked_run(run_dir))
        return _train_locked(run_dir, plan, world, store, *windows)


def _train_locked(
    run_dir: Path,
    plan: Plan,
    world: World,
    store: TokenSource,
    windows: TokenWindows,
    validation_windows: TokenWindows | None,
) -> int:
    from .engine import compiles, make_engine
    from .loop import TrainingLoop
    from .resume import find_resume

    config = plan.config
    with world.all_or_none():
        resume = find_resume(plan, store.fingerprint)
        if resume is None and config.model.init_from is not None:
            check_tokenizer(config.model.init_from, store.tokenizer_path)
    with world.all_or_none(f"cannot write in {run_dir}: "):
        if world.is_main:
            _write_run_files(run_dir, config)

    with RunProgress(config.train.num_steps, is_silent=not world.is_main) as progress:
        for line in describe_run(plan, store, windows, resume):
            progress.say(line)
        for path in interrupted_checkpoints(run_dir):
            progress.say(f"{path} was interrupted while it was written, and is not used")
        first_step = resume.step if resume else 0
        if first_step >= config.train.num_steps:
            progress.say(f"all {config.train.num_steps:,} steps are done: raise train.num_steps to go on")
            return 0
        progress.say(f"{'drawing' if config.model.init_from is None else 'reading'} the first weights …")
        with world.all_or_none():
            model = _build_model(plan, world.device)
        progress.say("setting up DeepSpeed …")
        is_converted = resume is not None and resume.is_converted
        engine = make_engine(model, plan, world.device, load_universal=is_converted)
        if resume is not None:
            if is_converted:
                progress.say(f"converting the checkpoint, which differs in {', '.join(resume.mismatches)} …")
            resume.restore(engine, plan, world, scratch=run_dir)
        if world.device.type == "cpu" and config.train.precision == "bf16":
            progress.say("hint: on most CPUs train.precision=fp32 is about three times as fast as bf16")
        if compiles(config, world.device):
            progress.say(
                "compiling the model in the first step: a minute or two, less if it was compiled here before …"
            )
        loop = TrainingLoop(engine, plan, world, store, windows, validation_windows, progress, first_step=first_step)
        signal_number = loop.run()
        _say_goodbye(progress, run_dir, signal_number)
    return signal_number


def _open_store(config: TrainingConfig, world: World) -> TokenSource:
    """Open the data; rank 0 alone checks its content."""
    if config.data.path is None:
        raise ValueError("data.path is not set: give a folder made by `sinklm prepare`, e.g. data.path=stores/pile")
    if world.is_main:
        print(f"opening {config.data.path} (the first time here all of it is read, for its checksums) …", flush=True)
    return open_store(config.data.path, verify="auto" if world.is_main else "size")


def _build_model(plan: Plan, device: torch.device) -> SinkGPTNeoXForCausalLM:
    """The model in float32, with the first weights of the seed."""
    torch.manual_seed(plan.config.train.seed)
    if plan.config.model.init_from is not None:
        return load_weights(plan.config.model.init_from, plan.model_config)
    with _drawing_device(count_parameters(plan.model_config), device):
        return SinkGPTNeoXForCausalLM(plan.model_config)


def _drawing_device(num_parameters: int, device: torch.device) -> torch.device:
    """Where to draw the first weights.

    On the CPU a seed gives the same ones whatever the devices are. But it takes ten seconds for a billion, and that
    memory for every rank: larger models are drawn on the GPU, if it can hold them before ZeRO lowers and shares them.
    """
    if device.type == "cpu" or num_parameters < LARGEST_DRAWN_ON_CPU:
        return torch.device("cpu")
    can_hold = 4 * num_parameters < 0.75 * torch.cuda.get_device_properties(device).total_memory
    return device if can_hold else torch.device("cpu")


def _write_run_files(run_dir: Path, config: TrainingConfig) -> None:
    (run_dir / CONFIG_FILE).write_text(config_yaml(config), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "sinklm": {"version": importlib.metadata.version("sinklm"), "commit": _commit()},
        **{name: importlib.metadata.version(name) for name in RECORDED_PACKAGES},
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or platform.processor(),
    }
    write_json(run_dir / ENVIRONMENT_FILE, environment)


def _commit() -> str | None:
    """The commit of the code, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _say_goodbye(progress: RunProgress, run_dir: Path, signal_number: int) -> None:
    if signal_number:
        name = signal.Signals(signal_number).name
        progress.say(f"stopped by {name}, with all saved: start the same command again to go on")
    else:
        progress.say(f"done: {run_dir}")
