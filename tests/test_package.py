"""The built distributions: their contents, and that the wheel works without the extras."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from sinklm.extras import EXTRAS

from .eval.checkpoints import small_model, write_checkpoint

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


# A program that has only the base installation.
PROGRAM = """
import sys
from pathlib import Path

for name in {blocked!r}:
    sys.modules[name] = None  # any import of it fails
folder, checkpoint, export = map(Path, sys.argv[1:])
sys.path.insert(0, str(folder))

import sinklm
assert Path(sinklm.__file__).is_relative_to(folder), sinklm.__file__

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from sinklm import StreamingCache, load_model
from sinklm.checkpoints.export import export_model

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
cache = StreamingCache.for_model(model, num_kept=2, window=6)
ids = model.generate(
    torch.tensor([[1, 2, 3]]), past_key_values=cache, min_new_tokens=50, max_new_tokens=50, do_sample=False
)
assert ids.shape == (1, 53) and cache.get_seq_length() == 52

export_model(checkpoint, export)
assert type(load_model(export)).__name__ == "GPTNeoXForCausalLM"
"""


def test_the_wheel_works_without_the_extras(dist, tmp_path):
    folder = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder]
    subprocess.run([*pip, one(dist, "*.whl")], check=True)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_model(num_sinks=1))
    blocked = sorted({module for modules in EXTRAS.values() for module in modules} - {"numpy"})  # transformers needs it
    code = PROGRAM.format(blocked=[*blocked, "accelerate", "peft"])
    subprocess.run([sys.executable, "-c", code, folder, checkpoint, tmp_path / "export"], check=True, cwd=tmp_path)


def test_type_checkers_see_the_installed_package(tmp_path):
    (tmp_path / "program.py").write_text("from sinklm import StreamingCache\nreveal_type(StreamingCache.for_model)\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"
    )  # they are slow
    mypy = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "program.py"]
    result = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True)
    assert "num_kept: int, window: int" in result.stdout, result.stdout
    assert "-> sinklm.streaming.cache.StreamingCache" in result.stdout
