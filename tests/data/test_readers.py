import errno
import gzip
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sinklm.data import compression, find_inputs, readers
from sinklm.data.inputs import hub_shards, read_documents
from sinklm.data.records import Document

from .corpora import records, write_json_lines

ROWS = [*records(0, 40), {"text": "no set", "meta": {}}, {"text": "no meta"}]


def as_documents(rows: list[dict], default_set: str) -> list[Document]:
    return [Document(row["text"], row.get("meta", {}).get("pile_set_name", default_set)) for row in rows]


def write_parquet(path: Path, rows: list[dict]) -> Path:
    fields = pa.schema([("text", pa.string()), ("meta", pa.struct([("pile_set_name", pa.string())]))])
    with parquet.ParquetWriter(path, fields) as writer:
        for start in range(0, len(rows), 7):
            writer.write_table(pa.Table.from_pylist(rows[start : start + 7], fields))
    return path


def read(path: Path | str) -> list[Document]:
    return list(read_documents(find_inputs([str(path)]).shards))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".zst"])
def test_json_lines_give_texts_and_sets(tmp_path: Path, suffix: str) -> None:
    path = write_json_lines(tmp_path / f"corpus{suffix}", ROWS)
    assert read(path) == as_documents(ROWS, "corpus")


def test_parquet_gives_texts_and_sets(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "corpus.parquet", ROWS)) == as_documents(ROWS, "corpus")
    parquet.write_table(pa.table({"text": ["a", "b"], "score": [1, 2]}), tmp_path / "plain.parquet")
    assert read(tmp_path / "plain.parquet") == [("a", "plain"), ("b", "plain")]


def test_a_data_set_is_read_through_datasets(tmp_path: Path) -> None:
    # `datasets.load_dataset` treats a local folder like a name on the Hub.
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:30])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[30:])
    shards = hub_shards(str(tmp_path))
    assert [shard.name for shard in shards] == [f"{tmp_path}, file {i} of 2" for i in (1, 2)]
    assert list(read_documents(shards)) == as_documents(ROWS, str(tmp_path))
    assert [record.row["text"] for record in shards[0].read(skip=27)] == [row["text"] for row in ROWS[27:30]]


@pytest.mark.parametrize("name", ["nobody/nope.jsonl.zst", "nobody/nope.parquet"])
def test_a_mistyped_path_does_not_go_to_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file or folder"):
        find_inputs([name])


def test_a_data_set_out_of_reach_is_one_error() -> None:
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no such file or folder, and the cache of the Hugging"):
        find_inputs(["nobody/nothing"])


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_reading_can_begin_at_any_record(tmp_path: Path, name: str) -> None:
    write = write_parquet if name.endswith("parquet") else write_json_lines
    (shard,) = find_inputs([str(write(tmp_path / name, ROWS))]).shards
    everything = list(shard.read())
    for skip in (0, 1, 6, 7, 8, 41, 42):
        assert list(shard.read(skip=skip)) == everything[skip:]
    assert shard.position == shard.num_bytes


