import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sinklm.data import (
    MegatronWriter,
    PreshuffledStore,
    TokenStore,
    TokenWindows,
    find_inputs,
    open_store,
    prepare_store,
)
from sinklm.data.manifest import MANIFEST_NAME
from sinklm.data.sequence import MAX_OPEN_FILES, TokenSequence
from sinklm.data.store import VERIFIED_NAME, note_verified

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
    if name != "tokenizer.json":  # it is small and always read
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


def test_a_store_says_how_much_it_reads(store: Path) -> None:
    said: list[int] = []
    (store / VERIFIED_NAME).unlink(missing_ok=True)
    opened = open_store(store, on_read=said.append)
    assert said == [sum(info.bytes for info in opened.manifest.files.values())]
    open_store(store, on_read=said.append)
    open_store(store, verify="size", on_read=said.append)
    assert len(said) == 1


def test_a_copy_is_read_again_though_its_times_and_its_record_are_copied(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(store), str(copy)], check=True)
    assert (copy / VERIFIED_NAME).exists()
    flip_a_byte(copy / "train/00000.bin", keep_time=True)
    with pytest.raises(ValueError, match=r"copy/train/00000\.bin: checksum differs"):
        TokenStore(copy)
    TokenStore(store)


def test_a_file_changed_behind_its_time_is_read_again(store: Path) -> None:
    flip_a_byte(store / "train/00000.bin", keep_time=True)
    with pytest.raises(ValueError, match="checksum differs"):
        TokenStore(store)


def test_sha256_trusts_no_record(store: Path) -> None:
    flip_a_byte(store / "train/00000.bin")
    note_verified(store, TokenStore(store, verify="size").manifest.files)
    TokenStore(store)
    with pytest.raises(ValueError, match="checksum differs"):
        TokenStore(store, verify="sha256")


