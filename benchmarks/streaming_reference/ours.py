"""Compute losses with sinklm's streaming cache, for comparison with the original code.

    python benchmarks/streaming_reference/ours.py FOLDER --text book.txt \\
        --tokenizer tokenizer.json [--model PATH]

Writes FOLDER/{weights.safetensors, config.json, ids.json, ours.json}; then run `original.py FOLDER`
in the original's environment. The default model is a GPT-NeoX with random weights, large enough
that its attention is sharp.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from sinklm.streaming import StreamingCache, stream_losses


def random_gpt_neox(vocab_size: int) -> PreTrainedModel:
    """Return a model of three layers with large weights, so that attention is not uniform."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def token_by_token(model: PreTrainedModel, ids: torch.Tensor, num_kept: int, window: int) -> torch.Tensor:
    cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
    logits = [model(token, past_key_values=cache, use_cache=True).logits[0, -1] for token in ids.split(1, dim=1)]
    return torch.nn.functional.cross_entropy(torch.stack(logits[:-1]).float(), ids[0, 1:], reduction="none")


def original_config(model: PreTrainedModel) -> dict:
    """Return the configuration with the keys of transformers 4.33."""
    config = model.config
    rope = config.rope_parameters
    shared = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": config.hidden_act,
    }
    if config.model_type == "gpt_neox":
        return shared | {
            "rotary_pct": rope["partial_rotary_factor"],
            "rotary_emb_base": rope["rope_theta"],
            "use_parallel_residual": config.use_parallel_residual,
            "layer_norm_eps": config.layer_norm_eps,
        }
    return shared | {
        "num_key_value_heads": config.num_key_value_heads,
        "rope_theta": rope["rope_theta"],
        "rms_norm_eps": config.rms_norm_eps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--model")
    parser.add_argument("--num-tokens", type=int, default=2000)
    parser.add_argument("--num-kept", type=int, default=4)
    parser.add_argument("--window", type=int, default=252)
    args = parser.parse_args()

    tokenizer = Tokenizer.from_file(args.tokenizer)
    text = args.text.read_text(encoding="utf-8")[: 20 * args.num_tokens]
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: args.num_tokens]
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    else:
        model = random_gpt_neox(-(-tokenizer.get_vocab_size() // 128) * 128)
    model.eval()

    args.folder.mkdir(parents=True, exist_ok=True)
    head = "embed_out" if model.config.model_type == "gpt_neox" else "lm_head"
    weights = {name.replace("lm_head", head): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, args.folder / "weights.safetensors")
    (args.folder / "config.json").write_text(json.dumps(original_config(model)))
    settings = {"ids": ids, "num_kept": args.num_kept, "window": args.window}
    (args.folder / "ids.json").write_text(json.dumps(settings))

    batch, shape = torch.tensor([ids]), {"num_kept": args.num_kept, "window": args.window}
    start = time.perf_counter()
    banded = torch.cat(list(stream_losses(model, batch, **shape, chunk_size=512)), dim=1)[0]
    middle = time.perf_counter()
    single = token_by_token(model, batch, **shape)
    print(f"banded {middle - start:.1f} s, token by token {time.perf_counter() - middle:.1f} s")
    print(f"largest difference between the two: {(banded - single).abs().max():.2e}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    losses = {"banded": banded.tolist(), "token_by_token": single.tolist(), "versions": versions}
    (args.folder / "ours.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
