"""As long as nobody but replay and the loader writes to a target, it holds at X what the source held: nothing is judged again.

A verification takes X where the source is, and lets replay go no further. The aligned snapshot is X's own, so worlds whose values
are read at another moment are left out: those of unsent values, and those whose snapshot is lost. While tenants are at both stores
it takes a position in each log, and holds each store twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from tests.model.kernel import explore
from tests.model.moves import LAKE, NEW, OLD, ROUTES, STORES, MoveState, Moving, Place
from tests.model.offers import Offers, State
from tests.model.worlds import MOVES, OFFERS

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


APART = [world for world in MOVES if any(names is not None for _, names in world.moves)]


class Held(NamedTuple):
    """What a verification holds by now: where each log was, and each store's rows then, then what was held once all was offered."""

    ends: tuple[int | None, int | None] = (None, None)
    at_own: tuple[tuple[Place, ...], tuple[Place, ...]] = ((), ())
    offered: tuple[tuple[Place, ...], ...] = ()


@dataclass(frozen=True)
class VerifiedApart:
    """A world of moves beside which a verification takes a position of each log, the new store's first, while tenants are apart.

    It has the leases from then on: no authority moves, and nothing is replayed but what is below both. Not to hold a store twice is
    to take all of its rows from its own position.
    """

    world: Moving
    twice: bool = True

    @property
    def name(self) -> str:
        return f"verified apart: {self.world.name}"

    def start(self) -> tuple[MoveState, Held]:
        return self.world.start(), Held()

    def steps(self, both: tuple[MoveState, Held]) -> Iterator[tuple[str, tuple[MoveState, Held]]]:
        state, held = both
        if held.offered:
            return
        taken = held.ends[NEW] is not None
        if not taken and state.step == 0 and set(state.authority) == {OLD, NEW}:
            yield "Y is taken at new", (state, _at_own(held, NEW, state))
        if taken and held.ends[OLD] is None:
            yield "X is taken at old", (state, _at_own(held, OLD, state))
        if None not in held.ends and all(state.routes[n] == held.ends[source] for n, (source, _) in enumerate(ROUTES)):
            yield "the stores are held again", (state, held._replace(offered=state.places))
        for label, after in self.world.steps(state):
            moved = (after.step, after.moves, after.authority) != (state.step, state.moves, state.authority)
            if not taken or not (moved or self._beyond(after, state, held)):
                yield label, (after, held)

    def _beyond(self, after: MoveState, state: MoveState, held: Held) -> bool:
        """Return whether a step replays what is not below both positions, or before they are taken."""
        return any(
            one > other and (None in held.ends or one > (held.ends[source] or 0))
            for one, other, (source, _) in zip(after.routes, state.routes, ROUTES, strict=True)
        )

    def wrong(self, both: tuple[MoveState, Held]) -> str | None:
        state, held = both
        if not held.offered:
            return None
        for tenant, key in enumerate(self.world.keys):
            store = state.authority[tenant]
            assert store is not None
            seen = {STORES[store]: held.at_own[store][tenant].row, "lake": held.offered[LAKE][tenant].row}
            seen[STORES[1 - store]] = (held.offered if self.twice else held.at_own)[1 - store][tenant].row
            if len(set(seen.values())) > 1:
                return f"{key} is at {STORES[store]}, and is {seen}"
        return None

    def wrong_end(self, both: tuple[MoveState, Held]) -> str | None:
        return None  # the worlds' own tests judge their ends


def _at_own(held: Held, store: int, state: MoveState) -> Held:
    ends, rows = list(held.ends), list(held.at_own)
    ends[store], rows[store] = len(state.logs[store]), state.places[store]
    return held._replace(ends=(ends[OLD], ends[NEW]), at_own=(rows[OLD], rows[NEW]))


@pytest.mark.parametrize("world", APART, ids=lambda world: world.name)
def test_while_tenants_are_apart_each_row_is_everywhere_what_it_was_at_its_own_position(world: Moving) -> None:
    found = explore(VerifiedApart(replace(world, direct=False)))
    assert found.wrong is None, str(found.wrong)
    assert found.states > 5


def test_a_store_that_is_held_once_lacks_what_the_other_one_wrote() -> None:
    [world] = [world for world in APART if world.name == "one tenant of two"]
    assert explore(VerifiedApart(world, twice=False)).wrong is not None


def test_with_direct_writes_a_row_may_be_ahead_of_its_position_while_tenants_are_apart() -> None:
    [world] = [world for world in APART if world.name == "one tenant of two, written to both stores"]
    found = explore(VerifiedApart(world)).wrong
    assert found is not None
    assert any(step.startswith("a direct write arrives") for step in found.schedule), str(found)