def test_the_record_of_a_store_that_cannot_be_written_is_in_the_cache(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (store / VERIFIED_NAME).unlink()
    (store / VERIFIED_NAME).mkdir()  # no file can be written in its place
    TokenStore(store)
    monkeypatch.setattr("sinklm.data.store.sha256_of_all", lambda paths: [pytest.fail(str(path)) for path in paths])
    TokenStore(store)


def change_manifest(store: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((store / MANIFEST_NAME).read_bytes())
    change(manifest)
    (store / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../etc/passwd": m["files"]["tokenizer.json"]}), "not a path inside"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"]["tokenizer.json"]}), "not a path inside"),
        (lambda m: m["files"].update({"train/../x": m["files"]["tokenizer.json"]}), "not a path inside"),
        (lambda m: m.update(files={}), r"tokenizer\.json is missing"),
        (lambda m: m["files"].pop("tokenizer.json"), r"tokenizer\.json is missing"),
        (lambda m: m["files"].pop("train/00001.idx"), r"train/00001\.idx is not in files"),
        (lambda m: m.update(splits={}), "splits: Dictionary should have at least 1"),
        (lambda m: m["splits"]["train"].update(shards=[], shard_sets={}), "has no shards"),
        (
            lambda m: m["splits"]["train"]["shards"].append("../other/00000"),
            "not in the order",
        ),
        (lambda m: m["splits"]["train"]["shards"].reverse(), "not in the order of their names"),
        (lambda m: m["splits"]["train"]["total"].update(tokens=7), "do not add up to its total"),
        (lambda m: m["splits"]["train"]["total"].update(documents=-7), "greater than or equal to 0"),
        (lambda m: m["splits"]["train"]["sets"]["A"].update(bytes=1), "do not add up"),
        (lambda m: m["splits"]["train"]["shard_sets"]["train/00001"].pop("A"), "do not add up"),
        (lambda m: m["files"]["train/00000.bin"].update(bytes=12), "do(es)? not match|is not that of"),
        (lambda m: m["splits"]["train"]["shard_sets"].update({"train/00009": {}}), "name different shards"),
        (lambda m: m.update(order="random"), "Extra inputs are not permitted"),  # of a newer version
        (lambda m: m["tokenizer"].update(size=70000), "uint16 cannot hold 70000 ids"),
        (lambda m: m["tokenizer"].update(eod_id=320), "eod_id 320 is not an id of a tokenizer of 320 ids"),
        (lambda m: m["tokenizer"].update(sha256="0" * 64), r"tokenizer\.json is missing or not the tokenizer"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(store: Path, change: Callable, message: str) -> None:
    change_manifest(store, change)
    for verify in ("size", "auto"):
        with pytest.raises(ValueError, match=rf"{store}/manifest\.json: damaged.*({message})"):
            TokenStore(store, verify=verify)


def rewrite(store: Path, name: str, content: bytes) -> None:
    """Replace a file and its entry in the manifest."""
    (store / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(store, lambda manifest: manifest["files"].update({name: entry}))


def test_an_index_that_contradicts_the_manifest_is_refused(store: Path) -> None:
    name = "train/00000.idx"
    index = (store / name).read_bytes()
    rewrite(store, name, index[:17] + b"\x04" + index[18:])  # the code of int32
    with pytest.raises(ValueError, match=rf"{name}: the tokens are int32, but manifest\.json says uint16"):
        TokenStore(store)
    num_documents = int.from_bytes(index[18:26], "little")
    fewer = MegatronWriter(store / "fewer", np.dtype(np.uint16))
    fewer.add(np.zeros(num_documents - 1, np.uint16), [1] * (num_documents - 1))
    fewer.finish()
    rewrite(store, name, (store / "fewer.idx").read_bytes())
    with pytest.raises(ValueError, match=rf"{name}: has {num_documents - 1} documents, but manifest\.json says"):
        TokenStore(store)
    change_manifest(store, lambda manifest: manifest["splits"]["train"].pop("shard_sets"))  # an older version
    with pytest.raises(ValueError, match=r"store/train: has \d+ documents, but manifest\.json says"):
        TokenStore(store)


def test_a_tokenizer_that_contradicts_the_manifest_is_refused(store: Path) -> None:
    change_manifest(store, lambda manifest: manifest["tokenizer"].update(size=321))
    with pytest.raises(ValueError, match=r"tokenizer\.json: has 320 ids, but manifest\.json says 321"):
        TokenStore(store)
    text = (store / "tokenizer.json").read_text()
    (store / "tokenizer.json").write_text(text.replace("token", "nekot"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: checksum differs"):
        TokenStore(store, verify="size")


def test_an_id_outside_the_vocabulary_is_an_error_when_it_is_read(store: Path) -> None:
    tokens = np.fromfile(store / "train/00001.bin", np.uint16)
    tokens[3] = 320
    rewrite(store, "train/00001.bin", tokens.tobytes())
    stream = TokenStore(store).split("train")
    first = int(stream.starts[1])
    assert len(stream.read(first, first + 3)) == 3
    with pytest.raises(ValueError, match=r"train/00001\.bin: contains id 320 \(token 3\).*only 320 ids"):
        stream.read(first - 5, first + 4)


def test_a_file_truncated_while_it_is_open_is_one_error(store: Path) -> None:
    stream = TokenStore(store).split("train")
    stream.read(0, 10)
    os.truncate(store / "train/00000.bin", 40)
    assert len(stream.read(10, 20)) == 10
    with pytest.raises(OSError, match=r"train/00000\.bin: ends at byte 40.*copy or prepare the store again"):
        stream.read(10, 21)


def test_a_sequence_of_many_files_has_few_open(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i:03d}.bin" for i in range(MAX_OPEN_FILES + 40)]
    for i, path in enumerate(paths):
        np.full(2, i, np.uint16).tofile(path)
    stream = TokenSequence(paths, np.dtype(np.uint16), vocab_size=1000)

    def num_open() -> int:
        return sum(path.resolve() in paths for path in Path("/proc/self/fd").iterdir())

    for _ in range(2):
        assert stream.read(0, len(stream)).tolist() == [i for i in range(len(paths)) for _ in range(2)]
    assert num_open() == MAX_OPEN_FILES
    del stream
    assert num_open() == 0


def test_a_folder_that_is_not_a_store_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; make it with `sinklm prepare.*nowhere`"):
        TokenStore(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not a token store \(no manifest\.json\); pass a folder made by"):
        TokenStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no such folder; did you mean .*{store.name}\?"):
        TokenStore(store.with_name(store.name + "s"))
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
    with pytest.raises(ValueError, match="contains pre-shuffled rows and no validation split"):
        open_store(tmp_path).split("validation")
    last = tmp_path / "document-00001-of-00001.bin"
    np.full(rows.size - 5000, 320, np.uint16).tofile(last)
    with pytest.raises(ValueError, match=r"00001\.bin: contains id 320 \(token 0\).*only 320 ids"):
        open_store(tmp_path)
    last.unlink()
    with pytest.raises(ValueError, match="5000 tokens are not a whole number of rows of 2049"):
        open_store(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing"):
        open_store(tmp_path)


def test_rows_may_have_an_index(tmp_path: Path, rows: np.ndarray) -> None:
    for file in tmp_path.glob("*.bin"):
        file.unlink()
    writer = MegatronWriter(tmp_path / "document", rows.dtype)
    writer.add(rows.reshape(-1), [2049] * 7)
    writer.finish()
    assert np.array_equal(open_store(tmp_path).split("train").read(0, rows.size), rows.reshape(-1))
    (tmp_path / "document.idx").write_bytes(b"damaged")  # it is not used
    assert isinstance(open_store(tmp_path), PreshuffledStore)


def test_parts_of_a_store_name_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("manifest.json", "tokenizer.json", "train", "validation", "train/00000.bin", "train/00000.idx"):
        with pytest.raises(FileNotFoundError, match=f"{part}: a part of the token store {store}; pass that folder"):
            open_store(store / part)
    monkeypatch.chdir(store / "train")
    with pytest.raises(FileNotFoundError, match=f"a part of the token store {store}; pass that folder"):
        open_store(".")
    shutil.copyfile(store / "tokenizer.json", store / "train/tokenizer.json")
    with pytest.raises(FileNotFoundError, match=f"a part of the token store {store}; pass that folder"):
        open_store(store / "train")


def test_folders_that_are_no_store_say_what_they_are(tmp_path: Path) -> None:
    writer = MegatronWriter(tmp_path / "documents", np.dtype(np.uint16))
    writer.add(np.arange(300))
    writer.finish()
    with pytest.raises(FileNotFoundError, match=r"pairs of Megatron \(\.bin and \.idx\) without an order of samples; "):
        open_store(tmp_path)
    (tmp_path / "documents.bin").unlink()
    (tmp_path / "documents.idx").unlink()
    (tmp_path / ".prepare").mkdir()
    with pytest.raises(FileNotFoundError, match="not finished; run the same `sinklm prepare` again"):
        open_store(tmp_path)
    (tmp_path / ".prepare").rmdir()
    with pytest.raises(FileNotFoundError, match=r"not a token store \(no manifest\.json\); pass a folder made by"):
        open_store(tmp_path)


def test_open_store_opens_a_token_store(store: Path) -> None:
    assert isinstance(open_store(store), TokenStore)
    with pytest.raises(FileNotFoundError, match="nothing: no such folder"):
        open_store(store / "nothing")
