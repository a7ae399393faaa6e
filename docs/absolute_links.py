"""Make the links of README.md absolute, for the page on the package index.

    python docs/absolute_links.py

The release steps run this before the build and undo it afterwards. The address is the key
`Repository` of `[project.urls]` in pyproject.toml. Links point to the tag of the built version.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def relative_links(text: str) -> list[str]:
    """The targets of all links and images in Markdown that are not absolute."""
    return [match["target"] for match in LINK.finditer(text) if not is_absolute(match["target"])]


def absolute_links(text: str, repository: str, version: str) -> str:
    """Markdown with all links on ``repository``, at the tag of ``version``."""

    def replace(match: re.Match[str]) -> str:
        image, label, target = match["image"], match["text"], match["target"]
        if not is_absolute(target):
            view = "raw" if image else "blob"
            target = f"{repository.rstrip('/')}/{view}/v{version}/{target.removeprefix('./')}"
        return f"{image}[{label}]({target})"

    return LINK.sub(replace, text)


def is_absolute(target: str) -> bool:
    return target.startswith(("https://", "http://", "mailto:"))


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    if not repository:
        sys.exit("error: pyproject.toml has no [project.urls] with a key Repository: add the address of the repository")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(absolute_links(text, repository, project["version"]), encoding="utf-8")


if __name__ == "__main__":
    main()
