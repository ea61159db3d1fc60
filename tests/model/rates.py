"""The world of rates: replay that applies more in a while than the application can write in it catches up, whatever the writes.

In each tick the application writes any number up to its rate, and replay takes what is spooled, up to its own rate. The world says
nothing about what rates are real: benchmarks measure those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.model.rules import RULES, Rules


class RateState(NamedTuple):
    """A moment: ticks that have passed, changes not yet applied, and whether there once were no more than one tick's."""

    ticks: int
    backlog: int
    caught_up: bool


@dataclass(frozen=True)
class Rates:
    """A world of rates, in changes a tick."""

    name: str
    rules: Rules = RULES
    write_rate: int = 3
    backlog: int = 12

    @property
    def ticks(self) -> int:
        """Return after how many ticks a backlog must have gone: each takes at least one from it."""
        return self.backlog + 1

    def start(self) -> RateState:
        """Return the state with the whole backlog."""
        return RateState(0, self.backlog, False)

    def steps(self, state: RateState) -> Iterator[tuple[str, RateState]]:
        """Yield one tick for each number of writes."""
        for written in range(self.write_rate + 1) if state.ticks < self.ticks else ():
            left = max(state.backlog + written - (self.write_rate + self.rules.spare_rate), 0)
            caught_up = state.caught_up or left <= self.write_rate
            yield f"{written} writes; {left} are left", RateState(state.ticks + 1, left, caught_up)

    def wrong(self, state: RateState) -> str | None:
        """Judge nothing but the end."""
        return None

    def wrong_end(self, state: RateState) -> str | None:
        """Judge an end: I10."""
        return None if state.caught_up else f"I10: {state.backlog} changes are left and replay never caught up"
