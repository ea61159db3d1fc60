"""The explorer itself: it counts every schedule, finds the shortest wrong one, and refuses a world without an end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.model.kernel import World, explore
from tests.model.rules import RULES
from tests.model.worlds import WORLDS

SMALL = (
    "statements: trigger log",
    "statements: collection while loading",
    "statements: two replays by position",
    "offers: beyond the sampled bounds",
    "offers: rolled back",
)


@dataclass(frozen=True)
class Counters:
    """Processes that each count to a limit; the sum `bad` is wrong, and a limit of -1 counts in a circle."""

    limits: tuple[int, ...]
    bad: int = -1
    name: str = "counters"

    def start(self) -> tuple[int, ...]:
        return tuple(0 for _ in self.limits)

    def steps(self, state: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for place, limit in enumerate(self.limits):
            if limit < 0:
                yield f"{place} goes on", tuple((n + 1) % 3 if p == place else n for p, n in enumerate(state))
            elif state[place] < limit:
                yield f"{place} counts", tuple(n + (p == place) for p, n in enumerate(state))

    def wrong(self, state: tuple[int, ...]) -> str | None:
        return "bad sum" if sum(state) == self.bad else None

    def wrong_end(self, state: tuple[int, ...]) -> str | None:
        return None


def walked(world: World[Any], state: Any) -> int:
    """Count the schedules from a state by walking each of them to its end."""
    following = list(world.steps(state))
    return sum(walked(world, after) for _, after in following) if following else 1


def test_interleavings_are_counted() -> None:
    result = explore(Counters((3, 2)))
    assert (result.states, result.schedules, result.wrong) == (12, 10, None)


@pytest.mark.parametrize("name", SMALL)
def test_the_count_is_that_of_walking_every_schedule(name: str) -> None:
    world = WORLDS[name](RULES)
    assert explore(world).schedules == walked(world, world.start())


def test_the_first_wrong_state_has_a_shortest_schedule() -> None:
    found = explore(Counters((3, 2), bad=2)).wrong
    assert found is not None
    assert str(found).splitlines() == ["wrong: bad sum", "   1. 0 counts", "   2. 0 counts"]


def test_a_circle_has_no_number_of_schedules() -> None:
    with pytest.raises(ValueError, match="circle"):
        explore(Counters((-1,)))
