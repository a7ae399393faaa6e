"""Whether llama.cpp is installed, for tests that run it by `llama_cpp.mjs`."""

import shutil
from pathlib import Path

ENGINE = Path(__file__).parents[2] / ".ci" / "node" / "node_modules" / "node-llama-cpp"  # `.ci/llama-cpp` installs it
HAS_LLAMA_CPP = ENGINE.exists() and shutil.which("node") is not None
