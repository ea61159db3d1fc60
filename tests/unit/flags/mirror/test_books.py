"""The books of a mirror: what is dealt with, where workers overtake each other."""

from __future__ import annotations

from changeover.flags.mirror.books import Books
from changeover.flags.mirror.offer import Bounds, Offer
from changeover.position import Version


def test_what_is_settled_is_all_up_to_the_oldest_that_is_under_way() -> None:
    """A later unit may be done before: a count of those that are done would tell that an older one is through."""
    books = Books("the store", Bounds())
    offers = [Offer(Version(0, lsn, 0), (), 0) for lsn in range(1, 5)]
    assert books.counters()["settled"] == 0
    for offer in offers:
        assert books.enter(offer, lambda offer: None)
    settled = []
    for offer in (offers[1], offers[3], offers[0], offers[2]):
        books.done([offer], 0.0)
        settled.append(books.counters()["settled"])
    assert settled == [0, 0, 2, 4]
