"""Secondaries: compared by name beside the stores, and none of them holds up a caller, a comparison or readiness."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.router.router import Router
from changeover.flags.shadow.breaker import FAILURES, PAUSE_SECONDS, Breaker
from changeover.flags.shadow.experiment import Experiment
from tests.support.fix_flags import PATIENCE, PATIENT, MakeRouter, Stores, wait_until
from tests.support.fix_shadow import MakeComparisons, Recorded, offer


def beside(comparisons: Any, name: str = "cache") -> dict[str, Any]:
    """Return what came of a secondary's answers, without what is zero."""
    return {key: value for key, value in comparisons.counters()["beside"][name].items() if value}


def test_each_is_counted_by_its_name_and_never_with_the_stores(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, experiment = make_comparisons(), Recorded()
    for _ in range(3):
        offer(comparisons, experiment, [], beside={"cache": lambda: [], "search": lambda: ["stale"]})
    assert comparisons.drain(PATIENCE)
    assert (beside(comparisons, "cache"), beside(comparisons, "search")) == ({"matched": 3}, {"mismatched": 3})
    counters = comparisons.counters()
    assert (counters["compared"], counters["matched"], counters["mismatched"], counters["at_stage"]["mismatched"]) == (3, 3, 0, 0)
    assert comparisons.tally.mismatches == []
    published = sorted((str(result.beside), result.outcome) for result in experiment.results)
    assert published == [("None", "matched")] * 3 + [("cache", "matched")] * 3 + [("search", "mismatched")] * 3


def test_the_hooks_get_the_authoritys_answer_first(stores: Stores, make_comparisons: MakeComparisons) -> None:
    class Cached(Experiment):
        def clean(self, value: Any) -> Any:
            return value or "nothing"

        def compare(self, old: Any, new: Any) -> bool:
            return (old, new) in (("nothing", "nothing"), ("nothing", "an old entry"))

        def ignore(self, old: Any, new: Any) -> bool:
            return bool(new == "expired")

    for origin in Origin:
        comparisons = make_comparisons()
        for answer in ("an old entry", "expired", "wrong"):
            offer(comparisons, Cached(), [], origin, beside={"cache": lambda answer=answer: answer})  # type: ignore[misc]
        assert comparisons.drain(PATIENCE)
        assert beside(comparisons) == {"matched": 1, "ignored": 1, "mismatched": 1}


def test_one_that_hangs_holds_up_nobody_and_is_left_alone(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, held = make_comparisons(deadline=0.2), threading.Event()
    hangs = {"cache": lambda: held.wait(PATIENCE)}
    offer(comparisons, Recorded(), [], beside=hangs)
    try:
        wait_until(lambda: offer(comparisons, Recorded(), [], beside=hangs) and "skipped_by_breaker" in beside(comparisons))
        wait_until(lambda: not comparisons._depth())
        assert comparisons.counters()["matched"] >= 2, "the stores are compared meanwhile"
        waiting = beside(comparisons)["depth"]
        for _ in range(50):
            offer(comparisons, Recorded(), [], beside=hangs)
        assert beside(comparisons)["depth"] == waiting
        assert not comparisons.drain(0.1)
    finally:
        held.set()
    assert comparisons.drain(PATIENCE)
    assert beside(comparisons)["errors"] == 1
    assert beside(comparisons)["last_error"][1] == "TooLate", "an answer behind the deadline is none"


def test_one_that_fails_in_a_row_is_asked_again_by_one_trial(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, clock = make_comparisons(), [100.0]
    fails = {"cache": lambda: 1 / 0}
    offer(comparisons, Recorded(), [], beside={"cache": lambda: []})
    assert comparisons.drain(PATIENCE)
    secondary = comparisons.secondaries._by_name["cache"]
    secondary.breaker = Breaker(lambda: clock[0])
    for _ in range(20):
        offer(comparisons, Recorded(), [], beside=fails)
    assert comparisons.drain(PATIENCE)
    assert beside(comparisons)["errors"] == FAILURES
    assert beside(comparisons)["skipped_by_breaker"] == 20 - FAILURES
    assert comparisons.counters()["matched"] == 21, "its breaker is its own"
    clock[0] += PAUSE_SECONDS
    offer(comparisons, Recorded(), [], beside={"cache": lambda: []})
    assert comparisons.drain(PATIENCE)
    assert (beside(comparisons)["matched"], "breaker_open" in beside(comparisons)) == (2, False)


def test_what_finds_no_room_is_dropped_and_what_has_ended_gives_it_back(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, held = make_comparisons(limit=3), threading.Event()
    for _ in range(20):
        offer(comparisons, Recorded(), [], beside={"cache": lambda: [held.wait(PATIENCE)]})
    assert beside(comparisons)["dropped"] >= 16
    held.set()
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["bytes"] == 0


@pytest.mark.parametrize("hook", ["clean", "compare", "ignore", "publish"])
def test_a_failing_hook_goes_to_raised_and_the_next_one_is_asked(
    stores: Stores, make_comparisons: MakeComparisons, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    comparisons, experiment, next_one = make_comparisons(), Recorded(), Recorded()

    def fail(*_: object) -> None:
        raise RuntimeError("the hook failed")

    monkeypatch.setattr(experiment, hook, fail)
    offer(comparisons, experiment, ["here"], reads=dict.fromkeys(Origin, lambda cursor: 1 / 0), beside={"cache": lambda: []})
    offer(comparisons, next_one, [], beside={"cache": lambda: []})
    assert comparisons.drain(PATIENCE)
    assert hook in experiment.failures
    assert "cache" in [result.beside for result in next_one.results]


def test_the_router_asks_them_where_it_compares_and_the_caller_waits_for_none(
    stores: Stores, make_router: MakeRouter, set_stage: Callable[[Router, Stage], None]
) -> None:
    router, held = make_router(limits=replace(PATIENT, compare_deadline=0.2)), threading.Event()
    asked: list[str] = []

    def cache() -> int:
        asked.append(threading.current_thread().name)
        held.wait(PATIENCE)
        return 1

    set_stage(router, Stage.DUALWRITE)
    router.compare(old=lambda cursor: 1, new=lambda cursor: 1, beside={"cache": cache})
    set_stage(router, Stage.SHADOW)
    for _ in range(5):
        assert router.compare(old=lambda cursor: 1, new=lambda cursor: 1, beside={"cache": cache}) == 1
    wait_until(lambda: asked)
    held.set()
    assert router.drain(PATIENCE)
    assert set(asked) == {"changeover-beside-cache"}
    counted = router.counters()["comparisons"]
    assert (counted["matched"], counted["beside"]["cache"]["dropped"]) == (5, 0)
