"""Which parts of the old store's stream a target is offered, as authority moves there and back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from changeover.jobs.ledger.epochs import FOR_EVER, Interval, Standing, authority_epochs, offered_intervals, standing, without
from changeover.jobs.ledger.records import Authority

AT = datetime(2026, 1, 1, tzinfo=UTC)
THERE = Authority(1, "new", 100, AT, 0.1)
BACK = Authority(2, "old", 200, AT, 0.1)
AGAIN = Authority(3, "new", 300, AT, 0.1)


def test_before_any_fence_everything_is_offered() -> None:
    for takes_over in (True, False):
        assert offered_intervals([], takes_over=takes_over) == [Interval(0, 0, FOR_EVER)]


def test_after_the_fence_both_stop_there() -> None:
    for takes_over in (True, False):
        assert offered_intervals([THERE], takes_over=takes_over) == [Interval(0, 0, 100)]


def test_after_a_rollback_the_echo_goes_to_the_other_target_alone() -> None:
    assert offered_intervals([THERE, BACK], takes_over=True) == [Interval(0, 0, 100), Interval(2, 200, FOR_EVER)]
    assert offered_intervals([THERE, BACK], takes_over=False) == [
        Interval(0, 0, 100),
        Interval(2, 100, 200, echo=True),
        Interval(2, 200, FOR_EVER),
    ]


def test_a_second_fence_closes_the_last_interval_again() -> None:
    assert offered_intervals([THERE, BACK, AGAIN], takes_over=True) == [Interval(0, 0, 100), Interval(2, 200, 300)]
    assert offered_intervals([THERE, BACK, AGAIN], takes_over=False)[-1] == Interval(2, 200, 300)


NEW_THERE, NEW_BACK = replace(THERE, new_lsn=5000), replace(BACK, new_lsn=6000)


def test_what_the_new_stores_own_stream_carries_is_offered_from_there_at_once() -> None:
    carried = {1}
    assert offered_intervals([NEW_THERE], takes_over=False, carried=carried) == [
        Interval(0, 0, 100),
        Interval(1, 5000, FOR_EVER, "new"),
    ]
    assert offered_intervals([NEW_THERE, NEW_BACK], takes_over=False, carried=carried) == [
        Interval(0, 0, 100),
        Interval(1, 5000, 6000, "new"),
        Interval(2, 200, FOR_EVER),
    ]
    assert offered_intervals([NEW_THERE], takes_over=True, carried=carried) == [Interval(0, 0, 100)]


def test_a_store_without_authority_has_rogue_writes_alone() -> None:
    changes = [NEW_THERE, NEW_BACK, replace(AGAIN, new_lsn=7000)]
    log = authority_epochs(changes)
    assert without(log, "old", 0) == [(100, 200), (300, FOR_EVER)]
    assert without(log, "new", 4000) == [(4000, 5000), (6000, 7000)]
    assert without(authority_epochs([]), "new", 4000) == [(4000, FOR_EVER)]
    assert without(authority_epochs([]), "old", 0) == []
    for store, lsn, expected in (
        ("old", 99, Standing.OFFERED), ("old", 100, Standing.ROGUE), ("old", 200, Standing.OFFERED), ("new", 4999, Standing.ROGUE),
        ("new", 5000, Standing.OFFERED), ("new", 6000, Standing.ROGUE), ("new", 7000, Standing.OFFERED),
    ):  # fmt: skip
        assert standing(log, "", store, lsn, marked=False) is expected
        assert any(since <= lsn < until for since, until in without(log, store, 0)) == (expected is Standing.ROGUE)


def test_nothing_from_before_a_new_epoch_of_the_tables_counts() -> None:
    anew = Authority(4, "old", 50, AT, None)
    back_and_anew = [NEW_THERE, NEW_BACK, anew, Authority(5, "new", 90, AT, 0.1, 700)]
    expected = [Interval(4, 0, 90)]
    assert offered_intervals(back_and_anew, takes_over=True) == expected
    assert offered_intervals(back_and_anew, takes_over=False, carried={5}) == [*expected, Interval(5, 700, FOR_EVER, "new")]
