import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sinklm.cli.main import app
from sinklm.data import TokenStore, find_inputs, prepare_store
from sinklm.data.merge import _renumbered, merge_stores
from sinklm.files import locked

from .corpora import content, records, write_json_lines
from .processes import InProcessPool


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    # The second file has one document, so it has no file in one of the splits.
    counts = (30, 1, 25)
    texts = [records(i, count, set_names=("A", "Ä")) for i, count in enumerate(counts)]
    return [write_json_lines(tmp_path / f"{i}.jsonl.zst", rows) for i, rows in enumerate(texts)]


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
    before = [content(part) for part in parts]
    numbers = {path.stat().st_ino for part in parts for path in part.rglob("*.bin")}
    merge_stores(parts[:2], tmp_path / "new" / "two")
    manifest = merge_stores([tmp_path / "new" / "two", parts[2]], tmp_path / "merged")
    assert content(tmp_path / "merged") == content(whole)
    assert manifest == TokenStore(whole).manifest
    assert manifest.fingerprint == TokenStore(whole).fingerprint
    # Nothing was copied, the sources are unchanged, and nothing has to be read again.
    assert {path.stat().st_ino for path in (tmp_path / "merged").rglob("*.bin")} == numbers
    assert [content(part) for part in parts] == before
    monkeypatch.setattr("sinklm.data.store.sha256_of_all", lambda paths: [pytest.fail(str(path)) for path in paths])
    TokenStore(tmp_path / "merged")
    monkeypatch.undo()
    for part in (*parts, tmp_path / "new" / "two"):
        shutil.rmtree(part)
    assert content(tmp_path / "merged") == content(whole)
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
    with pytest.raises(ValueError, match=r"merged: contains train/00000\S+, which is not part of an unfinished merge"):
        merge_stores(parts[1:], tmp_path / "merged")
    merge_stores(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == whole
    assert merge_stores(parts, tmp_path / "merged") == TokenStore(tmp_path / "merged").manifest  # it is done
    assert content(tmp_path / "merged") == whole
    with pytest.raises(ValueError, match="merged: exists already"):
        merge_stores(parts[1:], tmp_path / "merged")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_first_store_with_one_split_changes_nothing(
    inputs: list[Path], tmp_path: Path, tokenizer_file: Path, first: int
) -> None:
    fraction = {"validation_fraction": 0.9}  # the one document of the second file is in the validation split
    ordered = [inputs[first], *inputs[:first], *inputs[first + 1 :]]
    whole = content(prepare(ordered, tmp_path / "whole", tokenizer_file, **fraction))
    parts = [prepare([path], tmp_path / path.name[0], tokenizer_file, **fraction) for path in ordered]
    assert list(TokenStore(tmp_path / "1").manifest.splits) == ["validation"]
    merge_stores(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == whole


def test_of_a_store_of_an_older_version_the_counts_by_shard_are_not_known(
    inputs: list[Path], tmp_path: Path, tokenizer_file: Path
) -> None:
    parts = [prepare([path], tmp_path / path.name[0], tokenizer_file) for path in inputs]
    manifest = json.loads((parts[1] / "manifest.json").read_bytes())
    for split in manifest["splits"].values():
        del split["shard_sets"]
    (parts[1] / "manifest.json").write_text(json.dumps(manifest))
    merged = merge_stores(parts, tmp_path / "merged")
    whole = TokenStore(prepare(inputs, tmp_path / "whole", tokenizer_file))
    assert not any(split.shard_sets for split in merged.splits.values())
    assert merged.fingerprint == whole.fingerprint
    for name, split in whole.manifest.splits.items():
        assert (merged.splits[name].total, merged.splits[name].sets) == (split.total, split.sets)
        tokens, expected = TokenStore(tmp_path / "merged").split(name), whole.split(name)
        assert (tokens.read(0, len(tokens)) == expected.read(0, len(expected))).all()


def test_shards_are_numbered_up_to_five_digits() -> None:
    assert _renumbered("train/00003.A.bin", 99_996) == "train/99999.A.bin"
    for name, offset in (("train/00003.A.bin", 99_997), ("train/other.bin", 1)):
        with pytest.raises(ValueError, match=r"not the name of a shard, or more than 100,000 shards in all"):
            _renumbered(name, offset)


@pytest.mark.parametrize("linked", ["store", "shards"])
def test_symbolic_links_are_followed(inputs: list[Path], tmp_path: Path, tokenizer_file: Path, linked: str) -> None:
    whole = content(prepare(inputs[::2], tmp_path / "whole", tokenizer_file))
    parts = [prepare([path], tmp_path / path.name[0], tokenizer_file) for path in inputs[::2]]
    if linked == "store":
        (tmp_path / "link").symlink_to(parts[0])
        parts[0] = tmp_path / "link"
    else:
        for path in [*parts[0].rglob("*.bin"), *parts[0].rglob("*.idx")]:
            path.rename(tmp_path / f"{path.parent.name}-{path.name}")
            path.symlink_to(tmp_path / f"{path.parent.name}-{path.name}")
    merge_stores(parts, tmp_path / "merged")
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))
    for path in tmp_path.glob("*-0*"):
        path.unlink()
    for part in parts:
        shutil.rmtree(part.resolve())
    assert content(tmp_path / "merged") == whole


