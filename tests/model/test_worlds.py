"""Every world under the product's rules, every schedule: no invariant is ever broken and no end is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model.kernel import Explored
from tests.model.worlds import WORLDS

SCHEDULES, STEPS = 1_000_000, 10_000_000

Explore = Callable[[str], Explored]


@pytest.mark.parametrize("name", WORLDS)
def test_no_schedule_ends_wrong(name: str, exploration: Explore) -> None:
    result = exploration(name)
    assert result.wrong is None, str(result.wrong)


def test_a_million_schedules_in_so_few_steps_that_it_takes_minutes(exploration: Explore) -> None:
    results = [exploration(name) for name in WORLDS]
    assert sum(result.schedules for result in results) >= SCHEDULES
    assert sum(result.states for result in results) >= SCHEDULES / 2, "few states make many schedules cheap"
    assert sum(result.steps for result in results) < STEPS, "a hundred thousand take about a second"
