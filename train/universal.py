"""DeepSpeed's universal checkpoints, for other ranks, ZeRO stages, precisions or parameter orders.

``ds_to_universal`` converts a ZeRO checkpoint to a rank-independent layout: one folder per
parameter with its float32 value and AdamW's moments. This module adds what DeepSpeed 0.19 does not
support: converting and loading stage 0, conversion between stage 3 and stages 1 or 2, whose
metadata differ, and Muon's matrices, which have one moment.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CONVERTER = f"{__package__}.converter"
PARAM = "param"  # the key of a tensor in the format's files
MOMENTS = ("exp_avg", "exp_avg_sq")
# Metadata file of the engine, by whether it partitions the weights (stage 3).
METADATA_NAMES = {False: "mp_rank_00_model_states.pt", True: "zero_pp_rank_0_mp_rank_00_model_states.pt"}


def convert_to_universal(
    source: Path, output: Path, *, zero_stage: int, keep_loss_scale: bool, muon: list[str]
) -> None:
    """Convert DeepSpeed's files in ``source`` into the folder ``output``.

    Args:
        zero_stage: stage with which ``source`` was written.
        keep_loss_scale: set to False if the precision changes; only float16 has a loss scale.
        muon: names of the parameters that Muon updates, which have no second moment.

    Raises:
        OSError: the conversion failed; the message contains the reason.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    if zero_stage == 0:
        _write_parameters(source, output)
    else:
        _run_converter(source, output)
        for name in muon:
            (output / "zero" / name / f"{MOMENTS[1]}.pt").unlink()  # see `add_second_moments`
    _complete_metadata(output, source, zero_stage=zero_stage, keep_loss_scale=keep_loss_scale)


def load_without_zero(engine: "DeepSpeedEngine", universal: Path) -> None:
    """Load weights and optimizer state of a universal checkpoint into an engine without ZeRO."""
    optimizer = engine.basic_optimizer
    for name, parameter in engine.module.named_parameters():
        folder = universal / "zero" / name
        with torch.no_grad():
            parameter.copy_(_load(folder / "fp32.pt")[PARAM].view_as(parameter))
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        for path in (folder / f"{key}.pt" for key in MOMENTS):
            if path.exists():
                state[path.stem] = _load(path)[PARAM].view_as(parameter).to(parameter)
        state["step"] = torch.as_tensor(_load(folder / "step.pt"), dtype=torch.float32, device=parameter.device)


def _load(path: Path):
    return torch.load(path, map_location="cpu", weights_only=False)


def _write_parameters(source: Path, output: Path) -> None:
    """Write the parameter folders of a checkpoint without ZeRO, which is a single file."""
    checkpoint = _load(source / METADATA_NAMES[False])
    states = checkpoint["optimizer"]["state"]
    trained = checkpoint["optimizer_parameter_names"]
    for name in [*trained, *(name for name in checkpoint["module"] if name not in trained)]:
        folder = output / "zero" / name
        folder.mkdir(parents=True)
        torch.save({PARAM: checkpoint["module"][name].float()}, folder / "fp32.pt")
    for number, name in enumerate(trained):
        folder = output / "zero" / name
        for key in states[number].keys() & set(MOMENTS):
            torch.save({PARAM: states[number][key]}, folder / f"{key}.pt")
    groups = checkpoint["optimizer"]["param_groups"]
    torch.save({"param_groups": groups, "ds_version": checkpoint["ds_version"]}, output / "zero" / "optimizer_state.pt")
    shutil.copy(source / METADATA_NAMES[False], output)


def add_second_moments(state: dict[str, Any]) -> None:
    """Let the first moment of Muon's parameters also stand for the second, which they do not have.

    DeepSpeed's converter requires both; `convert_to_universal` then deletes the second. The state
    of AdamW is not changed, so the converter still fails if a moment is missing there.

    Args:
        state: of the optimizer, from `torch.optim.Optimizer.state_dict`.
    """
    for group in state["param_groups"]:
        if group.get("is_muon"):
            for number in group["params"]:
                state["state"][number][MOMENTS[1]] = state["state"][number][MOMENTS[0]]


def _run_converter(source: Path, output: Path) -> None:
    """Run DeepSpeed's converter in a separate process, because it prints and forks workers."""
    command = [sys.executable, "-m", CONVERTER, "--input_folder", str(source), "--output_folder", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"DeepSpeed could not convert {source} to its universal format: {reason}")
    (output.parent / "latest_universal").unlink(missing_ok=True)


def _complete_metadata(output: Path, source: Path, *, zero_stage: int, keep_loss_scale: bool) -> None:
    """Complete the metadata, so that the folder can be loaded with every stage."""
    path = output / "zero" / "optimizer_state.pt"
    state = _load(path)
    if zero_stage == 3:
        step = state["optimizer_state_dict"]["state"][0]["step"]
        state["ds_version"] = _load(output / METADATA_NAMES[True])["ds_version"]
        for tensor_path in (output / "zero").glob("*/*.pt"):  # bare tensors; other stages write dictionaries
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
    """Return AdamW's step count."""
    if zero_stage == 0:
        return _load(source / METADATA_NAMES[False])["optimizer"]["state"][0]["step"]
    return _load(next((output / "zero").glob("*/step.pt")))
