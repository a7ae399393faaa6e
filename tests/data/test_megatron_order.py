import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinklm.data import MegatronOrderStore, MegatronWriter, TokenWindows, open_store


def build_arrays(sizes: np.ndarray, seq_length: int, num_epochs: int, seed: int) -> dict[str, np.ndarray]:
    """`_build_doc_idx`, `_build_sample_idx` and `_build_shuffle_idx` of gpt-neox, one by one."""
    rng = np.random.RandomState(seed)
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), num_epochs)
    rng.shuffle(doc_idx)
    num_samples = (num_epochs * int(sizes.sum()) - 1) // seq_length
    sample_idx = np.zeros([num_samples + 1, 2], dtype=np.int32)
    place = offset = 0
    for sample in range(1, num_samples + 1):
        remaining = seq_length + 1
        while remaining:
            length = sizes[doc_idx[place]] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            else:
                place += 1
                offset = 0
        sample_idx[sample] = place, offset
    shuffle_idx = np.arange(num_samples, dtype=np.uint32)
    rng.shuffle(shuffle_idx)
    return {"doc_idx": doc_idx, "sample_idx": sample_idx, "shuffle_idx": shuffle_idx}


def write(folder: Path, tokenizer_file: Path, documents: list[np.ndarray], arrays: dict[str, np.ndarray]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    writer = MegatronWriter(folder / "pile_text_document", np.dtype(np.uint16))
    for document in documents:
        writer.add(document)
    writer.finish()
    for name, array in arrays.items():
        np.save(folder / f"pile_train_indexmap_9ns_7sl_1234s_{name}.npy", array)
    return folder


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_samples_are_those_of_gpt_neox(
    tmp_path: Path, tokenizer_file: Path, sizes: list[int], seq_length: int, num_epochs: int, seed: int
) -> None:
    if num_epochs * sum(sizes) <= seq_length:
        return
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    documents = np.split(tokens, np.cumsum(sizes)[:-1])
    arrays = build_arrays(np.array(sizes), seq_length, num_epochs, seed)
    store = open_store(write(tmp_path / "order", tokenizer_file, documents, arrays))
    assert isinstance(store, MegatronOrderStore)
    # All documents in the order of doc_idx behind each other, cut into samples that share a token.
    stream = np.concatenate([documents[i] for i in arrays["doc_idx"]])
    cut = [stream[i * seq_length : (i + 1) * seq_length + 1] for i in range((len(stream) - 1) // seq_length)]
    expected = [cut[i].tolist() for i in arrays["shuffle_idx"]]
    windows = TokenWindows(store, "train", tokens_per_sample=seq_length + 1, stride=seq_length)
    assert [windows[i].tolist() for i in range(len(windows))] == expected
    with_sink = TokenWindows(store, "train", tokens_per_sample=seq_length, stride=seq_length)
    assert [with_sink[i].tolist() for i in range(len(with_sink))] == [row[:-1] for row in expected]
    assert store.document("train", len(sizes) - 1).tolist() == documents[-1].tolist()


@pytest.fixture
def order(tmp_path: Path, tokenizer_file: Path) -> Path:
    documents = [np.arange(i, i + 20, dtype=np.uint16) for i in range(10)]
    arrays = build_arrays(np.full(10, 20), 16, 1, 0)
    return write(tmp_path / "order", tokenizer_file, documents, arrays)


def array_of(order: Path, name: str) -> Path:
    return next(order.glob(f"*_{name}.npy"))


def test_the_fingerprint_sees_order_and_documents(order: Path) -> None:
    fingerprint = open_store(order).fingerprint
    assert open_store(order).fingerprint == fingerprint
    np.save(array_of(order, "shuffle_idx"), np.load(array_of(order, "shuffle_idx"))[::-1])
    assert open_store(order).fingerprint != fingerprint


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shuffle_idx", lambda a: a + 1, "shuffle_idx contains 12, which sample_idx does not have"),
        ("sample_idx", lambda a: a + np.array([90, 0]), "sample_idx contains places that doc_idx does not have"),
        ("sample_idx", lambda a: a - np.array([1, 0]), "sample_idx contains places that doc_idx does not have"),
        ("sample_idx", lambda a: np.concatenate([a[:-1], [[10, 3]]]), "places that doc_idx does not have"),
        ("doc_idx", lambda a: a + 10, "doc_idx contains documents that the .idx file does not have"),
        ("doc_idx", lambda a: np.where(a == 3, 10, a), "doc_idx contains documents that the .idx file does not have"),
        ("doc_idx", lambda a: np.where(a == 3, -1, a), "doc_idx contains documents that the .idx file does not have"),
        ("doc_idx", lambda a: a[:, None], "are not those of an order"),
        ("sample_idx", lambda a: np.concatenate([a[:3], a[4:]]), r"row \d+ has 33 tokens instead of 17|shuffle_idx"),
        ("sample_idx", lambda a: a[:, 0], "are not those of an order"),
        ("shuffle_idx", lambda a: a[:0], "are not those of an order"),
        ("doc_idx", lambda a: a.astype(float), r"doc_idx\.npy: contains float64 and not integers"),
    ],
)
def test_arrays_of_other_documents_are_refused(order: Path, name: str, change, message: str) -> None:
    np.save(array_of(order, name), change(np.load(array_of(order, name))))
    with pytest.raises(ValueError, match=message):
        open_store(order)


def test_an_order_has_no_more_rows_than_samples(order: Path) -> None:
    """Nor others than those, and no documents but its own."""
    rows = open_store(order).split("train")
    expected = rows.read(0, len(rows))
    shuffle_idx = np.load(array_of(order, "shuffle_idx"))
    np.save(array_of(order, "shuffle_idx"), np.concatenate([shuffle_idx, shuffle_idx]))
    store = open_store(order)
    longer = store.split("train")
    assert np.array_equal(longer.read(0, len(longer)), expected)
    for start, stop in ((-1, 3), (5, 4), (len(rows) - 1, len(rows) + 1)):
        with pytest.raises(IndexError, match=f"tokens {start} to {stop} are out of range; the rows have {len(rows)}"):
            longer.read(start, stop)
    for number in (-1, 10):
        with pytest.raises(ValueError, match="has 10 documents, numbered from 0"):
            store.document("train", number)


def test_missing_and_damaged_files_are_refused(order: Path) -> None:
    with pytest.raises(ValueError, match="contains an order of Megatron and no validation split; disable validation"):
        open_store(order).split("validation")
    with pytest.raises(ValueError, match=r"contains an order of Megatron and no sets; remove data\.weights"):
        open_store(order).documents_of_set("train", "A")
    path = array_of(order, "doc_idx")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"doc_idx\.npy: not an array of numpy, or a truncated one"):
        open_store(order)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has 0 files \*_doc_idx\.npy; an order of Megatron needs exactly one"):
        open_store(order)


