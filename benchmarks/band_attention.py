"""Time the attention of a chunk of a stream: SDPA with a mask, flex, and flash with a merge.

    python benchmarks/band_attention.py

Prints milliseconds for one layer and a chunk of 4096 tokens, and the largest difference of each
output from float32 SDPA. "masked" and "flex" concatenate both phases of a query
(`two_phase_attention`); "flash" computes only the band, at the original head size, and then merges
the kept keys.
"""

import argparse
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad

from sinklm.eval.decode_speed import step_times
from sinklm.models.banded_attention import flash_two_phase_attention, two_phase_attention
from sinklm.models.fused_attention import can_flash

NUM_KEPT = 4
# heads, groups, head size, rotary dimensions, window: SmolLM2-135M, Pythia-160M and 6.9B
SIZES = [(9, 3, 64, 64, 1020), (12, 12, 64, 16, 1020), (32, 32, 128, 32, 4092)]


def states(heads: int, groups: int, dim: int, window: int, chunk: int, device: torch.device) -> dict[str, Tensor]:
    lengths = {"query": (heads, chunk), "turned": (heads, chunk), "kept_key": (groups, NUM_KEPT)}
    lengths |= {
        "kept_value": (groups, NUM_KEPT),
        "band_key": (groups, window + chunk),
        "band_value": (groups, window + chunk),
    }
    made = {name: torch.randn(1, h, length, dim, device=device) for name, (h, length) in lengths.items()}
    return made | {"turned": made["query"]}  # the time does not depend on the rotation


def masked(s: dict[str, Tensor], window: int, rotary_dim: int) -> Tensor:
    chunk, device = s["query"].shape[2], s["query"].device
    queries = torch.arange(chunk, device=device)[:, None]
    keys = torch.arange(-window, chunk, device=device)
    band = (keys <= queries) & (keys >= queries - window)
    mask = torch.cat((torch.ones(chunk, NUM_KEPT, dtype=torch.bool, device=device), band), dim=1)
    values = torch.cat((s["kept_value"], s["band_value"]), dim=2)
    return two_phase_attention(
        s["query"], s["turned"], s["kept_key"], s["band_key"], values, mask[None, None], 0.1, slice(0, rotary_dim)
    )


def flash(s: dict[str, Tensor], window: int) -> Tensor:
    visible = torch.ones(s["query"].shape[2], NUM_KEPT, dtype=torch.bool, device=s["query"].device)
    kept = (s["kept_key"], s["kept_value"], visible)
    return flash_two_phase_attention(s["query"], s["turned"], *kept, s["band_key"], s["band_value"], window, 0.1)


class Flex:
    """Both phases concatenated, heads padded to a power of 2, and a block mask."""

    def __init__(self, window: int, chunk: int, device: torch.device):
        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            token = key - NUM_KEPT - window  # counted from the start of the chunk
            return (key < NUM_KEPT) | ((token <= query) & (token >= query - window))

        self.mask = create_block_mask(visible, None, None, chunk, NUM_KEPT + window + chunk, device=device)
        self.run = torch.compile(flex_attention, dynamic=False)

    def __call__(self, s: dict[str, Tensor], rotary_dim: int) -> Tensor:
        none = [states.new_zeros(*states.shape[:-1], rotary_dim) for states in (s["kept_key"], s["band_key"])]
        kept = torch.cat((s["kept_key"][..., :rotary_dim], none[0], s["kept_key"][..., rotary_dim:]), dim=-1)
        band = torch.cat((none[1], s["band_key"]), dim=-1)
        query = torch.cat((s["turned"][..., :rotary_dim], s["query"]), dim=-1)
        key = torch.cat((kept, band), dim=2)
        width = 1 << (query.shape[-1] - 1).bit_length()
        query, key = (pad(part, (0, width - part.shape[-1])) for part in (query, key))
        value = torch.cat((s["kept_value"], s["band_value"]), dim=2)
        return self.run(query, key, value, block_mask=self.mask, scale=0.1, enable_gqa=key.shape[1] != query.shape[1])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-size", type=int, default=4096)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", f"torch {torch.__version__}")
    print("heads, groups, head size, rotary, window: milliseconds ± standard deviation (difference)")
    for heads, groups, dim, rotary_dim, window in SIZES:
        exact = states(heads, groups, dim, window, args.chunk_size, device)
        expected = masked(exact, window, rotary_dim)
        s = {name: part.bfloat16() for name, part in exact.items()}
        flex = Flex(window, args.chunk_size, device)
        calls = {"masked": lambda: masked(s, window, rotary_dim), "flex": lambda: flex(s, rotary_dim)}  # noqa: B023
        if can_flash(s["query"]):
            calls["flash"] = lambda: flash(s, window)  # noqa: B023
        cells = []
        for name, call in calls.items():
            difference = (call().float() - expected).abs().max().item()
            times = step_times(call, 3, 20)
            cells.append(f"{name} {mean(times):.3f} ± {stdev(times):.3f} ({difference:.4f})")
        print(f"{(heads, groups, dim, rotary_dim, window)!s:>24}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
