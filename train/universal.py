"""Checkpoints between numbers of ranks, ZeRO stages, precisions and orders of parameters: DeepSpeed's universal format.

``ds_to_universal`` un-welds a ZeRO checkpoint from the ranks that wrote it: one folder per parameter with its float32
value and AdamW's moments. What DeepSpeed 0.19 leaves open is closed here: it cannot convert or load stage 0, nor load
what came from stage 3 into 1 or 2 and the other way round, because their metadata differ.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

PARAM = "param"  # the key of a tensor in the format's files
MOMENTS = ("exp_avg", "exp_avg_sq")
# Where the engine looks for metadata, by whether it splits the weights (stage 3).
METADATA_NAMES = {False: "mp_rank_00_model_states.pt", True: "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def convert_to_universal(source: Path, output: Path, *, zero_stage: int, keep_loss_scale: bool) -> None:
    """Convert DeepSpeed's files in ``source``, written under ``zero_stage``, into the folder ``output``.

    Args:
        keep_loss_scale: False if the precision changes, for the scale belongs to float16 alone.

    Raises:
        OSError: the conversion failed; says how.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    if zero_stage == 0:
        _write_parameters(source, output)
    else:
        _run_converter(source, output)
    _complete_metadata(output, source, zero_stage=zero_stage, keep_loss_scale=keep_loss_scale)


def load_without_zero(engine: "DeepSpeedEngine", universal: Path) -> None:
    """Load weights and AdamW's state of a universal checkpoint into an engine of ZeRO stage 0."""
    optimizer = engine.basic_optimizer
    for name, parameter in engine.module.named_parameters():
        folder = universal / "zero" / name
        with torch.no_grad():
            parameter.copy_(_load(folder / "fp32.pt")[PARAM].view_as(parameter))
        state = optimizer.state[parameter]
        for key in MOMENTS:
            state[key] = _load(folder / f"{key}.pt")[PARAM].view_as(parameter).to(parameter)
        state["step"] = torch.as_tensor(_load(folder / "step.pt"), dtype=torch.float32, device=parameter.device)


def _load(path: Path):
    return torch.load(path, map_location="cpu", weights_only=False)


def _write_parameters(source: Path, output: Path) -> None:
    """The parameter folders of a checkpoint without ZeRO, where one file has everything."""
    checkpoint = _load(source / METADATA_NAMES[False])
    states = checkpoint["optimizer"]["state"]
    for number, name in enumerate(checkpoint["optimizer_parameter_names"]):
        folder = output / "zero" / name
        folder.mkdir(parents=True)
        torch.save({PARAM: checkpoint["module"][name].float()}, folder / "fp32.pt")
        for key in MOMENTS:
            torch.save({PARAM: states[number][key]}, folder / f"{key}.pt")
    groups = checkpoint["optimizer"]["param_groups"]
    torch.save({"param_groups": groups, "ds_version": checkpoint["ds_version"]}, output / "zero" / "optimizer_state.pt")
    shutil.copy(source / METADATA_NAMES[False], output)


def _run_converter(source: Path, output: Path) -> None:
    """Run DeepSpeed's converter, in a process of its own: it prints, and forks workers."""
    module = "deepspeed.checkpoint.ds_to_universal"
    command = [sys.executable, "-m", module, "--input_folder", str(source), "--output_folder", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"DeepSpeed could not convert {source} to its universal format: {reason}")
    (output.parent / "latest_universal").unlink(missing_ok=True)


def _complete_metadata(output: Path, source: Path, *, zero_stage: int, keep_loss_scale: bool) -> None:
    """Make the folder loadable under every stage."""
    path = output / "zero" / "optimizer_state.pt"
    state = _load(path)
    if zero_stage == 3:
        step = state["optimizer_state_dict"]["state"][0]["step"]
        state["ds_version"] = _load(output / METADATA_NAMES[True])["ds_version"]
        for tensor_path in (output / "zero").glob("*/*.pt"):  # bare tensors, where other stages write dictionaries
            torch.save({PARAM: _load(tensor_path)}, tensor_path)
    else:
        step = _find_step(output, source, zero_stage)
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    if not keep_loss_scale:
        state.pop("loss_scaler", None)
        state.pop("dynamic_loss_scale", None)
    torch.save(state, path)
    for folder in (output / "zero").iterdir():
        if folder.is_dir() and not (folder / "step.pt").exists():
            torch.save(step, folder / "step.pt")
    existing, missing = METADATA_NAMES[zero_stage == 3], METADATA_NAMES[zero_stage != 3]
    shutil.copy(output / existing, output / missing)


def _find_step(output: Path, source: Path, zero_stage: int) -> torch.Tensor:
    """AdamW's own count of updates."""
    if zero_stage == 0:
        return _load(source / METADATA_NAMES[False])["optimizer"]["state"][0]["step"]
    return _load(next((output / "zero").glob("*/step.pt")))
