"""Compute the losses of `ours.py` with the original code, mit-han-lab/streaming-llm.

    python3.11 -m venv original
    original/bin/pip install torch==2.13.0 transformers==4.33.0 "numpy<2" accelerate==0.23.0 \\
        safetensors
    git clone https://github.com/mit-han-lab/streaming-llm
    PYTHONPATH=streaming-llm original/bin/python benchmarks/streaming_reference/original.py FOLDER

Reads the output of `ours.py FOLDER` and prints the differences of the losses. The loop is that of
the original's examples/eval_long_ppl.py.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from streaming_llm.enable_streaming_llm import enable_streaming_llm
from torch.nn import CrossEntropyLoss
from transformers import AutoConfig, AutoModelForCausalLM


def load(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    missing, unexpected = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    known = ("inv_freq", "attention.bias", "masked_bias", "rotary_emb")
    missing = [name for name in missing if not any(part in name for part in known)]
    unexpected = [name for name in unexpected if not any(part in name for part in known)]
    if missing or unexpected:
        raise ValueError(f"{folder}: weights do not match the model: missing {missing}, unexpected {unexpected}")
    return model


@torch.no_grad()
def original_losses(model, ids: list, num_kept: int, window: int) -> torch.Tensor:
    kv_cache = enable_streaming_llm(model, start_size=num_kept, recent_size=window)
    losses, past_key_values, loss_fn = [], None, CrossEntropyLoss(reduction="none")
    for token, target in pairwise(ids):
        outputs = model(torch.tensor([[token]]), past_key_values=past_key_values, use_cache=True)
        losses.append(loss_fn(outputs.logits.view(-1, model.config.vocab_size), torch.tensor([target])))
        past_key_values = kv_cache(outputs.past_key_values)
    return torch.cat(losses)


def main() -> None:
    folder = Path(sys.argv[1])
    settings, ours = json.loads((folder / "ids.json").read_text()), json.loads((folder / "ours.json").read_text())
    losses = original_losses(load(folder), **settings)
    print(f"original: torch {torch.__version__}, transformers {transformers.__version__}; ours: {ours['versions']}")
    print(f"{len(losses)} losses, mean {losses.mean():.6f}")
    for name in ("banded", "token_by_token"):
        mine = torch.tensor(ours[name])
        gap = (mine - losses).abs()
        print(f"{name}: mean {mine.mean():.6f}, largest difference {gap.max():.2e}, mean difference {gap.mean():.2e}")


if __name__ == "__main__":
    main()
