"""Small random models whose attention is far from uniform, and a way to run all their phases in float64."""

from functools import partial

import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.llama.configuration_llama import LlamaConfig

VOCAB = 101


def config(name: str, **overrides):
    small = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "gpt_neox": lambda: GPTNeoXConfig(intermediate_size=96, **small | overrides),
        "llama": lambda: LlamaConfig(intermediate_size=96, num_key_value_heads=2, **small | overrides),
    }
    return configs[name]()


def build(cfg, seed: int = 0, dtype=torch.float64):
    """A model with weights so large that attention is sharp: every misplaced key shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.to(dtype)


def use_float64(model) -> None:
    """Let the test's own model work in float64 throughout, where transformers insists on float32."""
    rotary = model.base_model.rotary_emb
    rotary.inv_freq = inverse_frequencies(model.config)

    def cos_sin(x, position_ids):
        angles = position_ids[..., None].double() * rotary.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    rotary.forward = cos_sin
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)


def rms_norm(module, x):
    return module.weight * x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def inverse_frequencies(cfg) -> torch.Tensor:
    head_dim = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    rotary_dim = int(head_dim * cfg.rope_parameters.get("partial_rotary_factor", 1.0))
    return cfg.rope_parameters["rope_theta"] ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def random_ids(num_tokens: int, batch_size: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))
