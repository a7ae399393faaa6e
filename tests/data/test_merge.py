import errno
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.data import TokenStore, find_inputs, prepare_store
from sinklm.data.merge import merge_stores

from .corpora import content, records, write_json_lines
from .processes import InProcessPool


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    # The second file has one document, so it has no file in one of the splits.
    counts = (30, 1, 25)
    return [write_json_lines(tmp_path / f"{i}.jsonl.zst", records(i, count)) for i, count in enumerate(counts)]


def prepare(inputs: list[Path], output: Path, tokenizer_file: Path, **settings: object) -> Path:
    shards = find_inputs([str(path) for path in inputs]).shards
    prepare_store(shards, output, tokenizer=tokenizer_file, **{"validation_fraction": 0.3, **settings})
    return output


@pytest.mark.parametrize("split_sets", [False, True])
def test_merged_stores_are_the_store_of_one_preparation(
    inputs: list[Path], tmp_path: Path, tokenizer_file: Path, split_sets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(inputs, tmp_path / "whole", tokenizer_file, split_sets=split_sets)
    parts = [prepare([path], tmp_path / path.name[0], tokenizer_file, split_sets=split_sets) for path in inputs]
    numbers = {path.stat().st_ino for part in parts for path in part.rglob("*.bin")}
    (parts[1] / "mine.txt").touch()
    merge_stores(parts[:2], tmp_path / "two")
    manifest = merge_stores([tmp_path / "two", parts[2]], tmp_path / "merged")
    assert content(tmp_path / "merged") == content(whole)
    assert manifest == TokenStore(whole).manifest
    assert manifest.fingerprint == TokenStore(whole).fingerprint
    # Nothing was copied, nothing is left, and nothing has to be read again.
    assert {path.stat().st_ino for path in (tmp_path / "merged").rglob("*.bin")} == numbers
    assert [part.exists() for part in (*parts, tmp_path / "two")] == [False, True, False, False]
    assert [path.name for path in parts[1].iterdir()] == ["mine.txt"]
    monkeypatch.setattr("sinklm.data.store.sha256_of_all", lambda paths: [pytest.fail(str(path)) for path in paths])
    TokenStore(tmp_path / "merged")
    monkeypatch.undo()
    TokenStore(tmp_path / "merged", verify="sha256")


def test_after_an_interruption_the_same_call_completes_it(
    inputs: list[Path], tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(prepare(inputs, tmp_path / "whole", tokenizer_file))
    parts = [prepare([path], tmp_path / path.name[0], tokenizer_file) for path in inputs]
    link, left = os.link, [3]

    def few_links(*paths: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        link(*paths)

    monkeypatch.setattr(os, "link", few_links)
    with pytest.raises(KeyboardInterrupt):
        merge_stores(parts, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="not a token store"):
        TokenStore(tmp_path / "merged")
    monkeypatch.setattr(os, "link", link)
    merge_stores(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == whole


def test_stores_that_do_not_belong_together_are_refused(
    inputs: list[Path], tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = prepare(inputs[:1], tmp_path / "a", tokenizer_file)
    same = prepare(inputs[:1], tmp_path / "same", tokenizer_file)
    other = prepare(inputs[1:], tmp_path / "other", tokenizer_file, validation_fraction=0.2)
    b = prepare(inputs[2:], tmp_path / "b", tokenizer_file)
    output = tmp_path / "merged"
    with pytest.raises(ValueError, match=r"same/train/00000\.bin: has the same tokens as .*a/train/00000\.bin"):
        merge_stores([a, same], output)
    with pytest.raises(ValueError, match=r"a: is named 2 times, so its documents would be repeated"):
        merge_stores([a, a], output)
    with pytest.raises(ValueError, match=r"other: was prepared with other settings than .*\(validation_fraction: 0\.2"):
        merge_stores([a, other], output)
    with pytest.raises(ValueError, match=r"b: is not empty; choose another folder"):
        merge_stores([a], b)
    assert not output.exists()

    def no_link(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_link)
        with pytest.raises(OSError, match=r"cannot be a hard link to .* must be on one file system"):
            merge_stores([a, b], output)
    (b / "train/00000.bin").write_bytes((b / "train/00000.bin").read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"b/train/00000\.bin: checksum differs"):
        merge_stores([a, b], output)


def test_the_command_prints_the_merged_store(inputs: list[Path], tmp_path: Path, tokenizer_file: Path) -> None:
    parts = [str(prepare([path], tmp_path / path.name[0], tokenizer_file)) for path in inputs]
    result = CliRunner().invoke(app, ["data", "merge", str(tmp_path / "merged"), *parts], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"fingerprint {TokenStore(tmp_path / 'merged').fingerprint}" in result.output.replace("\n", "")
