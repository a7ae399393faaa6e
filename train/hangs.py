"""What is known of each rank, and which one keeps the others waiting."""

from dataclasses import dataclass, field

from .peers import Address

UNANSWERED = 10.0  # seconds without a message, after which a rank counts as silent
RESUME = "run the same command again to resume from the newest checkpoint"


@dataclass(frozen=True)
class Mark:
    """Where the main thread of a rank is. Every rank makes the same marks in the same order.

    Attributes:
        count: number of marks so far; the rank with the fewest is behind.
        step: the step that is computed, or after which something is done.
        where: completes the sentence "it was …".
        extra_seconds: how much longer this may take than a step.
        is_saving: whether a signal must not interrupt it.
    """

    count: int = 0
    step: int = 0
    where: str = "starting"
    extra_seconds: float = 0.0
    is_saving: bool = False


@dataclass
class RankState:
    """The latest mark of a rank, and for how long it has not moved.

    Attributes:
        idle: seconds since the mark.
        silent: seconds since the latest message of the rank.
        stack: stack of its main thread, if it was asked for.
        has_left: whether the rank ended as planned.
        is_connected: whether messages of the rank can arrive; else nothing is known of it.
    """

    address: Address
    mark: Mark = field(default_factory=Mark)
    idle: float = 0.0
    silent: float = 0.0
    stack: str = ""
    has_left: bool = False
    is_connected: bool = True

    def __str__(self) -> str:
        return f"rank {self.address.rank} (host {self.address.host}, process {self.address.pid})"

    @property
    def place(self) -> str:
        return f"{self.mark.where} (step {self.mark.step:,})" if self.mark.step else self.mark.where

    def is_late(self, limit: float) -> bool:
        return self.idle > limit + self.mark.extra_seconds or self.silent > limit


def find_hang(states: list[RankState], limit: float) -> list[RankState]:
    """Return the ranks that are behind if any rank is late, else an empty list.

    If one rank hangs, all others soon wait for it and are as late. Behind are the ranks that do not
    answer, else those with the fewest marks.

    Args:
        limit: seconds that a rank may be without progress, or without a message.
    """
    present = [state for state in states if state.is_connected and not state.has_left]
    if not any(state.is_late(limit) for state in present):
        return []
    if silent := [state for state in present if state.silent > min(limit, UNANSWERED)]:
        return silent
    fewest = min(state.mark.count for state in present)
    return [state for state in present if state.mark.count == fewest]


def describe_hang(behind: list[RankState], num_ranks: int, limit: float) -> str:
    """Return the message for the result of `find_hang`.

    Args:
        limit: ``train.hang_timeout_minutes`` in seconds. Ranks with slow steps may wait longer.
    """
    first = behind[0]
    end = "All ranks have ended"
    if first.silent > min(limit, UNANSWERED):
        reason = (
            f"{first} has not answered for {first.silent:.0f} s: it is stopped, or its host cannot be reached. It was "
            f"last seen {first.place}. "
        )
        end = "All others have ended. End it if it still runs"
    else:
        limit_text = f"{max(first.idle, limit) / 60:.3g} minutes (train.hang_timeout_minutes is {limit / 60:.3g})"
        if 1 < num_ranks == len(behind):
            reason = f"no rank has made progress for {limit_text}, and none is behind. {first} was {first.place}. "
        else:
            others = f" and {len(behind) - 1} other ranks have" if len(behind) > 1 else " has"
            reason = f"{first}{others} made no progress for {limit_text}. It was {first.place}. "
    stack = f"Its Python stack:\n{first.stack}" if first.stack else ""
    return f"{reason}{stack}{end}; {RESUME}"
