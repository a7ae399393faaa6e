from pathlib import Path

import pytest

from sinklm.checkpoints import load_model
from sinklm.checkpoints.folders import CheckpointState
from sinklm.eval.report import ReportFile, describe_model, display_name

from ..checkpoints.seal import seal
from .checkpoints import small_model, write_checkpoint


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/results\.json"):
        ReportFile(tmp_path / "file" / "results.json")


def test_checking_whether_a_file_can_be_written_leaves_no_files(tmp_path: Path) -> None:
    ReportFile(tmp_path / "results" / "model" / "streaming.json")
    assert not list(tmp_path.iterdir())


def test_a_report_names_the_checkpoint_that_was_loaded(tmp_path: Path) -> None:
    """Training may save another one during an evaluation."""
    folders = [tmp_path / "checkpoints" / f"step-{step}" for step in (4, 8)]
    for folder in folders:
        write_checkpoint(folder / "model", small_model(0))
        state = CheckpointState(4, 400, data_fingerprint="", world_size=1, zero_stage=1, precision="fp32")
        (folder / "state.json").write_text(state.to_json())
        seal(folder)
        if folder == folders[0]:
            model = load_model(tmp_path)
    assert describe_model(model, tmp_path)["folder"] == str(folders[0] / "model")


def test_a_title_names_the_run_only_for_its_checkpoints(tmp_path: Path) -> None:
    for folder, name in (("run/checkpoints/step-20", "run, step-20"), ("examples/checkpoints/vanilla", "vanilla")):
        (tmp_path / folder).mkdir(parents=True)
        assert display_name(tmp_path / folder) == name
    assert display_name("owner/name") == "owner/name"
