"""Position encodings in a stream: rotary phases are rotated, ALiBi biases are looked up."""

from collections.abc import Callable, Container

import torch
from torch import Tensor


class Rotary:
    """Rotary embedding of ``2 * len(inv_freq)`` dimensions of a head; the others do not change.

    Args:
        inv_freq: returns the model's frequencies ``(rotary_dim / 2,)``, in radians per token.
        interleaved: pairs are adjacent dimensions (GPT-J, GLM) instead of the two halves (GPT-NeoX,
            Llama).
        start: index of the first rotated dimension, for heads whose last dimensions are rotated
            (DeepSeek).
        layers: indices of the layers that rotate, None for all. The others have no positions.
    """

    def __init__(
        self,
        inv_freq: Callable[[], Tensor],
        *,
        interleaved: bool = False,
        start: int = 0,
        layers: Container[int] | None = None,
    ):
        self.inv_freq = inv_freq
        self.interleaved, self.start, self.layers = interleaved, start, layers

    def rotates(self, layer_idx: int) -> bool:
        """Whether a layer has positions."""
        return self.layers is None or layer_idx in self.layers

    @property
    def dims(self) -> slice:
        """The rotated dimensions of a head."""
        return slice(self.start, self.start + 2 * self.inv_freq().shape[0])

    def phases(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``(B, 1, T, R / 2)`` of a move by ``steps`` ``(B, T)`` positions.

        Angles are float32, or float64 for float64 states. Float32 is accurate enough because steps
        are small: a stream rebases its phases.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        angles = steps[:, None, :, None].to(dtype) * self.inv_freq().to(like.device, dtype)
        return angles.cos(), angles.sin()

    def turn(self, states: Tensor, phases: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate queries or keys ``(B, H, T, D)`` by `phases`; the dtype does not change."""
        cos, sin = phases
        dims = self.dims
        rotated, after = states[..., dims], states[..., dims.stop :]
        if self.interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = rotated.chunk(2, dim=-1)
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        parts = (rotated.to(states.dtype), after)
        return torch.cat((states[..., : dims.start], *parts) if dims.start else parts, dim=-1)


class Alibi:
    """Attention with linear biases: a bias depends on the key's position within the cache.

    Args:
        table: ``(H, positions)`` biases, as the model computes them for that many keys. A constant
            offset is allowed, since softmax ignores it.
    """

    def __init__(self, table: Tensor):
        self.table = table

    def bias(self, key_positions: Tensor, visible: Tensor, like: Tensor) -> Tensor:
        """Return biases ``(B, H, T, K)`` in the dtype of ``like``, -inf for invisible keys.

        Biases grow with the position. The largest one, that of the query's own key, is subtracted
        from all, so that half precision is most accurate for near keys. Far from 0, its rounding
        exceeds the difference between positions.

        Args:
            key_positions: ``(B, T, K)``.
            visible: ``(B, T, K)``.
        """
        last = self.table.shape[1] - 1
        table = self.table.to(like.device, torch.promote_types(like.dtype, torch.float32))
        bias = table[:, key_positions.clamp(0, last)].transpose(0, 1).masked_fill(~visible[:, None], float("-inf"))
        return (bias - bias.amax(-1, keepdim=True)).to(like.dtype)


Encoding = Rotary | Alibi
