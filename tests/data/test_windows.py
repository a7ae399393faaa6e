import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sinklm.data import TokenWindows
from sinklm.data.sequence import TokenFile, TokenSequence


class FakeStore:
    """A store of one split, "train", over these files."""

    path = Path("somewhere")

    def __init__(self, stream: TokenSequence):
        self.stream = stream

    def split(self, name: str) -> TokenSequence:
        return self.stream


def store_of(folder: Path, sizes: list[int], dtype: type = np.uint16, row_length: int | None = None) -> FakeStore:
    """Files of these sizes whose tokens count up from 0 through all of them."""
    start, paths = 0, []
    for i, size in enumerate(sizes):
        paths.append(folder / f"{i}.bin")
        np.arange(start, start + size, dtype=dtype).tofile(paths[-1])
        start += size
    return FakeStore(TokenSequence(paths, np.dtype(dtype), vocab_size=2**16, row_length=row_length))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 8), st.data())
def test_windows_are_slices_of_all_tokens_behind_each_other(
    tmp_path: Path, sizes: list[int], tokens_per_sample: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, tokens_per_sample))
    store = store_of(tmp_path, sizes, data.draw(st.sampled_from([np.uint16, np.int32])))
    tokens = list(range(sum(sizes)))
    starts = [i for i in range(0, len(tokens), stride) if i + tokens_per_sample <= len(tokens)]
    expected = [tokens[i : i + tokens_per_sample] for i in starts]
    if not expected:
        with pytest.raises(ValueError, match="fewer than one sample"):
            TokenWindows(store, "train", tokens_per_sample=tokens_per_sample, stride=stride)
        return
    windows = TokenWindows(store, "train", tokens_per_sample=tokens_per_sample, stride=stride)
    assert [windows[i].tolist() for i in range(len(windows))] == expected
    assert windows[0].dtype == np.int64
    assert windows.num_remaining_tokens == len(tokens) - 1 - expected[-1][-1]


def test_without_sinks_every_token_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    windows = TokenWindows(store_of(tmp_path, [7, 14]), "train", tokens_per_sample=5, stride=4)
    targets = np.concatenate([windows[i][1:] for i in range(len(windows))])
    assert targets.tolist() == list(range(1, 21))


def test_of_rows_each_window_is_the_beginning_of_one(tmp_path: Path) -> None:
    store = store_of(tmp_path, [8, 8, 4], row_length=5)  # four rows; rows 2 and 4 span two files
    whole = TokenWindows(store, "train", tokens_per_sample=5, stride=4)
    assert [whole[i].tolist() for i in range(len(whole))] == np.arange(20).reshape(4, 5).tolist()
    assert whole.num_remaining_tokens == 0
    part = TokenWindows(store, "train", tokens_per_sample=4, stride=4)
    assert [part[i].tolist() for i in range(len(part))] == np.arange(20).reshape(4, 5)[:, :4].tolist()
    assert part.num_remaining_tokens == 4
    with pytest.raises(ValueError, match="rows of 5 tokens, fewer than one sample of 6"):
        TokenWindows(store, "train", tokens_per_sample=6, stride=5)


def test_windows_travel_to_other_processes_without_the_data(tmp_path: Path) -> None:
    windows = TokenWindows(store_of(tmp_path, [60000]), "train", tokens_per_sample=5, stride=4)
    expected = windows[100].tolist()
    pickled = pickle.dumps(windows)
    assert len(pickled) < 2000
    assert pickle.loads(pickled)[100].tolist() == expected


def test_a_window_is_a_copy(tmp_path: Path) -> None:
    windows = TokenWindows(store_of(tmp_path, [10]), "train", tokens_per_sample=5, stride=4)
    windows[0][:] = 99
    assert windows[0].tolist() == [0, 1, 2, 3, 4]


def test_places_outside_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, [10])
    windows = TokenWindows(store, "train", tokens_per_sample=5, stride=4)
    for i in (-1, len(windows)):
        with pytest.raises(IndexError, match=f"window {i} is out of range; there are 2"):
            windows[i]
    with pytest.raises(IndexError, match="tokens 8 to 11 are out of range; the sequence has 10"):
        store.split("train").read(8, 11)
    for stride in (0, 6):
        with pytest.raises(ValueError, match=f"stride is {stride}"):
            TokenWindows(store, "train", tokens_per_sample=5, stride=stride)


def test_a_copy_of_a_file_has_a_descriptor_of_its_own(tmp_path: Path) -> None:
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "x.bin")
    file = TokenFile(tmp_path / "x.bin", np.dtype(np.uint16))
    for copied in (pickle.loads(pickle.dumps(file)), copy.copy(file), copy.deepcopy(file)):
        assert copied.read(2, 5).tolist() == [2, 3, 4]
    del copied
    assert file.read(2, 5).tolist() == [2, 3, 4]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_read_may_return_fewer_bytes_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Linux returns at most 2 GiB at once, and network file systems less."""
    np.arange(40, dtype=np.uint16).tofile(tmp_path / "x.bin")
    file, pread = TokenFile(tmp_path / "x.bin", np.dtype(np.uint16), offset=4), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, begin: pread(descriptor, min(size, most), begin))
    assert file.read(5, 30).tolist() == list(range(7, 32))
    with pytest.raises(OSError, match="ends at byte 80,"):
        file.read(5, 39)
