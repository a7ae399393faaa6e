"""Names to suggest for a wrong one."""

import string

import hypothesis.strategies as st
from hypothesis import given

from sinklm.text import near_hint, near_names

NAMES = st.lists(st.text(string.ascii_lowercase + "-/", min_size=1, max_size=12), max_size=12, unique=True)


@given(name=st.text(string.ascii_letters + "-", max_size=12), names=NAMES)
def test_suggestions_are_names_that_there_are_and_an_equal_one_is_the_first(name, names):
    near = near_names(name, names)
    assert set(near) <= set(names)
    assert len(near) == len(set(near))
    if name in names:
        assert near[0] == name
    hint = near_hint(name, names)
    assert bool(hint) == bool(near)
    assert all(each in hint for each in near)


def test_misspelt_partial_and_swapped_names_are_found():
    recipes = ["paper/vanilla", "study/vanilla", "pythia-14m", "pythia-160m", "quickstart"]
    assert near_hint("vanilla", recipes) == "did you mean paper/vanilla or study/vanilla?"
    assert near_names("quikstart", recipes) == ["quickstart"]
    assert near_names("Pythia-160M", recipes)[0] == "pythia-160m"
    assert near_names("nothing", recipes) == []
    assert near_hint("x", [], others=["a", "b", "c"], prefix="") == "did you mean a, b or c?"
