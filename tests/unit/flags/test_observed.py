"""What is observed is what the authority epochs of each tenant say, whatever the order of the moves."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest
from ldclient.migrations.types import Origin

from changeover.flags.observed import Observation, Observations, observations
from changeover.jobs.ledger.epochs import EVERYTHING, authority_epochs
from changeover.jobs.ledger.records import Authority

NOW = datetime(2026, 1, 1, tzinfo=UTC)
NAMES = tuple("ABCDE")


def move(epoch: int, store: str, *tenants: str, anew: bool = False) -> Authority:
    """Return a move of all rows, or of some tenants."""
    return Authority(epoch, store, epoch * 10, NOW, None if anew else 0.1, epoch * 100, frozenset(tenants) or None)


def any_moves(chance: random.Random) -> list[Authority]:
    """Return moves of any kind, a new epoch of the tables among them."""
    found = []
    for epoch in range(1, chance.randint(1, 8)):
        anew = chance.random() < 0.1
        tenants = () if anew or chance.random() < 0.3 else chance.sample(NAMES, chance.randint(1, 3))
        found.append(move(epoch, "old" if anew else chance.choice(["old", "new"]), *tenants, anew=anew))
    return found


@pytest.mark.parametrize("seed", range(300))
def test_they_agree_with_the_tenures(seed: int) -> None:
    moves = any_moves(random.Random(seed))
    known = observations(moves)
    for tenant in (EVERYTHING, *NAMES, "F"):
        last = authority_epochs(moves, tenant)[-1]
        assert known.of(tenant) == Observation(last.epoch, Origin(last.store)), moves


@pytest.mark.parametrize("seed", range(50))
def test_they_are_the_same_read_at_once_or_move_by_move(seed: int) -> None:
    moves = any_moves(random.Random(seed))
    known = Observations()
    for one in moves:
        known = observations([one], known)
    assert known == observations(moves)


def test_before_any_move_the_old_store_has_everything() -> None:
    assert observations([]) == Observations()
    assert observations([]).of("A") == Observation(0, Origin.OLD)
    assert observations([]).stores == {Origin.OLD}


def test_who_stands_apart_and_under_which_epochs() -> None:
    known = observations([move(1, "new", "A", "B"), move(2, "new", "C"), move(3, "old", "B")])
    assert known.apart == {"A": Observation(1, Origin.NEW), "C": Observation(2, Origin.NEW)}
    assert known.stores == {Origin.OLD, Origin.NEW}
    assert known.epochs(Origin.NEW) == {1, 2}
    assert known.epochs(Origin.NEW, ["C", "D"]) == {2}
    assert known.epochs(Origin.OLD) == {0, 3}
    whole = observations([move(1, "new", "A"), move(2, "new")])
    assert whole.stores == {Origin.NEW}
    assert whole.apart == {}
    assert whole.of("A") == Observation(1, Origin.NEW), "it was there already"


@pytest.mark.heavy
def test_ten_thousand_names_and_many_moves_are_worked_out_at_once() -> None:
    moves = [move(epoch, ("new", "old")[epoch % 2], *map(str, range(10_000))) for epoch in range(1, 51)]
    assert observations(moves).of("9999") == Observation(50, Origin.NEW)
