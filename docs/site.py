"""Collect the pages of the site in build/pages, with the tables that come from the code.

`make docs` runs this, and then Zensical with zensical.toml.
"""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sinklm.train.keys import KeySection, key_sections

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"
FILES = ("*.md", "*.png", "*.svg", "*.json", "*.cff")  # pages, and the files that they link to
# Scripts that the site serves itself, from the npm registry: package and version, file, sha256.
# The first draws diagrams; with the second, search works from file://.
SCRIPTS = {
    "mermaid.min.js": (
        "mermaid-12.3.0",
        "dist/mermaid.min.js",
        "336df803d87a38b70a01e736e666c8f7601d2ce42f5e47c8fafe5d721074b9a3",
    ),
    "iframe-worker.js": (
        "iframe-worker-1.0.4",
        "shim/index.js",
        "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609",
    ),
}
MARKER = "<!-- `make docs` puts the {} here -->"


def page(text: str) -> str:
    """A page with the generated parts, and code in tables as Python-Markdown reads it."""
    for name, generate in {"commands": commands, "recipe keys": recipe_keys}.items():
        if (marker := MARKER.format(name)) in text:
            text = text.replace(marker, generate())
    # GitHub requires `\|` for a bar in a table's code; Python-Markdown would show the backslash.
    rows = re.compile(r"^\|.*$", flags=re.MULTILINE)
    return rows.sub(lambda row: re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0]), text)


def commands() -> str:
    """Typer's reference of the command `sinklm`, without its title and introduction."""
    command = [sys.executable, "-m", "typer", "sinklm.cli.main", "utils", "docs", "--name", "sinklm"]
    reference = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    return reference[reference.index("\n**Usage**") :]


def recipe_keys() -> str:
    """A heading and a table for each section of a recipe."""
    return "\n".join(line for section in key_sections() for line in _section(section))


def _section(section: KeySection) -> Iterator[str]:
    yield from (f"## `{section.name}`", "", section.description, "")
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for key in section.keys:
        default = "required" if key.default is None else f"`{key.default}`"
        yield f"| `{key.name}` | {key.type} | {default} | {key.description} |"
    yield ""


def download(name: str, release: str, member: str, sha256: str) -> Path:
    """The path of a script in build/; a file that is there already is used again."""
    path = ROOT / "build" / f"{release}-{name}"
    if not path.exists():
        package = release.rpartition("-")[0]
        with urllib.request.urlopen(f"https://registry.npmjs.org/{package}/-/{release}.tgz", timeout=60) as response:
            packed = io.BytesIO(response.read())
        with tarfile.open(fileobj=packed) as archive:
            content = archive.extractfile(f"package/{member}").read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"{release}: {member} is not the file that docs/site.py expects")
        path.write_bytes(content)
    return path


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    for folder in ("", "docs/**", "examples/**"):
        for path in (path for pattern in FILES for path in ROOT.glob(f"{folder}/{pattern}".lstrip("/"))):
            copy = PAGES / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes() if path.suffix != ".md" else page(path.read_text("utf-8")).encode())
    for name, source in SCRIPTS.items():
        try:
            shutil.copy(download(name, *source), PAGES / name)
        except OSError as error:
            print(f"warning: the site has no {name}, because it could not be downloaded: {error}")


if __name__ == "__main__":
    main()
