"""The decision on catch-up: the position, committed with the batch as the table's floor, is the gate of a closed table.

A version per key need not be written then. The model shows it for a replay that is alone, for two replays of which one lost its
lease, and beside direct writes that appear unannounced; and it shows what can't be left out of the batch's transaction.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from changeover.stores.base.statements import CATCH_UP, Part, Procedure, Transaction
from tests.model.kernel import explore
from tests.model.rules import RULES
from tests.model.table_worlds import LOADED, Table, caught_up, caught_up_twice, gone, put

pytestmark = pytest.mark.heavy

WHOLE: Transaction = CATCH_UP[0]
LOCK, COMPARE, RAISE = (Part.LOCK_EXCLUSIVE,), (Part.DROP_OLDER,), (Part.RAISE_FLOOR,)


def without(*left_out: tuple[Part, ...]) -> Procedure:
    """Return the batch's transaction with some statements left out."""
    return (tuple(statement for statement in WHOLE if statement not in left_out),)


BROKEN: dict[str, Procedure] = {
    "no lock": without(LOCK),
    "a shared lock": (((Part.LOCK_SHARED,), *WHOLE[1:]),),
    "the lock inside the comparing statement": (((Part.LOCK_EXCLUSIVE, Part.DROP_OLDER), *WHOLE[2:]),),
    "no comparison": without(COMPARE),
    "no floor": without(RAISE),
    "the floor in a transaction of its own": (*without(RAISE), (RAISE,)),
}


@pytest.mark.parametrize("make", [caught_up, caught_up_twice])
def test_the_position_is_enough_of_a_gate(make: object) -> None:
    assert explore(make(RULES).world()).wrong is None  # type: ignore[operator]


@pytest.mark.parametrize("left_out", BROKEN)
def test_nothing_can_be_left_out_once_somebody_else_writes(left_out: str) -> None:
    found = explore(caught_up(replace(RULES, catch_up=BROKEN[left_out])).world()).wrong
    assert found is not None
    print(f"{left_out}\n{found}")


@pytest.mark.parametrize("left_out", ["no lock", "no comparison", "the floor in a transaction of its own"])
def test_a_replay_that_is_alone_could_do_without(left_out: str) -> None:
    alone = Table("alone", replace(RULES, catch_up=BROKEN[left_out]), ("a", "b"), {"a": "a10", "b": "b10"}, chunk=LOADED)
    alone.catch_up("replay", (25, {"a": gone(20), "b": put(22)}), (45, {"a": put(40), "b": gone(42)}), lives=2)
    assert explore(alone.world()).wrong is None
