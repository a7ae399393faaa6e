"""Exports with the results of their checkpoints, for `stock.py`; ``python -m`` writes them."""

import sys
from pathlib import Path

import torch

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.checkpoints.export import export_model

from ..eval.checkpoints import small_model, write_checkpoint

TEXT = "The old man went down to the sea"
TEXTS = ["The old man", TEXT, "Once upon a time there was a king who had three sons, and"]
KINDS = [(0, torch.float32), (1, torch.float32), (1, torch.bfloat16), (2, torch.float32), (2, torch.bfloat16)]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"  # without bos_token


def write_exports(folder: Path) -> list[Path]:
    """Export a small checkpoint of each kind, with ``expected.pt``."""
    exports = []
    for num_sinks, dtype in KINDS:
        name = f"{num_sinks}-sinks-{str(dtype).removeprefix('torch.')}"
        checkpoint = write_checkpoint(folder / "checkpoints" / name, small_model(num_sinks, dtype))
        (checkpoint / "chat_template.jinja").write_text(CHAT)
        export = export_model(checkpoint, folder / name)
        torch.save(expected_results(checkpoint), export / "expected.pt")
        exports.append(export)
    return exports


def expected_results(checkpoint: Path) -> dict:
    """What sinklm computes: ids and logits of a text, and greedy continuations."""
    model, tokenizer = load_model(checkpoint, device="cpu", dtype="auto"), load_tokenizer(checkpoint)
    inputs = tokenizer(TEXT, return_tensors="pt")
    sinks = model.config.sink_token_ids

    def continuation(text: str, num_tokens: int) -> list[int]:
        prompt = tokenizer(text, return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=False)
        return generated[0, prompt["input_ids"].shape[1] :].tolist()

    with torch.no_grad():
        logits = model(inputs["input_ids"]).logits
    return {
        "text": TEXT,
        "texts": TEXTS,
        "sinks": sinks,
        "ids": [[*sinks, *inputs["input_ids"][0].tolist()]],
        "logits": logits,
        "generated": continuation(TEXT, 50),
        "continuations": [tokenizer.decode(continuation(text, 10), skip_special_tokens=True) for text in TEXTS],
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    write_exports(Path(sys.argv[1]))
