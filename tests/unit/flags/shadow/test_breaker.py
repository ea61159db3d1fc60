"""Breakers: a candidate that fails in a row is left alone, for longer each time, and one answer brings it back."""

from __future__ import annotations

from typing import Any

import pytest
from ldclient.migrations.types import Origin

from changeover.flags.router.endpoint import Cursor
from changeover.flags.shadow.breaker import FAILURES, LONGEST_SECONDS, PAUSE_SECONDS, Breaker
from tests.support.fix_flags import PATIENCE, Stores
from tests.support.fix_shadow import EVERYTHING, MakeComparisons, Recorded, offer, offered, put, rows_of


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_it_opens_after_failures_in_a_row_and_not_after_as_many_with_an_answer_between() -> None:
    breaker = Breaker(Clock())
    for _ in range(3):
        for _ in range(FAILURES - 1):
            breaker.failed()
        breaker.answered()
    states = []
    for _ in range(FAILURES):
        states.append((breaker.open, breaker.resting))
        breaker.failed()
    assert set(states) == {(False, False)}
    assert (breaker.open, breaker.resting) == (True, True)


def test_each_failed_trial_doubles_the_pause_up_to_the_longest_and_an_answer_begins_anew() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        breaker.failed()
    pauses = []
    for _ in range(10):
        began = clock.at
        while breaker.resting:
            clock.at += PAUSE_SECONDS / 2
        pauses.append(clock.at - began)
        assert breaker.open, "a trial is let through, and the breaker is open until it answers"
        breaker.failed()
    assert pauses[:4] == [PAUSE_SECONDS, 2 * PAUSE_SECONDS, 4 * PAUSE_SECONDS, 8 * PAUSE_SECONDS]
    assert pauses[-1] == LONGEST_SECONDS
    breaker.answered()
    assert not breaker.open
    for _ in range(FAILURES):
        breaker.failed()
    clock.at += PAUSE_SECONDS
    assert not breaker.resting


def fail(cursor: Cursor) -> Any:
    raise ConnectionError("away")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_store_that_fails_is_asked_again_by_one_trial_a_pause(
    stores: Stores, make_comparisons: MakeComparisons, clock: Clock
) -> None:
    comparisons, experiment = make_comparisons(), Recorded()
    comparisons.judge.breakers[Origin.NEW] = Breaker(clock)
    failing = {Origin.OLD: rows_of(Origin.OLD), Origin.NEW: fail}
    taken = [offer(comparisons, experiment, [], reads=failing) for _ in range(20)]
    assert comparisons.drain(PATIENCE)
    counters = comparisons.counters()
    assert counters["errors"] == len(experiment.results) == FAILURES
    assert counters["skipped_by_breaker"] == 20 - FAILURES, "those that waited as well as those that were not taken"
    assert (counters["breakers_open"], counters["compared"], counters["dropped"]) == (["new"], 0, 0)
    assert not offer(comparisons, experiment, [])
    assert sum(taken) >= FAILURES

    clock.at += PAUSE_SECONDS
    for _ in range(5):
        offer(comparisons, experiment, [], reads=failing)
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["errors"] == FAILURES + 1, "the trial"

    clock.at += 2 * PAUSE_SECONDS
    for _ in range(5):
        assert offer(comparisons, experiment, [])
        assert comparisons.drain(PATIENCE)
    counters = comparisons.counters()
    assert (counters["matched"], counters["breakers_open"], counters["bytes"]) == (5, [], 0)


def test_a_breaker_is_of_one_store(stores: Stores, make_comparisons: MakeComparisons, clock: Clock) -> None:
    comparisons, experiment = make_comparisons(), Recorded()
    comparisons.judge.breakers[Origin.NEW] = Breaker(clock)
    for _ in range(FAILURES):
        offer(comparisons, experiment, [], reads={Origin.OLD: rows_of(Origin.OLD), Origin.NEW: fail})
    assert comparisons.drain(PATIENCE)
    assert offer(comparisons, experiment, [], Origin.NEW), "the old store is the one that is asked"
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["matched"] == 1


def test_a_difference_that_waits_when_the_store_fails_is_inconclusive_and_no_match(
    stores: Stores, by_position: Any, clock: Clock
) -> None:
    by_position.judge.breakers[Origin.NEW] = Breaker(clock)
    waiting, experiment = Recorded(), Recorded()
    put(stores, Origin.OLD, 1, "late")
    offer(by_position, waiting, [{"subject": 1, "note": "late"}])
    for _ in range(FAILURES):
        offer(by_position, experiment, [], reads={Origin.OLD: rows_of(Origin.OLD), Origin.NEW: fail})
    assert by_position.drain(PATIENCE), "its position is never reached"
    assert [result.inconclusive for result in waiting.results] == [True]
    offered(stores, EVERYTHING, EVERYTHING)
    counters = by_position.counters()
    assert (counters["compared"], counters["inconclusive"]) == (0, 1)


def test_a_store_that_hangs_keeps_to_the_deadline_and_is_then_left_alone(
    stores: Stores, make_comparisons: MakeComparisons, clock: Clock
) -> None:
    comparisons, experiment = make_comparisons(deadline=0.1), Recorded()
    comparisons.judge.breakers[Origin.NEW] = Breaker(clock)
    hangs = {Origin.OLD: rows_of(Origin.OLD), Origin.NEW: lambda cursor: cursor.execute("SELECT pg_sleep(600)")}
    for _ in range(50):
        offer(comparisons, experiment, [], reads=hangs)
    assert comparisons.drain(PATIENCE)
    counters = comparisons.counters()
    assert (counters["errors"], counters["skipped_by_breaker"]) == (FAILURES, 50 - FAILURES)