def test_two_merges_at_once_are_refused(inputs: list[Path], tmp_path: Path, tokenizer_file: Path) -> None:
    parts = [prepare([path], tmp_path / path.name[0], tokenizer_file) for path in inputs]
    (tmp_path / "merged").mkdir()
    with locked(tmp_path / "merged/.merge.lock", busy=""), pytest.raises(ValueError, match="another `sinklm data mer"):
        merge_stores(parts, tmp_path / "merged")
    merge_stores(parts, tmp_path / "merged")
    assert not (tmp_path / "merged/.merge.lock").exists()


def test_stores_that_do_not_belong_together_are_refused(
    inputs: list[Path], tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = prepare(inputs[:1], tmp_path / "a", tokenizer_file)
    same = prepare(inputs[:1], tmp_path / "same", tokenizer_file)
    other = prepare(inputs[1:], tmp_path / "other", tokenizer_file, validation_fraction=0.2)
    b = prepare(inputs[2:], tmp_path / "b", tokenizer_file)
    output = tmp_path / "merged"
    (tmp_path / "link").symlink_to(a)
    for again in (same, a, tmp_path / "link"):
        with pytest.raises(ValueError, match=rf"{again.name}: is the same store as .*/a, named before"):
            merge_stores([a, again], output)
    with pytest.raises(ValueError, match=r"other: was prepared with other settings than .*\(validation_fraction: 0\.2"):
        merge_stores([a, other], output)
    with pytest.raises(ValueError, match=r"b: exists already and is a token store"):
        merge_stores([a], b)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(ValueError, match=r"mine: contains notes\.txt, which is not part of an unfinished merge"):
        merge_stores([a, b], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"notes\.txt: is not a folder; choose another"):
        merge_stores([a, b], tmp_path / "mine/notes.txt")
    for unlike in (Path.touch, lambda path: path.symlink_to(a / "tokenizer.json")):
        shutil.rmtree(tmp_path / "mine")
        (tmp_path / "mine").mkdir()
        unlike(tmp_path / "mine/tokenizer.json")
        with pytest.raises(ValueError, match=r"mine: contains tokenizer\.json, which is not part of an unfinished"):
            merge_stores([a, b], tmp_path / "mine")
    assert not output.exists()

    for number, message in (
        (errno.EXDEV, r"cannot be made a hard link to .*; copy the store to the file system"),
        (errno.ENOSPC, r"^\[Errno 28\] No space left on device$"),
    ):

        def no_link(source: object, target: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", no_link)
            with pytest.raises(OSError, match=message):
                merge_stores([a, b], output)
        assert not (output / "manifest.json").exists()
    (b / "train/00000.bin").write_bytes((b / "train/00000.bin").read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"b/train/00000\.bin: checksum differs"):
        merge_stores([a, b], output)


def test_the_command_prints_the_merged_store(inputs: list[Path], tmp_path: Path, tokenizer_file: Path) -> None:
    parts = [str(prepare([path], tmp_path / path.name[0], tokenizer_file)) for path in inputs]
    result = CliRunner().invoke(app, ["data", "merge", *parts, "-o", str(tmp_path / "merged")], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"fingerprint {TokenStore(tmp_path / 'merged').fingerprint}" in result.output
    assert "The merged stores remain and can be deleted." in result.output
    assert all(Path(part).exists() for part in parts)
