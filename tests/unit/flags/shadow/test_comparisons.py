"""Comparisons: a difference counts when it stays, an error is never a match, and a hook can't hurt the reader."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin
from psycopg import sql

from changeover.flags.router.endpoint import Cursor
from changeover.flags.shadow.comparisons import Comparisons
from changeover.flags.shadow.experiment import Experiment, Result
from changeover.flags.shadow.positions import LedgerPositions
from changeover.jobs.source.triggerlog import Log
from tests.support.fix_flags import PATIENCE, Stores, wait_until
from tests.support.fix_shadow import EVERYTHING, MakeComparisons, Recorded, offer, offered, put, rows_of


@pytest.mark.parametrize("origin", list(Origin))
def test_equal_answers_match_at_the_first_look(stores: Stores, make_comparisons: MakeComparisons, origin: Origin) -> None:
    for store in Origin:
        put(stores, store, 1, "same")
    comparisons, experiment = make_comparisons(), Recorded()
    control = [{"subject": 1, "note": "same"}]
    assert offer(comparisons, experiment, control, origin)
    assert comparisons.drain(PATIENCE)
    assert {name: count for name, count in comparisons.counters().items() if count and name != "at_stage"} == {
        "compared": 1, "matched": 1,
    }  # fmt: skip
    assert experiment.results[0].looks == 1
    assert experiment.results[0].control.origin is origin


def test_a_mismatch_counts_after_both_stores_were_read_again(stores: Stores, make_comparisons: MakeComparisons) -> None:
    put(stores, Origin.OLD, 1, "old")
    put(stores, Origin.NEW, 1, "new")
    comparisons, experiment = make_comparisons(), Recorded()
    offer(comparisons, experiment, [{"subject": 1, "note": "old"}])
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["mismatched"] == 1
    result = experiment.results[0]
    assert result.mismatched
    assert result.looks == 4
    assert comparisons.tally.mismatches == [result]
    assert result.candidate.value == [{"subject": 1, "note": "new"}]


def test_a_lagging_mirror_is_no_mismatch(stores: Stores, make_comparisons: MakeComparisons) -> None:
    put(stores, Origin.OLD, 1, "late")
    comparisons, experiment = make_comparisons(), Recorded()
    looks = itertools.count(1)

    def late(cursor: Cursor) -> list[dict[str, Any]]:
        if next(looks) == 3:
            put(stores, Origin.NEW, 1, "late")
        return rows_of(Origin.NEW)(cursor)

    reads = {Origin.OLD: rows_of(Origin.OLD), Origin.NEW: late}
    offer(comparisons, experiment, [{"subject": 1, "note": "late"}], reads=reads)
    assert comparisons.drain(PATIENCE)
    assert (comparisons.counters()["matched"], comparisons.counters()["mismatched"]) == (1, 0)
    assert experiment.results[0].looks == 3


def test_an_authority_that_moved_on_meanwhile_is_read_anew(stores: Stores, make_comparisons: MakeComparisons) -> None:
    for store in Origin:
        put(stores, store, 1, "now")
    comparisons, experiment = make_comparisons(), Recorded()
    offer(comparisons, experiment, [{"subject": 1, "note": "before"}])
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["matched"] == 1
    assert experiment.results[0].looks == 2


def test_a_waiting_difference_does_not_hold_up_the_next(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, slow, quick = make_comparisons(waits=(1.0,)), Recorded(), Recorded()
    offer(comparisons, slow, [{"subject": 1, "note": "nowhere else"}])
    offer(comparisons, quick, [])
    assert comparisons.drain(PATIENCE)
    assert quick.results[0].looks == 1
    assert slow.results[0].matched, "read again, the authority has no such row either"


def test_a_difference_waits_until_the_other_store_has_what_the_authority_had(stores: Stores, by_position: Comparisons) -> None:
    experiment = Recorded()
    put(stores, Origin.OLD, 1, "late")
    offer(by_position, experiment, [{"subject": 1, "note": "late"}])
    assert not by_position.drain(1.5), "longer than all looks by the clock take"
    put(stores, Origin.NEW, 1, "late")
    offered(stores, EVERYTHING, EVERYTHING)
    assert by_position.drain(PATIENCE)
    assert [(result.matched, result.looks) for result in experiment.results] == [(True, 2)]


def test_a_difference_of_which_the_stream_told_nothing_is_a_mismatch(stores: Stores, by_position: Comparisons) -> None:
    experiment = Recorded()
    put(stores, Origin.OLD, 1, "here alone")
    offered(stores, EVERYTHING, "0/0")
    offer(by_position, experiment, [{"subject": 1, "note": "here alone"}])
    assert by_position.drain(PATIENCE)
    assert [(result.mismatched, result.looks) for result in experiment.results] == [(True, 2)]
    assert by_position.counters()["mismatched"] == 1


def test_what_changes_from_look_to_look_is_inconclusive_and_no_match(stores: Stores, by_position: Comparisons) -> None:
    experiment, answers = Recorded(), itertools.count(1)
    offered(stores, EVERYTHING, EVERYTHING)
    offer(by_position, experiment, 0, reads={Origin.OLD: lambda cursor: 0, Origin.NEW: lambda cursor: next(answers)})
    assert by_position.drain(PATIENCE)
    [result] = experiment.results
    assert (result.inconclusive, result.mismatched, result.matched) == (True, False, False)
    counters = by_position.counters()
    assert (counters["inconclusive"], counters["compared"]) == (1, 0)


def test_what_both_stores_repeat_at_every_look_is_a_mismatch_though_others_write(stores: Stores, by_position: Comparisons) -> None:
    experiment = Recorded()
    put(stores, Origin.OLD, 1, "here alone")
    offered(stores, EVERYTHING, EVERYTHING)
    offer(by_position, experiment, [{"subject": 1, "note": "here alone"}])
    assert by_position.drain(PATIENCE)
    assert [(result.mismatched, result.looks) for result in experiment.results] == [(True, 4)]


def test_what_authority_moved_over_is_inconclusive(stores: Stores, by_position: Comparisons) -> None:
    experiment = Recorded()
    put(stores, Origin.OLD, 1, "before")
    offer(by_position, experiment, [{"subject": 1, "note": "before"}])
    assert not by_position.drain(0.3)
    stores.move(1, "new")
    assert by_position.drain(PATIENCE), "the old store's stream may never come to where it was"
    assert [result.inconclusive for result in experiment.results] == [True]


def test_where_no_stream_goes_to_the_other_store_the_clock_has_to_do(stores: Stores, by_position: Comparisons) -> None:
    experiment = Recorded()
    put(stores, Origin.NEW, 1, "here alone")
    offer(by_position, experiment, [{"subject": 1, "note": "here alone"}], Origin.NEW)
    assert by_position.drain(PATIENCE)
    assert [(result.mismatched, result.looks) for result in experiment.results] == [(True, 4)]


def test_a_commit_that_waits_for_a_standby_is_no_mismatch(stores: Stores, by_position: Comparisons) -> None:
    experiment = Recorded()
    put(stores, Origin.OLD, 1, "before")
    put(stores, Origin.NEW, 1, "after")  # replay has it, and no session sees it in the old store
    offered(stores, EVERYTHING, "0/0")
    stores.old.execute(sql.SQL("ALTER SYSTEM SET synchronous_standby_names = 'nobody'"))
    stores.old.execute("SELECT pg_reload_conf()")
    try:
        wait_until(lambda: stores.old.execute("SHOW synchronous_standby_names").fetchone() == ("nobody",))
        with psycopg.connect(stores.old_dsn) as waiting:
            waiting.execute("UPDATE follows SET note = 'after'")
            offer(by_position, experiment, [{"subject": 1, "note": "before"}])
            assert by_position.drain(PATIENCE)
            # a tick has what is visible, and nothing else: with a trigger log the new store is never ahead
            logged = {origin: replace(stores.endpoint(origin), log=Log("follows")) for origin in Origin}
            doubtful = []
            for endpoints in ({origin: stores.endpoint(origin) for origin in Origin}, logged):
                positions = LedgerPositions(endpoints, stores.new_dsn, "follows", "new", "test")
                doubtful.append(positions.mark(Origin.OLD)[1])
                positions.close()
            assert doubtful == [True, False]
            waiting.rollback()
    finally:
        stores.old.execute(sql.SQL("ALTER SYSTEM RESET synchronous_standby_names"))
        stores.old.execute("SELECT pg_reload_conf()")
    assert [result.inconclusive for result in experiment.results] == [True]


def test_differences_that_wait_leave_places_for_other_reads(stores: Stores, by_position: Comparisons) -> None:
    by_position.limit = by_position.judge.limit = 4
    put(stores, Origin.OLD, 1, "late")
    for _ in range(12):
        offer(by_position, Recorded(), [{"subject": 1, "note": "late"}])
        wait_until(lambda: by_position.counters()["depth"] <= 2)
    put(stores, Origin.NEW, 1, "late")
    equal = Recorded()
    offer(by_position, equal, [{"subject": 1, "note": "late"}])
    wait_until(lambda: equal.results)
    assert equal.results[0].matched
    assert by_position.counters()["inconclusive"] == 10
    assert by_position.counters()["dropped"] == 0


def test_an_authority_that_answers_otherwise_each_time_is_inconclusive(stores: Stores, by_position: Comparisons) -> None:
    experiment, answers = Recorded(), itertools.count(1)
    offered(stores, EVERYTHING, "0/0")
    reads = {Origin.OLD: lambda cursor: next(answers), Origin.NEW: lambda cursor: 0}
    offer(by_position, experiment, 0.5, reads=reads)
    assert by_position.drain(PATIENCE)
    assert [result.inconclusive for result in experiment.results] == [True]


def test_an_error_is_never_a_match(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, experiment = make_comparisons(), Recorded()

    def fail(cursor: Cursor) -> None:
        cursor.execute("SELECT 1 FROM public.nowhere")

    offer(comparisons, experiment, None, reads={Origin.OLD: rows_of(Origin.OLD), Origin.NEW: fail})
    assert comparisons.drain(PATIENCE)
    assert experiment.results[0].failed
    counters = comparisons.counters()
    assert (counters["compared"], counters["errors"], counters["last_error"][1]) == (0, 1, "UndefinedTable 42P01")


def test_a_slow_store_ends_at_the_deadline(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, experiment = make_comparisons(deadline=0.2), Recorded()
    offer(comparisons, experiment, [], reads={
        Origin.OLD: rows_of(Origin.OLD), Origin.NEW: lambda cursor: cursor.execute("SELECT pg_sleep(600)").fetchall(),
    })  # fmt: skip
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["errors"] == 1


def test_a_shadow_read_cannot_write(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, experiment = make_comparisons(), Recorded()
    offer(comparisons, experiment, [], reads={
        Origin.OLD: rows_of(Origin.OLD), Origin.NEW: lambda cursor: cursor.execute("DELETE FROM public.associations"),
    })  # fmt: skip
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["last_error"][1] == "ReadOnlySqlTransaction 25006"


def test_overload_drops_and_counts(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, experiment = make_comparisons(limit=3), Recorded()
    offered = threading.Event()
    reads = {Origin.OLD: rows_of(Origin.OLD), Origin.NEW: lambda cursor: [offered.wait(PATIENCE)]}
    taken = [offer(comparisons, experiment, [("",)], reads=reads) for _ in range(20)]
    offered.set()
    assert 3 <= sum(taken) <= 4, "one is under way"
    assert comparisons.counters()["dropped"] == 20 - sum(taken)


class Lenient(Recorded):
    """Knows one difference."""

    def ignore(self, old: Any, new: Any) -> bool:
        return bool(old[0]["note"] == "old" and new[0]["note"] == "new")


def test_a_known_difference_is_ignored(stores: Stores, make_comparisons: MakeComparisons) -> None:
    put(stores, Origin.OLD, 1, "old")
    put(stores, Origin.NEW, 1, "new")
    comparisons, experiment = make_comparisons(), Lenient()
    offer(comparisons, experiment, [{"subject": 1, "note": "new"}], Origin.NEW)
    assert comparisons.drain(PATIENCE)
    counters = comparisons.counters()
    assert (counters["compared"], counters["ignored"], counters["matched"], counters["mismatched"]) == (1, 1, 0, 0)


@pytest.mark.parametrize("hook", ["clean", "compare", "ignore", "publish", "run_if"])
def test_a_failing_hook_goes_to_raised_and_hurts_nothing(
    stores: Stores, make_comparisons: MakeComparisons, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    put(stores, Origin.OLD, 1, "old")
    comparisons, experiment, next_one = make_comparisons(waits=()), Recorded(), Recorded()

    def fail(*_: object) -> None:
        raise RuntimeError("the hook failed")

    monkeypatch.setattr(experiment, hook, fail)
    told: list[Result | None] = []
    taken = offer(comparisons, experiment, [{"subject": 1, "note": "old"}], tell=told.append)
    offer(comparisons, next_one, [])
    assert comparisons.drain(PATIENCE)
    assert experiment.failures == [hook]
    assert len(next_one.results) == 1
    assert len(told) == taken, "the read was answered, whatever came of its comparison"


def test_a_raising_raised_does_not_end_the_thread(stores: Stores, make_comparisons: MakeComparisons) -> None:
    class Strict(Recorded):
        def compare(self, old: Any, new: Any) -> bool:
            raise RuntimeError("no")

        def raised(self, operation: str, error: Exception) -> None:
            raise error

    comparisons, next_one = make_comparisons(), Recorded()
    offer(comparisons, Strict(), [])
    offer(comparisons, next_one, [])
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["errors"] == 1
    assert next_one.results[0].matched


def test_what_is_left_when_it_closes_is_told_as_the_authoritys_alone(stores: Stores, make_comparisons: MakeComparisons) -> None:
    put(stores, Origin.OLD, 1, "old")
    comparisons, told = make_comparisons(waits=(PATIENCE,)), list[Result | None]()
    offer(comparisons, Recorded(), [{"subject": 1, "note": "old"}], tell=told.append)
    wait_until(lambda: comparisons.counters()["depth"] == 1 and bool(comparisons._heap), PATIENCE)
    comparisons.close()
    assert told == [None]


def test_run_if_says_which_reads_are_compared(make_comparisons: MakeComparisons) -> None:
    class Never(Experiment):
        def run_if(self) -> bool:
            return False

    comparisons = make_comparisons()
    assert not offer(comparisons, Never(), [])
    assert comparisons.counters()["dropped"] == 0
