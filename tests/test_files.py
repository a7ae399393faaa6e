"""Files are written atomically, and a folder has one writer."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinklm import files

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")


def test_a_text_has_no_byte_order_mark_and_keeps_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufefféa\r\nb\n".encode())
    assert files.read_text(path, "pass a text file") == "éa\r\nb\n"


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("bok.txt", b"", FileNotFoundError, r"cannot be read: No such file or directory; did you mean .*/book\.txt\?"),
        ("other", b"", FileNotFoundError, "cannot be read: No such file or directory; pass a text file"),
        ("", b"", IsADirectoryError, "cannot be read: Is a directory; pass a text file"),
        ("a" * 300, b"", OSError, "cannot be read: File name too long; pass a text file"),
        ("book.txt", b"ab\xff", ValueError, r"is not UTF-8 \(invalid start byte at byte 2\): convert it to UTF-8"),
        ("book.txt", b"a\0", ValueError, "contains NUL bytes, so it is not a text file: pass a text file"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_with_its_option(tmp_path, name, content, error, message) -> None:
    (tmp_path / "book.txt").write_bytes(content)
    path = tmp_path / name
    with pytest.raises(error, match=f"^--text {path} {message}$"):
        files.read_text(path, "pass a text file", option="--text")


@needs_full_disk
def test_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    files.write_json(path, {"perplexity": 18.0})
    before = path.read_bytes()
    (tmp_path / ".results.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"^cannot write {path}: No space left on device$") as caught:
        files.write_json(path, {"perplexity": 19.0})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/results\.json"):
        files.write_json(tmp_path / "file" / "results.json", {})


def test_a_link_is_written_through_and_files_with_similar_names_stay(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    others = [tmp_path / "link.partial", tmp_path / "folder" / "target.partial"]
    for other in others:
        other.write_text("mine")
    for text in ("new file", "replaced"):
        files.write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [other.read_text() for other in others] == ["mine"] * 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_older_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with files.atomic_file(path, binary=True) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_keeps_other_processes_out_and_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"from sinklm.files import locked; from pathlib import Path\nwith locked(Path({str(path)!r}), 'busy'): pass"
    with files.locked(path, "busy"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.stderr.strip().endswith("ValueError: busy")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_system_without_locks_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.locked(tmp_path / "lock", "busy"):
        pass


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_not_new_and_a_link_names_its_target(tmp_path: Path, kind: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, target in (("dangling", "missing"), ("to-empty", "empty"), ("to-full", "full"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    for name in ("full", "full/file", "to-full", "loop"):
        with pytest.raises(FileExistsError, match=rf"{name} exists: choose another output {kind}, or delete it"):
            files.check_new(tmp_path / name, kind)
    assert files.check_new(tmp_path / "dangling", kind) == tmp_path / "missing"
    if kind == "folder":
        assert files.check_new(tmp_path / "to-empty", kind) == tmp_path / "empty"
    with pytest.raises(OSError, match=r"cannot write .*: Not a directory"):
        files.check_new(tmp_path / "full" / "file" / "below", kind)
