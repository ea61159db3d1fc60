"""Comparisons: a difference counts when it stays, an error is never a match, and a hook can't hurt the reader."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.router.endpoint import Cursor, Row
from changeover.flags.router.shadow import Comparison, Comparisons, Experiment, Observation, Result
from tests.support.fix_flags import PATIENCE, Stores

MakeComparisons = Callable[..., Comparisons]


@pytest.fixture
def make_comparisons(stores: Stores) -> Iterator[MakeComparisons]:
    made: list[Comparisons] = []

    def to_new(row: Row) -> Row:
        return {"subject": row["from_user"], "note": row["note"]}

    def make(limit: int = 100, deadline: float = PATIENCE, waits: tuple[float, ...] = (0.02, 0.04, 0.08)) -> Comparisons:
        endpoints = {origin: stores.endpoint(origin) for origin in Origin}
        comparisons = Comparisons(endpoints, to_new, "test", limit=limit, deadline=deadline, waits=waits)
        made.append(comparisons)
        return comparisons

    yield make
    for comparisons in made:
        comparisons.close()


class Recorded(Experiment):
    """Keeps what is published and raised."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.failures: list[str] = []

    def publish(self, result: Result) -> None:
        self.results.append(result)

    def raised(self, operation: str, error: Exception) -> None:
        self.failures.append(operation)


def rows_of(origin: Origin) -> Callable[[Cursor], list[dict[str, Any]]]:
    statement, names = {
        Origin.OLD: ("SELECT from_user, note FROM public.follows ORDER BY 1", ("from_user", "note")),
        Origin.NEW: ("SELECT subject, attributes->>'note' FROM public.associations ORDER BY 1", ("subject", "note")),
    }[origin]
    return lambda cursor: [dict(zip(names, row, strict=True)) for row in cursor.execute(statement).fetchall()]


def offer(
    comparisons: Comparisons, experiment: Experiment, control: Any, origin: Origin = Origin.OLD,
    reads: dict[Origin, Callable[[Cursor], Any]] | None = None,
) -> bool:  # fmt: skip
    stage = Stage.SHADOW if origin is Origin.OLD else Stage.LIVE
    seen = Observation(origin, control, None, 0.0)
    return comparisons.offer(Comparison(experiment, stage, seen, reads or {o: rows_of(o) for o in Origin}))


def put(stores: Stores, origin: Origin, user: int, note: str) -> None:
    if origin is Origin.OLD:
        stores.old.execute("INSERT INTO public.follows (from_user, to_channel, note) VALUES (%s, 1, %s)", [user, note])
    else:
        stores.new.execute(
            "INSERT INTO public.associations VALUES (%s, 1, jsonb_build_object('note', %s::text), NULL, now())",
            [user, note],
        )


@pytest.mark.parametrize("origin", list(Origin))
def test_equal_answers_match_at_the_first_look(stores: Stores, make_comparisons: MakeComparisons, origin: Origin) -> None:
    for store in Origin:
        put(stores, store, 1, "same")
    comparisons, experiment = make_comparisons(), Recorded()
    control = [{"from_user": 1, "note": "same"}] if origin is Origin.OLD else [{"subject": 1, "note": "same"}]
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
    offer(comparisons, experiment, [{"from_user": 1, "note": "old"}])
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["mismatched"] == 1
    result = experiment.results[0]
    assert result.mismatched
    assert result.looks == 4
    assert list(comparisons.mismatches) == [result]
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
    offer(comparisons, experiment, [{"from_user": 1, "note": "late"}], reads=reads)
    assert comparisons.drain(PATIENCE)
    assert (comparisons.counters()["matched"], comparisons.counters()["mismatched"]) == (1, 0)
    assert experiment.results[0].looks == 3


def test_an_authority_that_moved_on_meanwhile_is_read_anew(stores: Stores, make_comparisons: MakeComparisons) -> None:
    for store in Origin:
        put(stores, store, 1, "now")
    comparisons, experiment = make_comparisons(), Recorded()
    offer(comparisons, experiment, [{"from_user": 1, "note": "before"}])
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["matched"] == 1
    assert experiment.results[0].looks == 2


def test_a_waiting_difference_does_not_hold_up_the_next(stores: Stores, make_comparisons: MakeComparisons) -> None:
    comparisons, slow, quick = make_comparisons(waits=(1.0,)), Recorded(), Recorded()
    offer(comparisons, slow, [{"from_user": 1, "note": "nowhere else"}])
    offer(comparisons, quick, [])
    assert comparisons.drain(PATIENCE)
    assert quick.results[0].looks == 1
    assert slow.results[0].matched, "read again, the authority has no such row either"


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
    offer(comparisons, experiment, [{"from_user": 1, "note": "old"}])
    offer(comparisons, next_one, [])
    assert comparisons.drain(PATIENCE)
    assert experiment.failures == [hook]
    assert len(next_one.results) == 1


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


def test_run_if_says_which_reads_are_compared(make_comparisons: MakeComparisons) -> None:
    class Never(Experiment):
        def run_if(self) -> bool:
            return False

    comparisons = make_comparisons()
    assert not offer(comparisons, Never(), [])
    assert comparisons.counters()["dropped"] == 0