def test_a_pile_shard_with_a_long_window_is_read(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    text = b'{"text": "' + bytes(97 + i % 26 for i in range(1000)) + b'"}\n'
    data = b"".join(frame.compress(text) for _ in range(2000)) + frame.flush()
    assert zstandard.get_frame_parameters(data).window_size >= 2**27
    (tmp_path / "x.jsonl.zst").write_bytes(data)
    assert len(read(tmp_path / "x.jsonl.zst")) == 2000


@given(st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.data())
def test_lines_end_at_newlines_wherever_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    expected = lines[:-1] if lines and not lines[-1] else lines
    assert list(compression.lines(chunks, Path("x"))) == expected


def test_other_line_separators_and_blank_lines_do_not_end_or_make_a_record(tmp_path: Path) -> None:
    row = {"text": "a\u2028b\u0085c\x0bd"}
    path = tmp_path / "x.jsonl"
    path.write_text(f"\n{json.dumps(row, ensure_ascii=False)}\r\n  \n\n", encoding="utf-8")
    assert read(path) == [(row["text"], "x")]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[:3] = b"xyz"
    path.write_bytes(bytes(content))


def garble_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("x.jsonl.zst", cut, r"x\.jsonl\.zst: truncated \.zst file"),
        ("x.jsonl.zst", garble, r"x\.jsonl\.zst: damaged \.zst file"),
        ("x.jsonl.gz", cut, r"x\.jsonl\.gz: truncated \.gz file"),
        ("x.jsonl.gz", garble, r"x\.jsonl\.gz: damaged \.gz file"),
        ("x.parquet", cut, r"x\.parquet: not a parquet file, or a damaged or truncated one"),
        ("x.parquet", garble_inside, r"x\.parquet: not a parquet file, or a damaged or truncated one"),
        ("x.jsonl", cut, r"x\.jsonl, line 42: not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    path = (write_parquet if name.endswith("parquet") else write_json_lines)(tmp_path / name, ROWS)
    damage(path)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 3: not valid JSON"),
        ('["text"]', "line 3: not a JSON object but a list"),
        ('{"meta": {}}', r'line 3: the record has no text \(key "text" is missing'),
        ('{"text": ""}', r'line 3: the record has no text \(key "text" is empty'),
        ('{"text": null}', r'line 3: the record has no text \(key "text" is of type NoneType'),
        ('{"text": 5}', r'line 3: the record has no text \(key "text" is of type int'),
        ('{"text": "\\ud800"}', "line 3: not valid JSON"),
    ],
)
def test_a_bad_record_is_one_error_that_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(f'{{"text": "a"}}\n\n{line}\n'.encode()))
    with pytest.raises(ValueError, match=rf"x\.jsonl\.gz, {message}"):
        read(path)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_byte_order_mark_is_no_part_of_json_lines(tmp_path: Path, packed: str) -> None:
    path, mark = tmp_path / f"x.jsonl{packed}", b"\xef\xbb\xbf"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed]
    for content in (b'{"text": "a"}\n{"text": "b"}\n', b'\n{"text": "a"}\n{"text": "b"}'):
        path.write_bytes(compress(mark + content))
        assert read(path) == [("a", "x"), ("b", "x")]
    path.write_bytes(compress(b'{"text": "a"}\n' + mark + b'{"text": "b"}\n'))
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "shift-jis"])
def test_json_lines_in_another_encoding_are_to_be_converted(tmp_path: Path, encoding: str) -> None:
    text = "日本" if encoding == "shift-jis" else "naïve"
    (tmp_path / "x.jsonl").write_text(f'{{"text": "{text}"}}\n', encoding=encoding)
    message = r"x\.jsonl, line 1: not UTF-8 \(.*\); convert the file to UTF-8, or remove this line"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.jsonl")


