"""Coverage: a gap, an overlap, a stranger, an empty side or a lost row is never read as "equal"."""

from __future__ import annotations

import pytest

from changeover.errors import CouldNotCheck
from changeover.verifiers.compare.coverage import Tally, coverage, keys_of, require_complete, rows_by_range, rows_found
from changeover.verifiers.compare.verdict import Range, RangeCount

RANGES = (Range(0, None, ("a", "1")), Range(1, ("a", "1"), ("b", "2")), Range(2, ("b", "2"), None))


def test_every_range_once_the_empty_one_too() -> None:
    counts = coverage(RANGES, {0: 3, 2: 4}, table="t", different={2: 1})
    assert counts == (RangeCount(RANGES[0], 3), RangeCount(RANGES[1], 0), RangeCount(RANGES[2], 4, 1))


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ((), "do not reach"),
        (RANGES[1:], "do not reach"),
        (RANGES[:2], "do not reach"),
        ((RANGES[0], RANGES[2]), "gap or an overlap between the source's ranges 0 and 1"),
        ((RANGES[0], RANGES[1], RANGES[1], RANGES[2]), "gap or an overlap"),
        ((RANGES[0], RANGES[1], Range(1, ("b", "2"), None)), "numbers of the source's ranges do not go up"),
        ((Range(0, None, None), Range(1, None, None)), "gap or an overlap"),
        ((RANGES[0], Range(1, ("a", "0"), None)), "gap or an overlap"),
    ],
)
def test_what_is_no_partition(ranges: tuple[Range, ...], problem: str) -> None:
    with pytest.raises(CouldNotCheck, match=problem):
        coverage(ranges, {}, table="t")


def test_rows_of_no_range() -> None:
    with pytest.raises(CouldNotCheck, match="7 rows of the target belong to no range"):
        coverage(RANGES, {0: 1, 3: 5, -1: 2}, table="t", side="target")


TALLIES = [
    Tally(0, "equal", None, 0, 5, 5),
    Tally(0, "missing", None, 1, 2, 2),
    Tally(0, "extra", None, None, 1, 1),
    Tally(0, "duplicate", "source", 1, 2, 1),
    Tally(0, "duplicate", "source", None, 1, 0),
    Tally(1, "equal", None, 0, 5, 5),
    Tally(1, "missing", None, None, 2, 2),
    Tally(1, "extra", None, 0, 1, 1),
    Tally(1, "duplicate", "source", None, 2, 1),
    Tally(1, "duplicate", "source", 0, 1, 0),
]


def test_tallies_count_each_row_once_a_side() -> None:
    assert rows_by_range(TALLIES, 0) == {0: 5, 1: 4}
    assert rows_by_range(TALLIES, 1) == {0: 7}
    assert (keys_of(TALLIES, "duplicate"), keys_of(TALLIES, "duplicate", "target")) == (1, 0)
    assert rows_found(TALLIES) == 6
    require_complete(TALLIES, (9, 7), table="t")


@pytest.mark.parametrize("rows_read", [(10, 7), (9, 8), (8, 7), (9, 0)])
def test_rows_lost_or_won_on_the_way(rows_read: tuple[int, int]) -> None:
    with pytest.raises(CouldNotCheck, match=r"rows of the (source|target) were read and"):
        require_complete(TALLIES, rows_read, table="t")


def test_nothing_on_both_sides_is_complete_and_rows_that_were_read_of_no_class_are_not() -> None:
    require_complete([], (0, 0), table="t")
    with pytest.raises(CouldNotCheck, match="1 rows of the target were read and 0 were compared"):
        require_complete([], (0, 1), table="t")
