"""An offer: the rows of one committed unit on their way to the other store, and the bounds of what may wait.

Its rows are copies, in the order in which the unit told them. Pure, but for the counts of its own tries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from changeover.flags.mirror.change import Change
from changeover.flags.mirror.written import Told
from changeover.position import Version

BATCH_ROWS = 200
"""Rows of a batch, at most; a unit of more goes to the worker for bulks, so that no small one waits behind it."""

VALUE_BYTES = 64
"""What a value is taken to weigh besides its length."""


@dataclass(frozen=True)
class Bounds:
    """Of a mirror: its workers, what may be under way, of small units and of bulks, and how long anything may take, in seconds."""

    workers: int = 4
    rows: int = 10_000
    bytes: int = 64 << 20
    wait: float = 0.05
    """How long a caller waits for room at most, where the store keeps up."""
    deadline: float = 2.0
    """How long a statement may take, and how long a session is asked for."""


class Ended(Protocol):
    """What hears how an offer ended."""

    def __call__(self, seconds: float | None, failed: bool = False) -> None:
        """Take how long the other store took, None where it was never asked, and whether a row of it failed."""
        ...


def unheard(seconds: float | None, failed: bool = False) -> None:
    """Tell nobody.

    Args:
        seconds: How long the other store took.
        failed: Whether a row failed.
    """


@dataclass(eq=False)
class Offer:
    """The rows of one committed transaction, at their version."""

    version: Version
    changes: tuple[Told, ...]
    bytes: int
    ended: Ended = unheard
    number: int = 0
    """The order in which units were offered, from 1 up."""
    tries: int = 0
    lost: int = 0
    """How many of its rows failed."""
    not_before: float = 0.0
    """When it is tried again, on the monotonic clock, where it waits for what is older; else 0."""

    @classmethod
    def of(cls, version: Version, changes: Sequence[Told], ended: Ended = unheard) -> Offer:
        """Copy the rows: the caller may change its own afterwards. `ended` hears of its end, once."""
        copies = tuple(Told(one.place, replace(one.change, row=dict(one.change.row))) for one in changes)
        return cls(version, copies, sum(weight(one.change) for one in copies), ended)

    @property
    def bulk(self) -> bool:
        """Return whether it is larger than a batch."""
        return len(self.changes) > BATCH_ROWS


def weight(change: Change) -> int:
    """Return roughly how many bytes a row takes in memory."""
    return sum(map(_weight, change.row.values()))


def _weight(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return VALUE_BYTES + len(value)
    if isinstance(value, Mapping):
        return VALUE_BYTES + sum(_weight(one) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple, set)):
        return VALUE_BYTES + sum(map(_weight, value))
    return VALUE_BYTES
