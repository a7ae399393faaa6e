import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.data import SetWindows, TokenStore, TokenWindows, WeightedOrder, batch_indices, find_inputs, prepare_store
from sinklm.data.mixture import BLOCK, shares_of

from .corpora import content, expected_documents, records, stored_documents, write_json_lines
from .processes import InProcessPool

SETS = ("A", "B (en)", "c/d")
mixtures = st.dictionaries(
    st.sampled_from([f"set {i}" for i in range(9)]),
    st.tuples(st.integers(1, 400), st.one_of(st.floats(1e-4, 1e4), st.integers(1, 10**12).map(float))),
    min_size=1,
)
seeds = st.integers(0, 2**64 - 1)


def order_of(mixture: dict[str, tuple[int, float]], seed: int) -> WeightedOrder:
    return WeightedOrder({k: n for k, (n, _) in mixture.items()}, {k: w for k, (_, w) in mixture.items()}, seed)


def set_of(mixture: dict[str, tuple[int, float]], windows: np.ndarray) -> list[tuple[str, int]]:
    """The set of each window and its number in the set, one by one."""
    places = [(name, i) for name, (num, _) in mixture.items() for i in range(num)]
    return [places[window] for window in windows]


@given(mixtures, seeds, st.integers(0, 5 * BLOCK))
def test_shares_are_exact_in_every_prefix(mixture: dict, seed: int, length: int) -> None:
    order = order_of(mixture, seed)
    blocks = length // order.block
    counts = Counter(name for name, _ in set_of(mixture, order(np.arange(blocks * order.block))))
    total = sum(Fraction(repr(weight)) for _, weight in mixture.values())
    for name, (_, weight) in mixture.items():
        exact = blocks * order.block * Fraction(repr(weight)) / total
        assert abs(counts[name] - exact) < max(1, len(mixture) - 1)


@given(mixtures, seeds)
def test_every_set_has_epochs_of_its_own(mixture: dict, seed: int) -> None:
    order = order_of(mixture, seed)
    seen: dict[str, list[int]] = {name: [] for name in mixture}
    for name, window in set_of(mixture, order(np.arange(3 * order.block))):
        seen[name].append(window)
    for name, (num, _) in mixture.items():
        whole, rest = divmod(len(seen[name]), num)
        counts = Counter(seen[name])
        # A block is not in the order of its epochs, but as a whole it ends where its set stands.
        assert sorted(Counter(counts.values()).items()) == sorted(
            {k: v for k, v in {whole: num - rest, whole + 1: rest}.items() if k and v}.items()
        )


@given(mixtures, seeds, st.lists(st.integers(0, 10**14), min_size=1, max_size=6))
def test_any_positions_give_the_same_windows(mixture: dict, seed: int, positions: list[int]) -> None:
    order = order_of(mixture, seed)
    expected = [order(i) for i in positions]
    assert order(np.array(positions)).tolist() == expected
    assert order(np.array([positions])).shape == (1, len(positions))
    turned = order_of(dict(sorted(mixture.items())), seed), order_of(dict(sorted(mixture.items())[::-1]), seed)
    places = [set_of(dict(sorted(mixture.items())), turned[0](np.array(positions)))]
    places += [set_of(dict(sorted(mixture.items())[::-1]), turned[1](np.array(positions)))]
    assert places[0] == places[1]


@given(mixtures, seeds, st.integers(0, 300))
def test_resuming_at_any_step_on_any_ranks_gives_the_same_samples(mixture: dict, seed: int, first: int) -> None:
    whole = order_of(mixture, seed)(np.arange(302 * 12)).reshape(302, 12)
    resumed = order_of(mixture, seed)
    for step in (first, first + 1):
        for rank in range(3):
            assert np.array_equal(resumed(batch_indices(step, 12, rank, 3)), whole[step, rank::3])


def test_the_order_never_changes_between_versions() -> None:
    # A resumed run must get the same samples, so these numbers must never change.
    order = WeightedOrder({"A": 10, "B": 1000}, {"A": 0.1, "B": 0.9}, 1234)
    assert order(np.arange(1020, 1028)).tolist() == [957, 674, 406, 421, 1, 7, 1003, 846]


def test_epochs_seeds_and_sets_differ() -> None:
    first = WeightedOrder({"A": 1000, "B": 1000}, {"A": 1, "B": 1}, 1)
    other = WeightedOrder({"A": 1000, "B": 1000}, {"A": 1, "B": 1}, 2)
    a, b = first(np.arange(1024)), other(np.arange(1024))
    assert (a == b).sum() < 12
    in_a, in_b = a[a < 1000], a[a >= 1000] - 1000
    assert (in_a[:400] == in_b[:400]).sum() < 12
    # Sets are mixed within a block: the number of changes of set is 512 ± 16.
    assert abs(int((np.diff(a < 1000) != 0).sum()) - 512) < 100


def test_weights_are_exact_decimals() -> None:
    assert shares_of({"b": 0.1, "a": 0.2, "c": 0.0}) == {"a": Fraction(2, 3), "b": Fraction(1, 3)}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[list[dict]]]:
    monkeypatch.setattr("sinklm.data.prepare.ProcessPoolExecutor", InProcessPool)
    rows = [records(seed, 40, set_names=SETS) for seed in (1, 2)]
    for i, part in enumerate(rows):
        write_json_lines(tmp_path / f"{i}.jsonl", part)
    return tmp_path, rows


def prepare(folder: Path, name: str, tokenizer_file: Path, **settings: object) -> Path:
    shards = find_inputs([str(folder / f"{i}.jsonl") for i in (0, 1)]).shards
    prepare_store(shards, folder / name, tokenizer=tokenizer_file, **{"validation_fraction": 0.2, **settings})
    return folder / name


