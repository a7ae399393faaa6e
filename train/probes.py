"""What is measured beside the validation loss: streaming loss, attention sinks, and a sample."""

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from ..data import TokenWindows
from ..data.store import TokenSource
from ..models import SinkGPTNeoXForCausalLM
from ..perplexity import perplexity_of
from .launch import World
from .plan import Plan
from .twin import evaluation_twin

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

CHUNK = 512  # tokens per pass in streaming; bounds memory, does not change the result
NUM_PROMPT_TOKENS = 32
SINK_SEQUENCES, SINK_POSITIONS = 16, 64
SINK_THRESHOLD = 0.3  # mean attention above which a position is a sink of a head (Gu et al. 2025)


class Probes:
    """Measures what the section ``validation`` asks for, on the beginning of the validation split.

    Every rank computes the same, so that none waits for another. Nothing is random.
    """

    def __init__(self, plan: Plan, world: World, store: TokenSource, windows: TokenWindows):
        self._plan, self._world, self._windows = plan, world, windows
        self._tokenizer_path = store.tokenizer_path

    def measure(self, engine: "DeepSpeedEngine") -> dict[str, Any]:
        """Return the values for `metrics.jsonl`, none if none are wanted. Every rank calls it."""
        wanted = self._plan.config.validation
        if not (wanted.streaming_tokens or wanted.sample_tokens or wanted.sink_rate):
            return {}
        self._world.mark("preparing the model for evaluation")
        values: dict[str, Any] = {}
        with torch.no_grad():
            model = evaluation_twin(engine, self._plan)
            if wanted.streaming_tokens:
                values |= self._streaming(model, wanted.streaming_tokens)
            if wanted.sample_tokens:
                values |= self._sample(model, wanted.sample_tokens)
            if wanted.sink_rate:
                values |= self._sinks(model)
        return values

    def _streaming(self, model: SinkGPTNeoXForCausalLM, num_tokens: int) -> dict[str, Any]:
        from ..streaming import default_cache, stream_losses

        ids = torch.from_numpy(self._windows.stream.read(0, num_tokens))[None]
        num_kept, window = default_cache(model)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for chunk in stream_losses(model, ids, num_kept=num_kept, window=window, chunk_size=CHUNK):
            self._world.mark("measuring the streaming loss")
            total += chunk.sum(dtype=torch.float64)
        loss = total.item() / (num_tokens - 1)
        return {
            "streaming_loss": loss,
            "streaming_perplexity": perplexity_of(loss),
            "streaming_cache": f"{num_kept}+{window}",
            "num_streaming_tokens": num_tokens,
        }

    def _sample(self, model: SinkGPTNeoXForCausalLM, num_tokens: int) -> dict[str, Any]:
        from ..streaming import Generator, StreamingCache, default_cache

        num_kept, window = default_cache(model)
        cache = StreamingCache.for_model(model, num_kept=num_kept, window=window)
        stream = self._windows.stream
        prompt = stream.read(0, min(NUM_PROMPT_TOKENS, len(stream))).tolist()
        ids = []
        for token in islice(Generator(model, cache, compile=False)(prompt), num_tokens):
            self._world.mark("generating a sample")
            ids.append(token)
        tokenizer = Tokenizer.from_file(str(self._tokenizer_path))
        whole = tokenizer.decode(prompt + ids, skip_special_tokens=False)
        begin = tokenizer.decode(prompt, skip_special_tokens=False)
        return {"sample_prompt": begin, "sample": whole.removeprefix(begin)}

    def _sinks(self, model: SinkGPTNeoXForCausalLM) -> dict[str, Any]:
        from ..streaming.attention_mass import attention_mass, visible_keys
        from ..streaming.layers import own_rules

        self._world.mark("measuring attention sinks")
        num_sinks, num_sequences = self._plan.num_sinks, min(SINK_SEQUENCES, len(self._windows))
        num_text = min(SINK_POSITIONS, self._plan.config.train.seq_length) - num_sinks
        ids = torch.stack([torch.from_numpy(self._windows[i][:num_text]) for i in range(num_sequences)])
        model.set_attn_implementation("eager")
        maps = model(ids.to(model.device), output_attentions=True, use_cache=False, logits_to_keep=1).attentions
        visible = [visible_keys(maps[0].shape[-1], rule, model.device) for rule in own_rules(model.config)]
        masses = [attention_mass(layer.float(), seen) for layer, seen in zip(maps, visible, strict=True)]
        mass = torch.stack(masses)  # (L, B, H, T + 1)
        places = {"first_text_token": num_sinks, "no_token": -1}
        if num_sinks:
            places = {"sink_token": 0, **places}
        return {
            "sink_rate": {name: (mass[..., k] > SINK_THRESHOLD).double().mean().item() for name, k in places.items()},
            "attention_mass": {name: mass[..., k].double().mean().item() for name, k in places.items()},
        }


def describe_probes(values: dict[str, Any]) -> list[str]:
    """Return the results in lines for the terminal."""
    lines = []
    if "streaming_loss" in values:
        lines.append(
            f"streaming perplexity {values['streaming_perplexity']:.4g} over {values['num_streaming_tokens']:,} tokens "
            f"with cache {values['streaming_cache']}"
        )
    if "sink_rate" in values:
        rates = ", ".join(f"{name.replace('_', ' ')} {rate:.1%}" for name, rate in values["sink_rate"].items())
        lines.append(f"share of heads with an attention sink: {rates}")
    if "sample" in values:
        lines.append(f"sample: {values['sample_prompt']!r} … {values['sample']!r}")
    return lines
