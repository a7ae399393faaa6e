"""The contents of the built distributions. `.ci/wheel` uses the wheel without the extras."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {path.name for path in (ROOT / "src" / "sinklm").iterdir() if path.is_symlink()}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Paths of all files in the repository, including untracked files and links to folders."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout of the repository")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in listed if (ROOT / name).exists()})


@pytest.fixture(scope="module")
def dist(files, tmp_path_factory) -> Path:
    """A folder with an sdist, a wheel built from it, and in ``direct`` one of the repository."""
    tree = tmp_path_factory.mktemp("tree")  # a copy, because a build creates files
    for name in files:
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    subprocess.run([*build, "--outdir", out, tree], check=True, capture_output=True)
    subprocess.run([*build, "--wheel", "--outdir", out / "direct", tree], check=True, capture_output=True)
    return out


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_wheel_holds_every_module_and_recipe_once(files, dist):
    expected = {f"sinklm/{name}" for name in files if name.split("/")[0] in PARTS and name.endswith((".py", ".yaml"))}
    expected |= {name.removeprefix("src/") for name in files if name.startswith("src/") and Path(name).suffix}
    with zipfile.ZipFile(one(dist, "*.whl")) as wheel:
        counts = Counter(name for name in wheel.namelist() if ".dist-info/" not in name)
    assert set(counts) == expected
    assert set(counts.values()) == {1}


def test_the_sdist_holds_every_file_once(files, dist):
    expected = {
        f"src/sinklm/{name}" if name.split("/")[0] in PARTS else name
        for name in files
        if name not in {f"src/sinklm/{part}" for part in PARTS}  # the links
    }
    hosting = {name for name in expected if name.startswith(".") and not name.startswith(".ci/")}
    with tarfile.open(one(dist, "*.tar.gz")) as sdist:
        counts = Counter(member.name.partition("/")[2] for member in sdist.getmembers() if not member.isdir())
    made = {name for name in counts if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert set(counts) - made == expected - hosting
    assert set(counts.values()) == {1}


def test_a_wheel_from_the_sdist_is_the_wheel_of_the_repository(dist):
    contents = []
    for folder in (dist, dist / "direct"):
        with zipfile.ZipFile(one(folder, "*.whl")) as wheel:
            contents.append({name: wheel.read(name) for name in wheel.namelist()})
    assert contents[0] == contents[1]


def test_type_checkers_see_the_installed_package(tmp_path):
    (tmp_path / "program.py").write_text("from sinklm import StreamingCache\nreveal_type(StreamingCache.for_model)\n")
    only_ours = "[mypy]\nfollow_imports = skip\n[mypy-sinklm.*]\nfollow_imports = normal\n"  # others are slow
    (tmp_path / "mypy.ini").write_text(only_ours)
    mypy = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "program.py"]
    result = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True)
    assert "num_kept: int, window: int" in result.stdout, result.stdout
    assert "-> sinklm.streaming.cache.StreamingCache" in result.stdout
