import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sinklm.data import PreshuffledStore, TokenStore, TokenWindows, find_inputs, open_store, prepare_store
from sinklm.data.manifest import MANIFEST_NAME
from sinklm.data.store import VERIFIED_NAME

from .corpora import records, stored_documents, write_json_lines
from .processes import InProcessPool


@pytest.fixture
def store(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    inputs = [str(write_json_lines(tmp_path / f"{seed}.jsonl", records(seed, 30))) for seed in (1, 2)]
    shards = find_inputs(inputs).shards
    prepare_store(shards, tmp_path / "store", tokenizer=tokenizer_file, validation_fraction=0.3)
    return tmp_path / "store"


def flip_a_byte(path: Path, *, keep_time: bool = False) -> None:
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_open_store_has_its_attributes_and_tokens(store: Path, tokenizer_file: Path) -> None:
    opened = TokenStore(store)
    assert (opened.tokenizer_size, opened.eod_id, opened.is_shuffled) == (320, 0, False)
    assert opened.tokenizer_path.read_bytes() == tokenizer_file.read_bytes()
    for split in ("train", "validation"):
        stream, documents = opened.split(split), stored_documents(store, opened.manifest, split)
        assert stream.read(0, len(stream)).tolist() == [id_ for document in documents for id_ in document]
    windows = TokenWindows(opened, "train", tokens_per_sample=9, stride=8)
    assert windows[3].tolist() == opened.split("train").read(24, 33).tolist()


def test_the_fingerprint_is_of_the_content_alone(store: Path, tmp_path: Path) -> None:
    fingerprint = TokenStore(store).fingerprint
    shutil.copytree(store, tmp_path / "copy")
    assert TokenStore(tmp_path / "copy").fingerprint == fingerprint
    manifest = json.loads((store / MANIFEST_NAME).read_text())
    manifest["files"]["train/00000.bin"]["sha256"] = "0" * 64
    (tmp_path / "copy" / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert TokenStore(tmp_path / "copy", verify="size").fingerprint != fingerprint


@pytest.mark.parametrize("name", ["train/00001.bin", "train/00000.idx", "validation/00000.bin", "tokenizer.json"])
def test_a_changed_file_is_found_at_once(store: Path, name: str) -> None:
    flip_a_byte(store / name)
    for verify in ("auto", "sha256"):
        with pytest.raises(ValueError, match=rf"{name}: checksum differs"):
            TokenStore(store, verify=verify)
    TokenStore(store, verify="size")
    (store / name).write_bytes((store / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name}: \d+ bytes instead of \d+"):
        TokenStore(store, verify="size")
    (store / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: missing"):
        TokenStore(store, verify="size")


def test_files_are_read_again_only_when_they_changed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def note_hashed(paths: object) -> list[str]:
        names = [str(path.relative_to(store)) for path in paths]  # type: ignore[attr-defined]
        hashed.extend(names)
        return [TokenStore(store, verify="size").manifest.files[name].sha256 for name in names]

    monkeypatch.setattr("sinklm.data.store.sha256_of_all", note_hashed)
    TokenStore(store)
    assert hashed == []  # `prepare` noted what it wrote
    os.utime(store / "train/00001.bin")
    TokenStore(store)
    assert hashed == ["train/00001.bin"]
    TokenStore(store)
    assert hashed == ["train/00001.bin"]
    (store / VERIFIED_NAME).write_text("damaged")
    TokenStore(store)
    assert len(hashed) == 1 + len(TokenStore(store).manifest.files)


def test_sha256_trusts_no_note(store: Path) -> None:
    flip_a_byte(store / "train/00000.bin", keep_time=True)
    TokenStore(store)
    with pytest.raises(ValueError, match="checksum differs"):
        TokenStore(store, verify="sha256")


def test_a_folder_that_is_not_a_store_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: not a token store.*sinklm prepare"):
        TokenStore(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no split 'test', only train, validation"):
        TokenStore(store).split("test")
    with pytest.raises(ValueError, match="verify is 'md5'"):
        TokenStore(store, verify="md5")  # type: ignore[arg-type]
    (store / MANIFEST_NAME).write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match=r"manifest\.json: damaged, or written by another version \(format_version"):
        TokenStore(store)


@pytest.fixture
def rows(tmp_path: Path, tokenizer_file: Path) -> np.ndarray:
    """Pre-shuffled rows ``(7, 2049)`` in two files, split inside a row."""
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.json")
    rows = np.random.default_rng(0).integers(0, 320, (7, 2049)).astype(np.uint16)
    flat = rows.reshape(-1)
    flat[:5000].tofile(tmp_path / "document-00000-of-00001.bin")
    flat[5000:].tofile(tmp_path / "document-00001-of-00001.bin")
    return rows


def test_pre_shuffled_rows_are_used_as_they_are(tmp_path: Path, rows: np.ndarray) -> None:
    store = open_store(tmp_path)
    assert isinstance(store, PreshuffledStore)
    assert (store.tokenizer_size, store.eod_id, store.is_shuffled) == (320, 0, True)
    windows = TokenWindows(store, "train", tokens_per_sample=2049, stride=2048)
    assert np.array_equal(np.stack([windows[i] for i in range(len(windows))]), rows)
    with_sink = TokenWindows(store, "train", tokens_per_sample=2048, stride=2048)
    assert np.array_equal(np.stack([with_sink[i] for i in range(len(with_sink))]), rows[:, :2048])


def test_the_fingerprint_of_rows_sees_their_content(tmp_path: Path, rows: np.ndarray) -> None:
    fingerprint = PreshuffledStore(tmp_path).fingerprint
    assert PreshuffledStore(tmp_path).fingerprint == fingerprint
    flip_a_byte(tmp_path / "document-00000-of-00001.bin")
    assert PreshuffledStore(tmp_path).fingerprint != fingerprint


def test_rows_that_cannot_be_used_are_refused(tmp_path: Path, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="have no validation split"):
        open_store(tmp_path).split("validation")
    last = tmp_path / "document-00001-of-00001.bin"
    np.full(rows.size - 5000, 320, np.uint16).tofile(last)
    with pytest.raises(ValueError, match=r"00001\.bin: contains id 320, but the tokenizer's vocabulary has only 320"):
        open_store(tmp_path)
    last.unlink()
    with pytest.raises(ValueError, match="5000 tokens are not a whole number of rows of 2049"):
        open_store(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing"):
        open_store(tmp_path)


def test_open_store_opens_a_token_store(store: Path) -> None:
    assert isinstance(open_store(store), TokenStore)
    with pytest.raises(FileNotFoundError, match="not a token store"):
        open_store(store / "nothing")
