from pathlib import Path

import pytest

from sinklm.eval.report import ReportFile, write_json


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_leaves_the_older_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"perplexity": 18.0})
    before = path.read_bytes()
    (tmp_path / ".results.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{path} cannot be written: No space left on device"):
        write_json(path, {"perplexity": 19.0})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/results\.json cannot be written"):
        write_json(tmp_path / "file" / "results.json", {})
    with pytest.raises(OSError, match=r"file/results\.json cannot be written"):
        ReportFile(tmp_path / "file" / "results.json")


def test_to_ask_whether_a_file_can_be_written_leaves_no_trace(tmp_path: Path) -> None:
    ReportFile(tmp_path / "results" / "model" / "streaming.json")
    assert not list(tmp_path.iterdir())
