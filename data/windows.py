"""Training samples: the tokens of a split cut into windows of equal length."""

import numpy as np

from .store import TokenSource


class TokenWindows:
    """Windows over a split: its documents concatenated in manifest order, document borders ignored (as Pythia).

    Without sinks ``stride = tokens_per_sample - 1``: a window's last token is only a target, and the first input of
    the next window. With sinks ``stride = tokens_per_sample``: the last sink predicts a window's first token. There is
    no padding.

    Args:
        store: an open token store.
        split: "train" or "validation".
        tokens_per_sample: tokens in a window.
        stride: tokens from one window's beginning to the next one's, from 1 to ``tokens_per_sample``.

    Attributes:
        num_remaining_tokens: tokens at the end that do not fill another window and are not seen.

    Raises:
        ValueError: the split does not exist or has fewer tokens than one window.
    """

    def __init__(self, store: TokenSource, split: str, *, tokens_per_sample: int, stride: int):
        if not 1 <= stride <= tokens_per_sample:
            raise ValueError(f"stride is {stride}; it must lie between 1 and tokens_per_sample ({tokens_per_sample})")
        self.tokens_per_sample, self.stride = tokens_per_sample, stride
        self.stream = store.split(split)
        if len(self.stream) < tokens_per_sample:
            raise ValueError(
                f"{store.path}: the {split} split has {len(self.stream)} tokens, less than one sample of "
                f"{tokens_per_sample}; prepare more text{_MORE_VALIDATION if split == 'validation' else ''}"
            )
        self._num_windows = (len(self.stream) - tokens_per_sample) // stride + 1
        self.num_remaining_tokens = len(self.stream) - (self._num_windows - 1) * stride - tokens_per_sample

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, i: int) -> np.ndarray:
        """Window ``i``: int64, ``(tokens_per_sample,)``, a copy of its own."""
        if not 0 <= i < self._num_windows:
            raise IndexError(f"window {i} of {self._num_windows}")
        start = int(i) * self.stride
        return self.stream.read(start, start + self.tokens_per_sample)


_MORE_VALIDATION = " or raise --validation-fraction"
