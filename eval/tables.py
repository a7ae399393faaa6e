"""Tables of the commands that measure several models, for terminals and in Markdown."""

from collections.abc import Sequence

from rich.table import Table

from ..console import UNBROKEN, Console


def fitting_table(wide: Table, long: Table, width: int) -> Table:
    """Return ``wide`` if it fits into a terminal of ``width`` columns, else ``long``."""
    return wide if Console(width=UNBROKEN).measure(wide).maximum <= width else long


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> str:
    """Return a table in Markdown. All columns but the first ``num_text_columns`` have numbers."""
    rule = ["---"] * num_text_columns + ["---:"] * (len(header) - num_text_columns)
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in [header, rule, *rows])


def number(value: float, num_decimals: int) -> str:
    """Format a number with separators, and one of over twelve digits in scientific notation."""
    return f"{value:,.{num_decimals}f}" if abs(value) < 1e12 else f"{value:.3e}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
