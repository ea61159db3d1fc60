"""Every mutant goes wrong in its worlds; what it prints is its shortest schedule."""

from __future__ import annotations

import pytest

from tests.model.kernel import explore
from tests.model.mutants import DESIGN, MUTANTS
from tests.model.rules import RULES
from tests.model.worlds import WORLDS

pytestmark = pytest.mark.heavy

NAMED = """no tombstone; no gate; no floor; stamp = current LSN; gate in one statement; lock inside the statement; no sweep;
sweep without barrier; floor without barrier; TRUNCATE without barrier; TRUNCATE by one DELETE; ledger before data;
acknowledge before durable; collection by time; collection without floor; collection before close; no fencing token;
key change as update of the new key only; delete and put with one ordinal; TRUNCATE ignored; fence read before freeze;
plain read in the fence trigger; values beyond min/max dropped; TOAST as NULL; whole-row point read;
partial images out of order; batch collapse that keeps the last event only; append after replay; shared appId;
per-attempt appId; dual write before commit; epoch ignored; BEFORE trigger; rewritten table read as empty"""
"""The design's list of mutants."""

CASES = [(name, world) for name, mutant in MUTANTS.items() for world in mutant.worlds]


@pytest.mark.parametrize(("name", "world"), CASES)
def test_a_mutant_goes_wrong(name: str, world: str) -> None:
    found = explore(WORLDS[world](MUTANTS[name].rules)).wrong
    assert found is not None, f"{name} survives in the world {world}"
    assert found.schedule
    print(f"{name}, in the world {world}\n{found}")


def test_every_mutant_of_the_design_is_there() -> None:
    assert list(DESIGN) == [name.strip() for name in NAMED.replace("\n", " ").split(";")]


def test_a_mutant_differs_from_the_product() -> None:
    assert all(mutant.rules != RULES for mutant in MUTANTS.values())
