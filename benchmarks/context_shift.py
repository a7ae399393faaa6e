"""Perplexity of a long text in llama.cpp with its context shift, beside StreamingCache.

``.ci/llama-cpp`` installs llama.cpp; ``python benchmarks/context_shift.py`` prints the table of
docs/gguf.md: about ten minutes on a CPU core.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean

import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.gguf_export import export_gguf
from sinklm.eval.perplexity import Configuration, measure, read_text_files

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / ".ci" / "node" / "node_modules" / "node-llama-cpp"
CHECKPOINTS = ROOT / "examples" / "checkpoints"


def llama_cpp_losses(model: Path, ids: list[int], size: int, kept: int) -> list[float]:
    """Losses of ``ids[1:]`` in a context of ``size`` tokens that keeps the first ``kept``."""
    command = ["node", str(Path(__file__).with_suffix(".mjs")), str(ENGINE)]
    job = json.dumps({"model": str(model), "ids": ids, "size": size, "kept": kept})
    return json.loads(subprocess.run(command, input=job, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | context | kept | llama.cpp, context shift | StreamingCache of the same size |")
    print("|---|---|---|---|---|")
    for name in ("learnable-sink", "vanilla"):
        model = load_model(CHECKPOINTS / name, device="cpu", dtype=torch.float32)
        tokenizer = load_tokenizer(CHECKPOINTS / name)
        text = read_text_files([CHECKPOINTS / "book.txt"], tokenizer, arguments.tokens)
        ids = text.ids.tolist()
        with tempfile.TemporaryDirectory() as folder:
            path = export_gguf(CHECKPOINTS / name, folder, dtype="float32")
            for size in arguments.sizes:
                for kept in (0, 1, 4):
                    shifted = llama_cpp_losses(path, ids, size, kept)
                    streamed = measure(model, text, Configuration("streaming" if kept else "window", kept, size - kept))
                    perplexity = math.exp(fmean(shifted[text.num_prefix - 1 if text.num_prefix else 0 :]))
                    print(f"| {name} | {size} | {kept} | {perplexity:.2f} | {streamed.perplexity:.2f} |", flush=True)


if __name__ == "__main__":
    main()
