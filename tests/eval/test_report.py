from pathlib import Path

import pytest

from sinklm.eval.report import ReportFile, display_name


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/results\.json"):
        ReportFile(tmp_path / "file" / "results.json")


def test_checking_whether_a_file_can_be_written_leaves_no_files(tmp_path: Path) -> None:
    ReportFile(tmp_path / "results" / "model" / "streaming.json")
    assert not list(tmp_path.iterdir())


def test_a_title_names_the_run_only_for_its_checkpoints(tmp_path: Path) -> None:
    for folder, name in (("run/checkpoints/step-20", "run, step-20"), ("examples/checkpoints/vanilla", "vanilla")):
        (tmp_path / folder).mkdir(parents=True)
        assert display_name(tmp_path / folder) == name
    assert display_name("owner/name") == "owner/name"
