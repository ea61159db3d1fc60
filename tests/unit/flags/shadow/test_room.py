"""Room: the bytes of answers that wait and of mismatches that are kept are bounded, and an answer's estimate is near the truth."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.shadow.experiment import Observation, Result
from changeover.flags.shadow.room import Room, size_of
from changeover.flags.shadow.tally import KEPT_MISMATCHES, Tally
from tests.support.fix_flags import PATIENCE, Stores, wait_until
from tests.support.fix_shadow import MakeComparisons, Recorded, offer, rows_of

MEGABYTE = 1 << 20


@dataclass
class Follow:
    """A row as an application may map it."""

    user: int
    note: str


NAMES = ("id", "note", "amount", "at")


def row(number: int) -> tuple[Any, ...]:
    return number + 10**6, f"a note that is {number}", Decimal(number) / 7, datetime.fromtimestamp(10**9 + number, UTC)


def follows() -> list[tuple[int, str]]:
    return [(number + 10**6, f"a note that is {number}") for number in range(5_000)]


ANSWERS: dict[str, Callable[[], Any]] = {
    "tuples": lambda: [row(number) for number in range(5_000)],
    "mappings": lambda: [dict(zip(NAMES, row(number), strict=True)) for number in range(5_000)],
    "objects": lambda: [Follow(number + 10**6, f"note {number}") for number in range(5_000)],
    "documents": lambda: [{"a": {"b": [f"{number} {i}" for i in range(20)]}} for number in range(500)],
    "a set": lambda: {f"channel {number}" for number in range(5_000)},
    "one text": lambda: "x" * 300_000,
}


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yield what tells how many bytes were allocated in the block and are there."""
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ANSWERS)
def test_the_estimate_is_near_what_an_answer_takes(kind: str) -> None:
    with traced() as allocated:
        answer = ANSWERS[kind]()
        true = allocated()
    assert 0.6 * true < size_of(answer) < 1.7 * true


def test_an_estimate_looks_at_few_values_however_large_the_answer() -> None:
    looked = []

    class Watched(tuple[int, ...]):
        def __sizeof__(self) -> int:
            looked.append(self)
            return super().__sizeof__()

    size_of([Watched((number,)) for number in range(100_000)])
    assert len(looked) <= 24


def test_nothing_in_a_container_ends_the_estimate() -> None:
    own: list[Any] = []
    own.append(own)
    assert size_of(own) > 0
    assert size_of([]) == size_of(()) + size_of([]) - size_of(())
    assert size_of(object()) > 0
    assert size_of(Follow) > 0


def test_room_is_taken_up_to_the_limit_and_comes_back() -> None:
    room = Room(10)
    assert room.take(6)
    assert not room.take(5)
    assert room.take(4)
    room.give(6)
    assert room.take(6)
    assert room.taken == 10


def test_many_large_answers_that_wait_stay_within_the_bytes(stores: Stores, make_comparisons: MakeComparisons) -> None:
    limit = 8 * MEGABYTE
    comparisons, experiment, held = make_comparisons(limit=1_000, limit_bytes=limit), Recorded(), threading.Event()
    reads = {Origin.OLD: rows_of(Origin.OLD), Origin.NEW: lambda cursor: [held.wait(PATIENCE)]}
    offer(comparisons, experiment, [], reads=reads)
    wait_until(lambda: not comparisons._offered and comparisons._busy)
    with traced() as allocated:
        taken = [offer(comparisons, experiment, follows(), reads=reads) for _ in range(150)]
        assert allocated() < 1.2 * limit
        assert 0 < sum(taken) < 150
    assert comparisons.counters()["bytes"] <= limit
    assert comparisons.counters()["dropped"] == 150 - sum(taken)
    held.set()
    comparisons.close()


def test_differences_that_wait_leave_half_of_the_room_to_other_reads(stores: Stores, by_position: Any) -> None:
    by_position.room.limit = 4 * MEGABYTE
    experiment = Recorded()
    large = {Origin.OLD: lambda cursor: ["old" * 200_000], Origin.NEW: lambda cursor: ["new" * 200_000]}
    for _ in range(20):
        offer(by_position, experiment, ["old" * 200_000], reads=large)
        wait_until(lambda: by_position._depth() == sum(1 for _, _, one in by_position._heap if one.looks))
    counters = by_position.counters()
    assert (counters["dropped"], counters["mismatched"], counters["matched"]) == (0, 0, 0)
    assert counters["bytes"] <= 2 * MEGABYTE
    assert counters["inconclusive"] == len(experiment.results) > 15


def test_what_has_ended_gives_its_room_back_whatever_its_end(stores: Stores, make_comparisons: MakeComparisons) -> None:
    class Strict(Recorded):
        def compare(self, old: Any, new: Any) -> bool:
            raise RuntimeError("no")

    comparisons = make_comparisons(waits=(0.01,))
    for experiment, control in ((Recorded(), []), (Recorded(), [{"subject": 1}]), (Strict(), [])):
        offer(comparisons, experiment, control)
    offer(comparisons, Recorded(), [], reads={Origin.OLD: rows_of(Origin.OLD), Origin.NEW: lambda cursor: 1 / 0})
    assert comparisons.drain(PATIENCE)
    assert comparisons.counters()["bytes"] == 0


def test_a_value_whose_size_raises_is_dropped_and_hurts_no_caller(stores: Stores, make_comparisons: MakeComparisons) -> None:
    class Odd:
        def __sizeof__(self) -> int:
            raise RuntimeError("no size")

    comparisons = make_comparisons()
    assert not offer(comparisons, Recorded(), Odd())
    assert comparisons.counters()["dropped"] == 1


def mismatch(value: Any) -> Result:
    control, candidate = Observation(Origin.OLD, value, None, 0.0), Observation(Origin.NEW, None, None, 0.0)
    return Result("read", Stage.SHADOW, control, candidate, matched=False, ignored=False, looks=2)


def test_kept_mismatches_are_bounded_by_number_and_by_bytes() -> None:
    few, many = Tally(MEGABYTE), Tally(MEGABYTE)
    for number in range(150):
        many.add(mismatch(number))
        few.add(mismatch(f"{number:>100000}"))
    assert [result.control.value for result in many.mismatches] == list(range(150 - KEPT_MISMATCHES, 150))
    assert [int(result.control.value) for result in few.mismatches] == list(range(140, 150)), "each takes a tenth"
    few.add(mismatch("x" * 2 * MEGABYTE))
    assert few.counts()["mismatched"] == 151, "counted, though too large to keep"
    assert len(few.mismatches) == 10