def test_fortrans_order_is_refused(order: Path) -> None:
    path = array_of(order, "sample_idx")
    np.save(path, np.asfortranarray(np.load(path)))
    with pytest.raises(ValueError, match=r"sample_idx\.npy: is in Fortran's order"):
        open_store(order)


@pytest.mark.parametrize("pattern", ["*_doc_idx.npy", "*_sample_idx.npy", "*_shuffle_idx.npy", "*.idx", "*.bin"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(order: Path, pattern: str) -> None:
    """A memory map would end the process with SIGBUS."""
    rows = open_store(order).split("train")
    (path,) = order.glob(pattern)
    os.truncate(path, 0)
    with pytest.raises(OSError, match=rf"{path.name}: ends at byte \d+, .* truncated since the store was opened"):
        rows.read(0, len(rows))


def test_the_message_names_the_row_and_not_the_sample(order: Path) -> None:
    sample_idx = np.load(array_of(order, "sample_idx"))
    np.save(array_of(order, "sample_idx"), np.concatenate([sample_idx[:3], sample_idx[4:]]))  # sample 2 is two
    np.save(array_of(order, "shuffle_idx"), np.arange(11)[::-1])
    with pytest.raises(ValueError, match="row 8 has 33 tokens instead of 17"):
        open_store(order)
