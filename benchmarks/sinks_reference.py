"""Compare sink rates and norms with the code of Gu et al., sail-sg/Attention-Sink.

    git clone https://github.com/sail-sg/Attention-Sink
    PYTHONPATH=Attention-Sink python benchmarks/sinks_reference.py MODEL --text book.txt

Their two scripts run unchanged in this environment, also without a GPU. They receive token ids
instead of text and a tokenizer. They expect tuples of keys and values, which are taken from the
cache of current transformers.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import eval_activations_open_source as their_activations
import eval_sink_open_source as their_sinks
import torch
import transformers
from transformers import BatchEncoding, PreTrainedModel

from sinklm.checkpoints import load_model, load_tokenizer
from sinklm.eval.sinks import Statistics, measure, sequences_of_texts
from sinklm.models.config import num_prepended_sinks


def measure_theirs(model: PreTrainedModel, ids: torch.Tensor, epsilon: float) -> dict[str, torch.Tensor]:
    model.set_attn_implementation("eager")
    device, num_tokens = model.device, ids.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{name}.npy") for name in ("scores", "states", "keys", "values")]
        their_sinks.measure_attention_sink(model, as_tokenizer, ids.tolist(), paths[0], num_tokens, device)
        arguments = (ids.tolist(), *paths[1:], num_tokens, device)
        their_activations.measure_activations(WithTuples(model), as_tokenizer, *arguments)
        return {
            "sink_rate": their_sinks.compute_attention_sink(paths[0], epsilon) / 100,
            "hidden_norm": their_activations.compute_norm(paths[1], device)[:-1],
            "key_norm": their_activations.compute_kv_norm(paths[2], device),
            "value_norm": their_activations.compute_kv_norm(paths[3], device),
        }


def as_tokenizer(ids: list[int], return_tensors: str) -> BatchEncoding:
    return BatchEncoding(
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    )


class WithTuples:
    """A model whose `generate` returns keys and values as tuples by layer."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config = model, model.config

    def generate(self, **kwargs: Any) -> dict[str, Any]:
        outputs = self.model.generate(**kwargs)
        pairs = [(layer.keys, layer.values) for layer in outputs["past_key_values"].layers]
        return {**outputs, "past_key_values": pairs}


def measure_ours(model: PreTrainedModel, ids: torch.Tensor, epsilon: float) -> dict[str, torch.Tensor]:
    found: Statistics = measure(model, ids, epsilon=epsilon)
    return {"sink_rate": found.sink_rate.mean((0, 1))[:-1]} | {
        name: getattr(found, name) for name in ("hidden_norm", "key_norm", "value_norm")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--num-sequences", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--epsilon", type=float, default=0.3)
    args = parser.parse_args()

    model = load_model(args.model)
    num_tokens = args.seq_length - num_prepended_sinks(model.config)
    ids = sequences_of_texts([args.text], load_tokenizer(args.model), args.num_sequences, num_tokens).ids
    ours, theirs = measure_ours(model, ids, args.epsilon), measure_theirs(model, ids, args.epsilon)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.num_sequences} sequences")
    for name, values in ours.items():
        gap = (values - theirs[name]).abs()
        share = (gap / theirs[name].abs().clamp(min=1e-12)).max()
        print(
            f"{name}: first position {values.flatten()[0]:.6f}, theirs {theirs[name].flatten()[0]:.6f}; "
            f"largest difference {gap.max():.2e}, relative {share:.1e}"
        )


if __name__ == "__main__":
    main()
