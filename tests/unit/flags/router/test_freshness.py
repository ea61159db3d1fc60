"""What a process wrote for whom: positions come in any order, and one that is unknown stays so until a later one is read."""

from __future__ import annotations

from ldclient import Context

from changeover.flags.router.freshness import KEPT, UNKNOWN, Reads

ONE, TWO = Context.create("one"), Context.create("two")


def test_of_two_threads_positions_the_newest_counts() -> None:
    reads = Reads(None, None, 1.0)
    for position in (200, 100):  # the first thread was the second to note it
        reads.note(ONE, position, 0)
    assert (reads.needed(ONE), reads.needed(TWO)) == (200, 0)


def test_an_unknown_position_is_that_of_a_later_write_and_of_no_earlier_one() -> None:
    reads = Reads(None, None, 1.0)
    reads.note(ONE, UNKNOWN, 0)
    reads.note(TWO, 100, 0)  # read before the one that is unknown, and noted after it
    assert (reads.needed(ONE), reads.needed(TWO)) == (UNKNOWN, 100)
    reads.note(TWO, 300, 1)
    assert (reads.needed(ONE), reads.needed(TWO)) == (300, 300)


def test_an_unknown_position_that_is_no_longer_kept_counts_for_everybody() -> None:
    reads = Reads(None, None, 1.0)
    reads.note(ONE, UNKNOWN, 0)
    for number in range(KEPT):
        reads.note(Context.create(str(number)), 100, 0)
    assert reads.needed(TWO) == UNKNOWN
    reads.note(None, 300, 1)
    assert reads.needed(TWO) == 300