def test_each_set_has_files_of_its_own(corpus: tuple, tokenizer_file: Path) -> None:
    folder, rows = corpus
    store = TokenStore(prepare(folder, "split", tokenizer_file, split_sets=True))
    mixed = TokenStore(prepare(folder, "mixed", tokenizer_file))
    names = ("A", "B%20%28en%29", "c%2Fd")
    assert store.manifest.splits["train"].shards == [f"train/0000{i}.{name}" for i in (0, 1) for name in names]
    for split in ("train", "validation"):
        assert store.manifest.splits[split].sets == mixed.manifest.splits[split].sets
        assert store.manifest.splits[split].total == mixed.manifest.splits[split].total
    for split in ("train", "validation"):
        for set_name in SETS:
            stream = store.documents_of_set(split, set_name)
            tokens = stream.read(0, len(stream)).tolist()
            chosen = [row["text"] for part in rows for row in part if row["meta"]["pile_set_name"] == set_name]
            documents = expected_documents(chosen, tokenizer_file)
            held_out = stored_documents(mixed.path, mixed.manifest, "validation")
            expected = [document for document in documents if (document in held_out) == (split == "validation")]
            assert tokens == [token for document in expected for token in document]
    for what in ("split_sets: True then, False now", "split_sets: False then, True now"):
        is_split = what.startswith("split_sets: True")
        with pytest.raises(ValueError, match="other settings"):
            prepare(folder, "split" if is_split else "mixed", tokenizer_file, split_sets=not is_split)


def test_windows_of_sets_follow_each_other(corpus: tuple, tokenizer_file: Path) -> None:
    store = TokenStore(prepare(corpus[0], "split", tokenizer_file, split_sets=True))
    windows = SetWindows(store, "train", list(SETS), tokens_per_sample=16, stride=15)
    number = 0
    for name in SETS:
        of_set = TokenWindows(store, "train", tokens_per_sample=16, stride=15, set_name=name)
        assert windows.num_windows[name] == len(of_set) > 3
        for i in range(len(of_set)):
            assert windows.place_of(number) == (name, i)
            assert np.array_equal(windows[number], of_set[i])
            number += 1
    assert number == len(windows)
    with pytest.raises(IndexError, match=f"window {number} is out of range"):
        windows[number]


def test_sets_that_cannot_be_weighted_are_refused(corpus: tuple, tmp_path: Path, tokenizer_file: Path) -> None:
    folder, _ = corpus
    mixed = TokenStore(prepare(folder, "mixed", tokenizer_file))
    store = TokenStore(prepare(folder, "split", tokenizer_file, split_sets=True))
    with pytest.raises(ValueError, match=r"'A' are in the same files as those of other sets; .*--split-sets"):
        mixed.documents_of_set("train", "A")
    rows = [[{"text": "a sink", "meta": {"pile_set_name": name}} for name in names] for names in ("AAA", "AB")]
    for i, part in enumerate(rows):
        write_json_lines(tmp_path / f"{i}.jsonl", part)
    partly = TokenStore(prepare(tmp_path, "partly", tokenizer_file, validation_fraction=0.0))
    for name in "AB":
        with pytest.raises(ValueError, match=rf"'{name}' are in the same files as those of other sets"):
            partly.documents_of_set("train", name)
    with pytest.raises(ValueError, match=r"has no set 'D' in the train split, only A, B \(en\), c/d"):
        store.documents_of_set("train", "D")
    with pytest.raises(ValueError, match=r"set 'A' in the train split has \d+ tokens, fewer than one sample of 9999"):
        SetWindows(store, "train", ["A"], tokens_per_sample=9999, stride=9999)


def test_stores_of_older_versions_have_no_counts_by_shard(tmp_path: Path, corpus: tuple, tokenizer_file: Path) -> None:
    for name, rows in (("one", [{"text": "a sink"}] * 9), ("two", records(1, 40))):
        path = write_json_lines(tmp_path / f"{name}.jsonl", rows)
        prepare_store(find_inputs([str(path)]).shards, tmp_path / name, tokenizer=tokenizer_file)
        manifest = json.loads((tmp_path / name / "manifest.json").read_bytes())
        for split in manifest["splits"].values():
            del split["shard_sets"]
        for key in ("text_key", "split_sets"):
            del manifest[key]
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    one, two = TokenStore(tmp_path / "one"), TokenStore(tmp_path / "two")
    assert len(one.documents_of_set("train", "one")) == len(one.split("train"))
    with pytest.raises(ValueError, match=r"'A' are in the same files .*--split-sets"):
        two.documents_of_set("train", "A")


def test_after_a_crash_the_files_of_sets_are_the_same(
    corpus: tuple, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = corpus
    monkeypatch.setattr("sinklm.data.prepare.BATCH_BYTES", 2000)
    monkeypatch.setattr("sinklm.data.prepare.COMMIT_SECONDS", 0.0)
    whole = content(prepare(folder, "whole", tokenizer_file, split_sets=True))
    for stop_at in range(1, 5):
        calls = iter(range(stop_at, -1, -1))

        def crash(progress: object, calls: object = calls) -> None:
            if next(calls, 0) == 0:  # type: ignore[call-overload]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(folder, f"crashed-{stop_at}", tokenizer_file, split_sets=True, report=crash)
        assert content(prepare(folder, f"crashed-{stop_at}", tokenizer_file, split_sets=True)) == whole


def test_too_many_sets_are_refused(corpus: tuple, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklm.data.job.MAX_PARTS", 4)
    with pytest.raises(ValueError, match="a shard has at most 2 sets"):
        prepare(corpus[0], "split", tokenizer_file, split_sets=True)
