"""llama.cpp, which tests run by `llama_cpp.mjs`: whether it is installed, and what it wrote."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

ENGINE = Path(__file__).parents[2] / ".ci" / "node" / "node_modules" / "node-llama-cpp"  # `.ci/llama-cpp` installs it
HAS_LLAMA_CPP = ENGINE.exists() and shutil.which("node") is not None
TIE = 0.02  # difference of logits; llama.cpp has keys and values in float16


@torch.no_grad()
def distance_to_greedy(model: PreTrainedModel, prompt: list[int], generated: list[int]) -> float:
    """Return by how much the logit of a generated token is below the largest one, at most.

    Greedy texts of two implementations may differ after two tokens whose logits are almost equal.
    """
    logits = model(torch.tensor([[*prompt, *generated]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(generated)[:, None])
    return (logits.amax(1, keepdim=True) - chosen).max().item()
