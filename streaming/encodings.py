"""How models tell positions apart, and how a stream moves them: rotary phases are turned, ALiBi biases looked up."""

from collections.abc import Callable

import torch
from torch import Tensor


class Rotary:
    """Rotary embedding of the first ``2 * len(inv_freq)`` dimensions of a head.

    Args:
        inv_freq: returns the model's own frequencies ``(rotary_dim / 2,)``, in radians a token.
        interleaved: the pairs are neighbours (GPT-J) and not the two halves (GPT-NeoX, Llama).
    """

    def __init__(self, inv_freq: Callable[[], Tensor], *, interleaved: bool = False):
        self.inv_freq = inv_freq
        self.interleaved = interleaved

    @property
    def num_dims(self) -> int:
        return 2 * self.inv_freq().shape[0]

    def phases(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``(B, 1, T, R / 2)`` of a move by ``steps`` ``(B, T)`` positions.

        Angles are float32, or float64 for float64 states: steps are small, since a stream rebases its phases.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        angles = steps[:, None, :, None].to(dtype) * self.inv_freq().to(like.device, dtype)
        return angles.cos(), angles.sin()

    def turn(self, states: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
        """Move queries or keys ``(B, H, T, D)`` by as many positions as ``phases`` say; the dtype stays."""
        cos, sin = phases
        rotated, passed = states[..., : self.num_dims], states[..., self.num_dims :]
        if self.interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = rotated.chunk(2, dim=-1)
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((rotated.to(states.dtype), passed), dim=-1)


class Alibi:
    """Attention with linear biases: what is added to a score depends on the key's position within the cache.

    Args:
        table: ``(H, positions)`` biases, as the model itself computes them for a cache of that many keys; they may be
            off by a constant, which softmax ignores.
    """

    def __init__(self, table: Tensor):
        self.table = table

    def bias(self, key_positions: Tensor, visible: Tensor, like: Tensor) -> Tensor:
        """``(B, H, T, K)`` in the dtype of ``like`` from positions and visibility ``(B, T, K)``; -inf if invisible.

        Biases grow with the position: the largest is that of the query's own key, and is taken off all, so that half
        precision is sharpest where it matters, among near keys. Far from 0 its steps are wider than a position.
        """
        last = self.table.shape[1] - 1
        table = self.table.to(like.device, torch.promote_types(like.dtype, torch.float32))
        bias = table[:, key_positions.clamp(0, last)].transpose(0, 1).masked_fill(~visible[:, None], float("-inf"))
        return (bias - bias.amax(-1, keepdim=True)).to(like.dtype)


Encoding = Rotary | Alibi
