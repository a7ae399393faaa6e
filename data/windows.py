"""Training samples: the tokens of a split, cut into windows of equal length."""

import numpy as np

from .store import TokenSource


class TokenWindows:
    """Windows over the concatenated documents of a split, in manifest order, without padding.

    Document boundaries are ignored, as in Pythia. Without sinks, use ``stride = tokens_per_sample -
    1``: a window's last token is only a target and is the first input of the next window. With
    sinks, use ``stride = tokens_per_sample``: the last sink predicts a window's first token. With
    pre-shuffled rows, a window is the beginning of a row and ``stride`` is ignored.

    Args:
        store: an open token store.
        split: "train" or "validation".
        tokens_per_sample: tokens in a window.
        stride: distance between the starts of two windows in tokens, from 1 to
            ``tokens_per_sample``.
        set_name: use only the documents of this set, see :meth:`TokenStore.documents_of_set`.

    Attributes:
        num_remaining_tokens: tokens that are in no window.

    Raises:
        ValueError: the split does not exist, has fewer tokens than one window, or has shorter rows.
    """

    def __init__(
        self, store: TokenSource, split: str, *, tokens_per_sample: int, stride: int, set_name: str | None = None
    ):
        if not 1 <= stride <= tokens_per_sample:
            raise ValueError(f"stride is {stride}; it must be between 1 and tokens_per_sample ({tokens_per_sample})")
        self.stream = store.split(split) if set_name is None else store.documents_of_set(split, set_name)
        num_tokens, row_length = len(self.stream), self.stream.row_length
        if num_tokens < tokens_per_sample:
            what = f"the {split} split" if set_name is None else f"set {set_name!r} in the {split} split"
            more = "a larger --validation-fraction or more text" if split == "validation" else "more text"
            raise ValueError(
                f"{store.path}: {what} has {num_tokens} tokens, fewer than one sample of "
                f"{tokens_per_sample}; prepare it with {more}, or train with a shorter seq_length"
            )
        if row_length is not None and tokens_per_sample > row_length:
            raise ValueError(
                f"{store.path}: has rows of {row_length} tokens, fewer than one sample of {tokens_per_sample}; "
                "train with a shorter seq_length"
            )
        self.tokens_per_sample = tokens_per_sample
        self.stride = row_length or stride
        self._num_windows = (num_tokens - tokens_per_sample) // self.stride + 1
        overlap = max(tokens_per_sample - self.stride, 0)
        self.num_remaining_tokens = num_tokens - self._num_windows * (tokens_per_sample - overlap) - overlap

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, i: int) -> np.ndarray:
        """Return a copy of window ``i``, int64 ``(tokens_per_sample,)``."""
        if not 0 <= i < self._num_windows:
            raise IndexError(f"window {i} is out of range; there are {self._num_windows}")
        start = int(i) * self.stride
        return self.stream.read(start, start + self.tokens_per_sample)
