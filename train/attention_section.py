"""The section `model.attention` of a recipe: windowed layers."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .section import Count, Section
from .windows import PATTERN_HELP, layer_kinds


class AttentionSection(Section):
    """Which tokens each layer attends to."""

    pattern: str | list[Literal["full", "window"]] = Field(
        default="full",
        description="layers with full and with windowed attention: `full`, `window`, a ratio such as `3:1` (three "
        "windowed layers, then a full one, repeated), or a list with one entry for each layer",
    )
    window: Count | list[Count] | None = Field(
        default=None,
        description="recent tokens that a windowed layer sees besides the query's own; `[low, high]`: each step draws "
        "it from this range, log-uniformly, and the model gets `high`",
    )
    num_kept: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="first tokens that a windowed layer also sees; null: the model's sink tokens"
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _known(cls, pattern: Any) -> Any:
        if isinstance(pattern, list) and pattern and all(kind in ("full", "window") for kind in pattern):
            return pattern
        if not isinstance(pattern, str):
            raise ValueError(PATTERN_HELP)
        layer_kinds(pattern, 1)
        return pattern

    @field_validator("window", mode="before")
    @classmethod
    def _positive(cls, window: Any) -> Any:
        numbers = window if isinstance(window, list) else [1 if window is None else window]
        is_whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if not is_whole or not all(1 <= number < 2**31 for number in numbers):
            raise ValueError("it must be a number of tokens, at least 1, or a range of them, [low, high]")
        if isinstance(window, list) and (len(window) != 2 or window[0] >= window[1]):
            raise ValueError("a range must be [low, high] with low < high; for a fixed window use a number")
        return window

    @model_validator(mode="after")
    def _has_windows(self) -> "AttentionSection":
        is_full = "window" not in layer_kinds(self.pattern, 1 if isinstance(self.pattern, str) else len(self.pattern))
        for key in ("window", "num_kept"):
            if is_full and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} is {getattr(self, key)}, but no layer has a window: set pattern, or {key}=null"
                )
        if not is_full and self.window is None:
            raise ValueError(f"pattern is {self.pattern}, but window is null: set window, the number of recent tokens")
        return self

    @property
    def window_range(self) -> tuple[int, int] | None:
        """The range from which each step draws its window; None if the window is fixed."""
        return (self.window[0], self.window[1]) if isinstance(self.window, list) else None
