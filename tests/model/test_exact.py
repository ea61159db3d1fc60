"""As long as nobody but replay and the loader writes to a target, it holds at X what the source held: nothing is judged again.

A verification takes X where the source is, and lets replay go no further. The aligned snapshot is X's own, so worlds whose values
are read at another moment are left out: those of unsent values, and those whose snapshot is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from tests.model.kernel import explore
from tests.model.offers import Offers, State
from tests.model.worlds import OFFERS

AT_A_MOMENT = [world for world in OFFERS if not world.fuzzy and "unsent" not in world.name]

Moment = tuple[State, int | None]
"""A state, and X once it is taken."""


@dataclass(frozen=True)
class Verified:
    """A world of offers beside which X is taken at any moment of a closed table."""

    world: Offers

    @property
    def name(self) -> str:
        return f"verified: {self.world.name}"

    def start(self) -> Moment:
        return self.world.start(), None

    def steps(self, moment: Moment) -> Iterator[tuple[str, Moment]]:
        state, x = moment
        if x is None and state.closed and not state.stopped:
            yield f"X is taken at {state.source}", (state, state.source)
        for label, after in self.world.steps(state):
            if x is None or max(after.offered, after.truncating[0]) <= x:
                yield label, (after, x)

    def wrong(self, moment: Moment) -> str | None:
        state, x = moment
        if x is None or state.stopped or (state.applied, state.offered, state.truncating) != (x, x, (0, False)):
            return None
        wanted = self.world.script.target(x)
        for key, one in zip(self.world.script.keys, state.stored, strict=True):
            if (found := None if one.row is None else one.row.image) != wanted.get(key):
                return f"at X = {x} {key} is {found or 'absent'} and was {wanted.get(key) or 'absent'} in the source"
        return None

    def wrong_end(self, moment: Moment) -> str | None:
        return None  # the worlds' own tests judge their ends


@pytest.mark.parametrize("world", AT_A_MOMENT, ids=lambda world: world.name)
def test_a_target_holds_at_x_what_the_source_held(world: Offers) -> None:
    found = explore(Verified(replace(world, direct=False)))
    assert found.wrong is None, str(found.wrong)
    assert found.states > 5


def test_with_direct_writes_it_may_be_ahead_of_x() -> None:
    [world] = [world for world in OFFERS if world.name == "updates"]
    found = explore(Verified(replace(world, direct=True))).wrong
    assert found is not None
    assert any(step.startswith("direct write of") for step in found.schedule), str(found)
