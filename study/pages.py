"""Pages of results: docs/results/NAME.md has tables that are made from docs/results/NAME.json.

Each table replaces the one between its marks in the page, `<!-- NAME OF THE TABLE -->` and
`<!-- end -->`; the text around the tables is written by hand.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sinklm.parsing import named_damage, parse_json

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"

Data = dict[str, Any]
Tables = dict[str, str]  # Markdown by name


def make_page(
    name: str,
    description: str | None,
    tables: Callable[[Data], Tables],
    collect: Callable[[Path], Data] | None = None,
) -> tuple[Data, Path]:
    """Run the command of a report: put the tables of NAME.json into NAME.md, and print them.

    Args:
        description: of the command, for its help.
        tables: returns the tables of the page.
        collect: returns the new content of NAME.json from the folder on the command line, if one is
            given; None: that of NAME.json in that folder, as NAME_study.py writes it, with numbers
            rounded to seven digits.

    Returns:
        The data and the folder of the page, for its pictures.

    Raises:
        FileNotFoundError: the data is missing.
        ValueError: nothing was measured yet.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help=f"of the study; default: use {name}.json again")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the page")
    arguments = parser.parse_args()
    data, folder = arguments.output / f"{name}.json", arguments.folder
    if folder is None:
        found = read(data, "pass the folder of the study")
    elif collect is None:
        found = read(folder / data.name, f"run {name}_study.py", parse_float=rounded)
    else:
        found = json.loads(json.dumps(collect(folder)))  # as it is read again
    made = tables(found)
    if not any(made.values()):
        raise ValueError(f"{folder or data} has no results yet: run the study until some are measured")
    if folder is not None:
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(found) + "\n", encoding="utf-8")
    write_page(data.with_suffix(".md"), made)
    print(as_text(made))
    return found, arguments.output


def read(path: Path, remedy: str, **options: Any) -> Data:
    """Return the content of a JSON file; ``options`` are those of `json.loads`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    with named_damage(path, remedy):
        return parse_json(path.read_bytes(), **options)


def rounded(number: str) -> float:
    return float(f"{float(number):.7g}")


def write_page(page: Path, tables: Tables) -> None:
    """Put each table between its marks. A page that does not exist is created."""
    marked = {name: f"<!-- {name} -->\n{table}\n<!-- end -->" for name, table in tables.items() if table}
    text = page.read_text(encoding="utf-8") if page.exists() else "\n\n".join(marked.values()) + "\n"
    for name in tables:
        marks = marked.get(name, f"<!-- {name} -->\n<!-- end -->")
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, marks=marks: marks, text, flags=re.DOTALL)
    page.write_text(text, encoding="utf-8")


def as_text(tables: Tables) -> str:
    """Return all tables that are not empty, with their names."""
    return "".join(f"{name}\n\n{table}\n\n" for name, table in tables.items() if table)
