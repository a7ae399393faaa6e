"""Where the ranks run."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.train.hosts import check_same, describe_ranks
from sinklm.train.launch import SameOnAllRanks, World


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        (["gpu001"] * 8 + ["gpu002"] * 8, "ranks: 0–7 on gpu001, 8–15 on gpu002"),
        (["a", "b", "a"], "ranks: 0, 2 on a, 1 on b"),
        (["a", "b", "b", "a", "a"], "ranks: 0, 3–4 on a, 1–2 on b"),
    ],
)
def test_the_line_of_hosts(hosts, line):
    assert describe_ranks(hosts) == line


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40))
def test_every_rank_is_on_its_host(hosts):
    parts = re.findall(r"((?:\d[\d–]*(?:, )?)+) on (\w)", describe_ranks(hosts))
    assert sorted(host for _, host in parts) == sorted(set(hosts))
    told = {}
    for ranges, host in parts:
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", ranges):
            told |= dict.fromkeys(range(int(first), int(last or first) + 1), host)
    assert [told[rank] for rank in range(len(hosts))] == hosts


class World4(World):
    """Rank 1 of 4, where ranks 2 and 3 have the same values as rank 1."""

    def gather(self, value):
        return [{"lr": 0.1} if value is None else "", value, value, value]


def test_the_first_rank_that_differs_is_named_once():
    with pytest.raises(SameOnAllRanks, match=r"^rank 1 and 2 more: lr is 0.2 on \S+, but 0.1 on rank 0: fix it$"):
        check_same(World4(1, 4, 0, None), {"lr": 0.2}, "fix it")
    check_same(World4(1, 4, 0, None), {"lr": 0.1}, "fix it")


def test_a_missing_value_differs():
    with pytest.raises(SameOnAllRanks, match="lr is None on"):
        check_same(World4(1, 4, 0, None), {}, "fix it")
