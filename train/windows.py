"""The windows of a model's layers, and the window that is drawn for each training step."""

import hashlib
from collections.abc import Sequence

PATTERN_HELP = "it must be full, window, a ratio of windowed to full layers such as 3:1, or a list of full and window"


def layer_kinds(pattern: str | Sequence[str], num_layers: int) -> list[str]:
    """Return ``"full"`` or ``"window"`` for each layer.

    Args:
        pattern: one kind for all layers; ``"a:b"``, which repeats a windowed and then b full
            layers; or one kind for each layer.

    Raises:
        ValueError: the pattern is none of these, or has another number of layers.
    """
    if not isinstance(pattern, str):
        if len(pattern) != num_layers:
            raise ValueError(f"it has {len(pattern)} entries, but num_hidden_layers is {num_layers}: list every layer")
        return list(pattern)
    if pattern in ("full", "window"):
        return [pattern] * num_layers
    numbers = pattern.split(":")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise ValueError(f"{PATTERN_HELP}; both numbers of a ratio are at least 1" if ":" in pattern else PATTERN_HELP)
    num_windowed, num_full = map(int, numbers)
    period = num_windowed + num_full
    return ["window" if layer % period < num_windowed else "full" for layer in range(num_layers)]


def window_of_step(seed: int, step: int, low: int, high: int) -> int:
    """Return the window of a step, log-uniform over ``low … high``, both included.

    Window w has the probability ``log((w + 1) / w) / log((high + 1) / low)``, so every octave of
    the range is drawn equally often. The value depends on the arguments only: it is the same on
    every rank, and nothing needs to be saved to resume.

    Args:
        seed: ``train.seed``.
        step: number of the step as in ``metrics.jsonl``, from 1.
    """
    digest = hashlib.blake2b(f"window {seed} {step}".encode(), digest_size=8).digest()
    uniform = (int.from_bytes(digest, "big") >> 11) / 2**53  # in [0, 1)
    return min(max(int(low * ((high + 1) / low) ** uniform), low), high)
