"""Tables in Markdown of runs that differ by their seed."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from sinklm.eval.compare import stderr_of_mean


def mean_and_error(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Format the mean over seeds, and its standard error if there are several.

    Args:
        sign: ``+`` for differences, which then have a sign.
    """
    if not values:
        return ""
    mean, error = f"{fmean(values):{sign}z,.{digits}f}", stderr_of_mean(values)
    return (mean if error is None else f"{mean} ± {error:,.{digits}f}").replace("-", "\N{MINUS SIGN}")


def table(headers: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; empty without rows."""
    headers, rows = list(headers), list(rows)
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""
