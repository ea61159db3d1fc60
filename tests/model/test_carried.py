"""The other way to complete partial images is right where a key's order is kept: what its mutants break is what they change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.model import carried
from tests.model.kernel import explore
from tests.model.rules import RULES
from tests.model.worlds import WORLDS

pytestmark = pytest.mark.heavy

OTHER_WAY = replace(RULES, batch=carried.batch, keeps_order=True)
WORLDS_OF_UNSENT = [name for name in WORLDS if "unsent" in name and "apart" not in name and "used again" not in name]


@pytest.mark.parametrize("name", WORLDS_OF_UNSENT)
def test_values_carried_in_order_are_right(name: str) -> None:
    found = explore(WORLDS[name](OTHER_WAY)).wrong
    assert found is None, str(found)


def test_a_row_that_kept_its_key_may_be_read_in_an_older_snapshot() -> None:
    found = explore(WORLDS["offers: unsent"](replace(OTHER_WAY, visible=lambda xid, snapshot: True))).wrong
    assert found is None, str(found)
