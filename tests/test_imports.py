"""Which part may import which, without circular imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sinklm"
ROOT_MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}  # every part may import these
MAY_IMPORT: dict[str, set[str]] = {
    "models": set(),
    "streaming": {"models"},
    "checkpoints": {"models"},
    "data": set(),
    "configs": set(),
    "train": {"models", "streaming", "checkpoints", "data", "configs"},
    "eval": {"models", "streaming", "checkpoints", "data"},
    "cli": {"models", "streaming", "checkpoints", "data", "train", "eval", "configs"},
}


def test_every_part_is_a_link_to_a_folder_of_the_repository():
    parts = {path.name for path in PACKAGE.iterdir() if path.is_symlink()}
    assert parts == set(MAY_IMPORT)
    for part in parts:
        assert (PACKAGE / part).resolve() == ROOT / part


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part):
    for path in (ROOT / part).rglob("*.py"):
        for imported in imported_parts(path):
            allowed = {part} | MAY_IMPORT[part] | ROOT_MODULES
            assert imported in allowed, f"{path.relative_to(ROOT)} imports sinklm.{imported}"


def test_the_root_modules_import_no_part():
    for name in ROOT_MODULES:
        assert not imported_parts(PACKAGE / f"{name}.py", folder=PACKAGE) - ROOT_MODULES


def imported_parts(path: Path, folder: Path = ROOT) -> set[str]:
    """Return the parts of sinklm that a file imports, relatively or by name, at any depth."""
    package = ("sinklm", *path.relative_to(folder).with_suffix("").parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names += [f"{base}{node.module or ''}.{alias.name}".replace("..", ".") for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("sinklm.")}


def test_the_check_sees_every_form_of_import(tmp_path):
    (tmp_path / "models" / "inner").mkdir(parents=True)
    path = tmp_path / "models" / "inner" / "x.py"
    path.write_text(
        "def f():\n    from ...train import loop\nimport sinklm.eval.plots\nfrom ... import cli\nfrom ..config import y"
    )
    assert imported_parts(path, tmp_path) == {"train", "eval", "cli", "models"}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_modules_of_a_part_import_each_other_without_circles(part):
    modules = {path.relative_to(ROOT): path for path in (ROOT / part).rglob("*.py")}
    names = {".".join(("sinklm", *path.with_suffix("").parts)): path for path in modules}
    edges = {path: {names[n] for n in top_level_imports(path) if n in names} - {path} for path in modules}
    done: set[Path] = set()
    while ready := {path for path in edges if path not in done and edges[path] <= done}:
        done |= ready
    assert done == set(edges), f"circular imports among {sorted(map(str, set(edges) - done))}"


def top_level_imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports when it is imported."""
    package = ("sinklm", *path.parts[:-1])
    names: set[str] = set()
    nodes: list[ast.AST] = list(ast.parse((ROOT / path).read_text()).body)
    for node in nodes:
        if isinstance(node, ast.Try):
            nodes += node.body
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package[: len(package) - node.level + 1])
            module = f"{base}.{node.module}" if node.module else base
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def test_import_sinklm_loads_nothing():
    code = "import sys, sinklm; print([m for m in sys.modules if m.startswith(('sinklm.', 'torch', 'transformers'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("part", "foreign"),
    [("streaming", {"checkpoints"}), ("checkpoints", {"streaming"}), ("train", {"eval"})],
)
def test_a_part_loads_no_other(part, foreign):
    """Not even through the parts that it imports."""
    loaded, found = set(), {part}
    while found - loaded:
        loaded |= found
        found = set().union(*(imported_parts(path) for name in loaded for path in (ROOT / name).rglob("*.py")))
        found &= set(MAY_IMPORT)
    assert not loaded & foreign


def test_streaming_loads_nothing_but_code_of_transformers():
    code = """
import sys, torch
from transformers import DynamicCache, GPTNeoXForCausalLM
before = set(sys.modules)
import sinklm.streaming
print(*sorted({name.partition(".")[0] for name in sys.modules if name not in before}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["sinklm", "transformers"]
