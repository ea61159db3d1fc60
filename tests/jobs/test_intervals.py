"""Which parts of the old store's stream a target is offered, as authority moves there and back."""

from __future__ import annotations

from datetime import UTC, datetime

from changeover.jobs.entries import Authority
from changeover.jobs.replay import FOR_EVER, Interval, offered_intervals

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
        Interval(1, 100, 200),
        Interval(2, 200, FOR_EVER),
    ]


def test_a_second_fence_closes_the_last_interval_again() -> None:
    assert offered_intervals([THERE, BACK, AGAIN], takes_over=True) == [Interval(0, 0, 100), Interval(2, 200, 300)]
    assert offered_intervals([THERE, BACK, AGAIN], takes_over=False)[-1] == Interval(2, 200, 300)
