"""Where the ranks run."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinklm.train.ranks import describe_ranks


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