def test_a_parquet_file_must_have_texts(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"content": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r'x\.parquet: has no column "text", only content'):
        read(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet, row 2: the record has no text"):
        read(tmp_path / "y.parquet")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.txt", "x.parquet"])
def test_an_empty_input_is_an_error(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, [])
    elif name.endswith("txt"):
        (tmp_path / name).touch()
    else:
        write_json_lines(tmp_path / name, [])
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: contains no documents"):
        read(tmp_path / name)


def test_text_files_are_documents_and_empty_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_bytes("\ufeffüber\r\n".encode())
    (tmp_path / "sub" / "a.py").write_text("pass\n")
    (tmp_path / "sub" / "__init__.py").touch()
    assert read(tmp_path) == [("über\r\n", tmp_path.name), ("pass\n", tmp_path.name)]


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 .*at byte 2"):
        read(tmp_path / "latin.txt")
    (tmp_path / "wide.txt").write_text("naïve", encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.txt is not UTF-8 .*at byte 0\): convert it to UTF-8"):
        read(tmp_path / "wide.txt")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(ValueError, match=r"image\.png contains NUL bytes"):
        read(tmp_path / "image.png")


def test_inputs_keep_their_order_and_what_they_hold_is_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "z.txt", "y.txt", "image.png", "pattern/q.c", "pattern/deep/p.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}')
    (tmp_path / "link.txt").symlink_to(tmp_path / "y.txt")
    found = find_inputs([f"{tmp_path}/pattern/**/*.c", str(tmp_path)])
    names = [shard.name for shard in found.shards]
    assert names == ["pattern", "a.jsonl", "b.jsonl", tmp_path.name]
    texts = [[path.name for path, _ in shard.files] for shard in found.shards if hasattr(shard, "files")]
    assert texts == [["p.c", "q.c"], ["y.txt", "z.txt"]]
    assert found.num_ignored == {".png": 1, ".c": 2, "link to another input file": 1}


def test_links_in_a_folder_are_followed_and_hidden_names_left_out(tmp_path: Path) -> None:
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for path in (corpus / "z/own.txt", corpus / ".hidden/a.txt", corpus / ".b.txt", other / "deep/c.txt", other / "d"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    (corpus / "z/linked").symlink_to(other)
    (corpus / "again").symlink_to(other / "deep")  # read once, under the first link
    (corpus / "a").symlink_to(corpus / "z")  # a folder keeps its own name
    (corpus / "e.txt").symlink_to(other / "d")
    (other / "deep" / "loop").symlink_to(corpus)
    (corpus / "broken.txt").symlink_to("nothing")
    (corpus / "circle.txt").symlink_to("circle.txt")
    found = find_inputs([str(corpus)])
    (shard,) = found.shards
    assert [str(path.relative_to(corpus)) for path, _ in shard.files] == ["again/c.txt", "e.txt", "z/own.txt"]
    assert found.num_ignored == {"hidden": 2, "broken link": 2, "no suffix": 1}
    found = find_inputs([f"{corpus}/*/*.txt"])
    (shard,) = found.shards
    assert [str(path.relative_to(corpus)) for path, _ in shard.files] == ["again/c.txt", "z/own.txt"]
    assert found.num_ignored == {"link to another input file": 1}


@given(st.tuples(*[st.integers(0, number - 1) for number in (2, 3, 4)]), st.sets(st.tuples(*[st.integers(0, 4)] * 2)))
def test_every_file_that_links_lead_to_is_read_once(places: tuple[int, ...], links: set[tuple[int, int]]) -> None:
    """Folder 0 is the input, 1 is elsewhere, and the others are in one of those before them."""
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, "0"), Path(root, "1")]
        for number, place in enumerate(places, start=2):
            folders.append(folders[place] / str(number))
        for folder in folders:
            folder.mkdir()
            (folder / "x.txt").write_text(folder.name)
        for source, target in links:
            (folders[source] / f"to-{target}").symlink_to(folders[target])
        inside = {(place, i) for i, place in enumerate(places, start=2)}
        reached = {0}
        while more := {target for source, target in inside | links if source in reached} - reached:
            reached |= more
        (shard,) = find_inputs([str(folders[0])]).shards
        files = [path for path, _ in shard.files]
        assert sorted(path.read_text() for path in files) == sorted(map(str, reached))
        assert files == sorted(files)
        assert set(folders[0].rglob("x.txt")) <= set(files)


def test_a_compressed_copy_beside_its_original_is_an_error(tmp_path: Path) -> None:
    for folder, names in {"a": ("x.jsonl", "x.jsonl.zst"), "b": ("X.JSONL.GZ", "X.JSONL.zst")}.items():
        (tmp_path / folder).mkdir()
        both = [str(write_json_lines(tmp_path / folder / name, ROWS)) for name in names]
        for inputs in ([str(tmp_path / folder)], [str(tmp_path / folder / "*")], both):
            message = rf"{both[1]}: by its name it is {both[0]} in another compression, .*; use one of the two"
            with pytest.raises(ValueError, match=message):
                find_inputs(inputs)
    write_json_lines(tmp_path / "a" / "x.jsonl.gz", ROWS).rename(tmp_path / "x.jsonl.gz")
    assert len(find_inputs([both[0], str(tmp_path / "x.jsonl.gz")]).shards) == 2  # in different folders


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*closed"):
        find_inputs([str(tmp_path)])


