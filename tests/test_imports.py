"""Which folder may import which: the direction of dependencies between the parts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOT_MODULES = {path.stem for path in (ROOT / "sinklm").glob("*.py")} - {"__init__"}  # any folder may import them
MAY_IMPORT = {
    "models": set(),
    "data": set(),
    "configs": set(),
    "train": {"models", "data", "configs"},
    "eval": {"models", "data"},
    "cli": {"models", "data", "train", "eval", "configs"},
}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for part in imported_parts(path):
            allowed = {folder} | MAY_IMPORT[folder] | ROOT_MODULES
            assert part in allowed, f"{path.relative_to(ROOT)} imports sinklm.{part}"


def imported_parts(path: Path) -> set[str]:
    """The parts of sinklm that a file imports, relatively or by name, at any depth of nesting."""
    package = ("sinklm", *path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names += [f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("sinklm.")}


def test_the_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_imports.ROOT", tmp_path)
    (tmp_path / "models" / "inner").mkdir(parents=True)
    path = tmp_path / "models" / "inner" / "x.py"
    path.write_text(
        "def f():\n    from ...train import loop\nimport sinklm.eval.plots\nfrom ... import cli\nfrom ..config import y"
    )
    assert imported_parts(path) == {"train", "eval", "cli", "models"}
