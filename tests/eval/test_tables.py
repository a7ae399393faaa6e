"""Tables for terminals and Markdown."""

import pytest
from rich.table import Table

from sinklm.eval.tables import fitting_table, markdown_table, number


@pytest.mark.parametrize(("width", "is_wide"), [(11, True), (10, False)])
def test_a_table_that_does_not_fit_is_replaced(width, is_wide):
    wide, long = Table("a|b[/b]"), Table("a")  # wide is "│ a|b[/b] │": a name is no markup
    assert (fitting_table(wide, long, width) is wide) == is_wide


def test_cells_in_markdown_are_escaped():
    assert markdown_table(["Run", "Loss"], [["a|b", "1.5"]], 1) == "| Run | Loss |\n| --- | ---: |\n| a\\|b | 1.5 |"


def test_numbers_of_many_digits_are_short():
    assert [number(value, 2) for value in (1234.567, -0.5, 2.5e12)] == ["1,234.57", "-0.50", "2.500e+12"]