def test_a_text_file_named_by_itself_is_its_own_set(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name)
    found = find_inputs([str(tmp_path / "one.txt"), str(tmp_path / "two.txt")])
    assert [document.set_name for document in read_documents(found.shards)] == ["one", "two"]
    assert len(found.shards) == 1


def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"a\.jsonl: given twice"):
        find_inputs([str(path), str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        find_inputs([str(tmp_path / "missing.jsonl")])
    with pytest.raises(ValueError, match="no file matches"):
        find_inputs([f"{tmp_path}/*.nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"contains no file that ends in \.jsonl"):
        find_inputs([str(tmp_path / "empty")])
    for name, remedy in (
        ("x.tar", "unpack it"),
        ("x.TAR.zst", "unpack it"),
        ("x.jsonl.xz", "decompress it: xz -dk"),
        ("x.jsonl.bz2", "decompress it: bzip2 -dk"),
        ("x.txt.gz", "decompress it: gzip -dk"),
        ("x.GZ", "decompress it"),
        ("x.jsonl.zstd", "decompress it"),
        ("x.csv", "convert it to JSON lines"),
        ("x.bin", "it is tokenized already"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"{name}: this file type is not supported; {remedy}"):
            find_inputs([str(tmp_path / name)])
    (tmp_path / "package.json").touch()
    suffixes = [".tar", ".zst", ".xz", ".bz2", ".gz", ".GZ", ".zstd", ".csv", ".bin", ".json"]
    assert find_inputs([str(tmp_path)]).num_ignored == dict.fromkeys(suffixes, 1)


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".jsonlines", ".json", ".JSONL"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_json_lines_have_several_names(tmp_path: Path, kind: str, packed: str) -> None:
    path = write_json_lines(tmp_path / f"corpus{kind}{packed}", ROWS)
    assert read(path) == as_documents(ROWS, "corpus")
    if kind + packed != ".json":
        assert read(tmp_path) == as_documents(ROWS, "corpus")


def test_suffixes_in_upper_case_are_the_same(tmp_path: Path) -> None:
    for name in ("A.JSONL.ZST", "B.JSONL.GZ"):
        plain = write_json_lines(tmp_path / name.lower(), ROWS)
        assert read(plain.rename(tmp_path / name)) == as_documents(ROWS, name[0])
    assert read(write_parquet(tmp_path / "C.PARQUET", ROWS)) == as_documents(ROWS, "C")


def test_json_lines_under_a_wrong_name_are_no_document(tmp_path: Path) -> None:
    for name in ("part-00000", "x.jsonl.bak", "x.txt"):
        write_json_lines(tmp_path / name, ROWS)
        with pytest.raises(ValueError, match=rf"{name}: contains JSON lines, but its name does not say so"):
            read(tmp_path / name)
        lines = (tmp_path / name).read_bytes()
        for before in (b"\xef\xbb\xbf", b" \n\n", b"\xef\xbb\xbf\n"):
            (tmp_path / name).write_bytes(before + lines)
            with pytest.raises(ValueError, match=rf"{name}: contains JSON lines"):
                read(tmp_path / name)
    (tmp_path / "x.js").write_text('{"text": "an object in a program"};\n')
    (tmp_path / "y.txt").write_text('{"content": "no text"}\n')
    assert len(read(f"{tmp_path}/[xy].js")) == 1
    assert len(read(tmp_path / "y.txt")) == 1


def test_the_text_may_have_another_key(tmp_path: Path) -> None:
    rows = [{"content": "a", "text": 5, "meta": {"pile_set_name": "S"}}, {"content": "b", "meta": None}]
    expected = [("a", "S"), ("b", "x")]
    write_json_lines(tmp_path / "x.jsonl.gz", rows)
    table = pa.table({"content": ["a", "b"], "text": [5, 6], "meta": [{"pile_set_name": "S"}, None]})
    parquet.write_table(table, tmp_path / "x.parquet")
    for name in ("x.jsonl.gz", "x.parquet"):
        assert list(read_documents(find_inputs([str(tmp_path / name)], text_key="content").shards)) == expected
    with pytest.raises(ValueError, match=r'x\.jsonl\.gz, line 1: .*key "body" is missing.*--text-key'):
        list(read_documents(find_inputs([str(tmp_path / "x.jsonl.gz")], text_key="body").shards))
    with pytest.raises(ValueError, match=r'x\.parquet: has no column "body", only content, text, meta; .*--text-key'):
        list(read_documents(find_inputs([str(tmp_path / "x.parquet")], text_key="body").shards))


def zstd(content: bytes, **parameters: int) -> bytes:
    """One frame whose size is not known in advance."""
    settings = zstandard.ZstdCompressionParameters(**parameters)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(content) + compressor.flush()


def test_a_small_file_is_decompressed_in_bounded_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstd(b"a" * 2**28))
    assert path.stat().st_size < 2**14
    sizes = [len(chunk) for chunk, _ in compression.decompressed(path)]
    assert sum(sizes) == 2**28
    assert max(sizes) <= compression.ZSTD_BLOCK // 4 * 2**17


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.txt", "x.parquet"])
def test_a_document_above_the_limit_is_an_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compression, readers):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    rows = [{"text": "a" * 950}, {"text": "b" * (1001 if "parquet" in name else 989)}]
    if name.endswith("txt"):
        (tmp_path / name).write_text("a" * 1000)
        assert len(read(tmp_path / name)) == 1
        (tmp_path / name).write_text("a" * 1001)
    else:
        write = write_parquet if name.endswith("parquet") else write_json_lines
        assert len(read(write(tmp_path / name, [*rows[:1]] * 9))) == 9
        write(tmp_path / name, rows)
    place = {"x.txt": "", "x.parquet": ", row 2"}.get(name, ", line 2")
    with pytest.raises(ValueError, match=rf"{name}{place}: a document of [\d,]+ bytes or more; the limit is"):
        read(tmp_path / name)


@pytest.mark.parametrize("character", ["a", "é", "漢", "🙂"])
def test_the_limit_of_a_row_is_in_bytes(tmp_path: Path, character: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1000)
    size = len(character.encode())
    path = write_parquet(tmp_path / "x.parquet", [{"text": character * (1000 // size)}])
    assert len(read(path)) == 1
    write_parquet(path, [{"text": character * (1000 // size + 1)}])
    num_bytes = f"{size * (1000 // size + 1):,}"
    with pytest.raises(ValueError, match=f"row 1: a document of {num_bytes} bytes or more; the limit is"):
        read(path)


def test_a_zstd_window_above_the_limit_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.zst").write_bytes(zstd(b'{"text": "a"}\n', window_log=28))
    with pytest.raises(ValueError, match=r"x\.jsonl\.zst: its zstd window is larger than 128 MiB; compress it again"):
        read(tmp_path / "x.jsonl.zst")


def test_files_without_checksums_are_known(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl.gz", ROWS)
    write_json_lines(tmp_path / "b.jsonl.zst", ROWS)
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(b'{"text": "a"}\n', write_checksum=False))
    (tmp_path / "d.jsonl.zst").write_bytes(b"damaged")
    (tmp_path / "e.parquet").touch()
    assert find_inputs([str(tmp_path)]).without_checksum() == ["c.jsonl.zst"]
