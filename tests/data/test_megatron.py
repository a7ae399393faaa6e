import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinklm.data import MegatronReader, MegatronWriter
from sinklm.data.megatron import token_dtype

documents = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=8), min_size=1, max_size=8)


def write(prefix: Path, docs: list[list[int]], dtype: type = np.uint16) -> None:
    writer = MegatronWriter(prefix, np.dtype(dtype))
    for doc in docs:
        writer.add(np.array(doc, dtype))
    writer.finish()


def index_by_hand(docs: list[list[int]], code: int, size: int) -> bytes:
    """The index as Megatron-LM's `_IndexWriter` packs it."""
    lengths = [len(doc) for doc in docs]
    pointers = [size * sum(lengths[:i]) for i in range(len(docs))]
    head = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    head += struct.pack("<Q", len(docs)) + struct.pack("<Q", len(docs) + 1)
    body = struct.pack(f"<{len(docs)}i", *lengths) + struct.pack(f"<{len(docs)}q", *pointers)
    return head + body + struct.pack(f"<{len(docs) + 1}q", *range(len(docs) + 1))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents, st.sampled_from([(np.uint16, 8), (np.int32, 4)]))
def test_what_is_written_is_the_format_and_is_read_again(
    tmp_path: Path, docs: list[list[int]], dtype_and_code: tuple[type, int]
) -> None:
    dtype, code = dtype_and_code
    write(tmp_path / "x", docs, dtype)
    assert (tmp_path / "x.bin").read_bytes() == b"".join(np.array(doc, dtype).tobytes() for doc in docs)
    assert (tmp_path / "x.idx").read_bytes() == index_by_hand(docs, code, np.dtype(dtype).itemsize)
    reader = MegatronReader(tmp_path / "x")
    assert [doc.tolist() for doc in reader] == docs
    assert reader.dtype == dtype
    assert reader.document_indices[:].tolist() == list(range(len(docs) + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents, documents, documents)
def test_a_writer_goes_on_at_what_was_committed(
    tmp_path: Path, before: list[list[int]], lost: list[list[int]], after: list[list[int]]
) -> None:
    first = MegatronWriter(tmp_path / "x", np.dtype(np.uint16))
    for doc in before:
        first.add(np.array(doc, np.uint16))
    num_documents, num_tokens = first.commit()
    for doc in lost:
        first.add(np.array(doc, np.uint16))
    first.close()
    assert MegatronWriter.can_go_on(tmp_path / "x", np.dtype(np.uint16), num_documents, num_tokens)

    second = MegatronWriter(tmp_path / "x", np.dtype(np.uint16), num_documents=num_documents, num_tokens=num_tokens)
    second.add(np.concatenate([np.array(doc, np.uint16) for doc in after]), [len(doc) for doc in after])
    second.finish()
    assert [doc.tolist() for doc in MegatronReader(tmp_path / "x")] == before + after


def test_a_pair_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = MegatronWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.array([1, 2], np.uint16))
    writer.commit()
    assert not (tmp_path / "x.bin").exists()
    assert not (tmp_path / "x.idx").exists()
    writer.finish()
    assert len(MegatronReader(tmp_path / "x")) == 1


def test_a_pair_without_documents_leaves_no_files(tmp_path: Path) -> None:
    MegatronWriter(tmp_path / "x", np.dtype(np.uint16)).finish()
    assert list(tmp_path.iterdir()) == []


def test_the_dtype_is_the_narrowest_that_holds_every_id() -> None:
    assert token_dtype(50277) == np.uint16
    assert token_dtype(65535) == np.uint16
    assert token_dtype(65536) == np.int32


def test_misfits_are_refused(tmp_path: Path) -> None:
    writer = MegatronWriter(tmp_path / "x", np.dtype(np.uint16))
    with pytest.raises(ValueError, match="got 3 tokens, but the lengths add up to 2"):
        writer.add(np.array([1, 2, 3], np.uint16), [2])
    writer.close()
    with pytest.raises(ValueError, match=r"x\.bin\.partial: 0 bytes, but 14 were committed"):
        MegatronWriter(tmp_path / "x", np.dtype(np.uint16), num_documents=1, num_tokens=7)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4]])
    index, tokens = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()

    def changed(offset: int, kind: str, value: int) -> bytes:
        content = bytearray(index)
        struct.pack_into(kind, content, offset, value)
        return bytes(content)

    cases = [
        (b"PAR1" + index[4:], tokens, "not a Megatron index"),
        (index[:20], tokens, "not a Megatron index"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], tokens, "version 2"),
        (index[:17] + b"\x06" + index[18:], tokens, "dtype code 6"),
        (index[:-8], tokens, "the index is damaged"),
        (index, tokens[:-2], "6 bytes, but the index expects 8"),
        (changed(34, "<i", -3), tokens, r"x\.idx: a sequence has a negative length"),
        (changed(34, "<i", 2), tokens, r"x\.bin: 8 bytes, but the index expects 6"),
        (changed(42, "<q", -2), tokens, r"x\.idx: points outside of x\.bin"),
        (changed(50, "<q", 8), tokens, r"x\.idx: points outside of x\.bin"),
        (changed(50, "<q", 2**62), tokens, r"x\.idx: points outside of x\.bin"),
        (changed(50, "<q", 5), tokens, "between two tokens"),
        (changed(58, "<q", 1), tokens, r"x\.idx: the document index does not rise from 0 to 2"),
        (changed(66, "<q", 3), tokens, "the document index does not rise from 0 to 2"),
        (changed(74, "<q", 1), tokens, "the document index does not rise from 0 to 2"),
    ]
    for bad_index, bad_tokens, message in cases:
        (tmp_path / "x.idx").write_bytes(bad_index)
        (tmp_path / "x.bin").write_bytes(bad_tokens)
        with pytest.raises(ValueError, match=message):
            MegatronReader(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        MegatronReader(tmp_path / "absent")
