"""Queues of mirrors, by the heartbeats in a real ledger: what a process had queued has to be dealt with, and no second counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import HEARTBEAT_SECONDS, Heartbeat
from changeover.session import connect
from changeover.verifiers.passage import Queues
from tests.support.fix_flags import PATIENCE, Stores, wait_until


class Asked(Ledger):
    """A ledger that counts how often it was asked for heartbeats."""

    times = 0

    def heartbeats(self) -> list[Heartbeat]:
        found = super().heartbeats()
        self.times += 1
        return found


@pytest.fixture
def asked(stores: Stores) -> Iterator[Asked]:
    with connect(stores.new_dsn, "test-passage") as session:
        yield Asked(session, stores.ledger.migration, stores.new_dsn)


class Waiting:
    """A wait in a thread of its own."""

    def __init__(self, ledger: Asked, wait: Callable[[], None]) -> None:
        self.ledger = ledger
        self.thread = threading.Thread(target=wait)
        self.thread.start()

    def goes_on(self) -> bool:
        """Return whether it still waits, once it has looked twice more."""
        before = self.ledger.times
        wait_until(lambda: self.ledger.times >= before + 2 or not self.thread.is_alive())
        return self.thread.is_alive()

    def ends(self) -> bool:
        self.thread.join(PATIENCE)
        return not self.thread.is_alive()


def tell(stores: Stores, mirrored: int, depth: int, process: str = "web-1") -> None:
    counts = {"mirrored": mirrored, "settled": mirrored - depth, "dropped": 0}
    stores.ledger.beat(process, "live", 1, {"mirror_old": counts, "mirrors": True})


def test_what_each_process_had_queued_has_to_be_dealt_with_and_nothing_later(stores: Stores, asked: Asked) -> None:
    queues = Queues(asked)
    tell(stores, 5, 0)
    tell(stores, 1, 0, "web-2")
    marking = Waiting(asked, queues.mark)
    assert marking.goes_on(), "these were told before"
    tell(stores, 5, 0)
    assert marking.goes_on(), "and this one may have been counted before"
    tell(stores, 9, 3)
    assert marking.goes_on(), "the other process was not heard"
    for _ in range(2):
        assert marking.goes_on()
        tell(stores, 1, 0, "web-2")
    assert marking.ends()

    passing = Waiting(asked, queues.through)
    assert passing.goes_on()
    tell(stores, 12, 4)
    assert passing.goes_on(), "8 of 9 are dealt with"
    tell(stores, 20, 11)
    assert passing.ends(), "what was queued since is not waited for"


def test_a_process_that_is_not_heard_of_any_more_brings_nothing(stores: Stores, asked: Asked) -> None:
    queues = Queues(asked)
    tell(stores, 5, 5)
    stores.ledger.connection.execute("UPDATE changeover.heartbeat SET at = at - %s", [timedelta(seconds=HEARTBEAT_SECONDS + 1)])
    queues.mark()
    queues.through()


def test_without_a_stream_any_key_may_have_been_written_when_something_was_queued(stores: Stores, asked: Asked) -> None:
    queues = Queues(asked)
    tell(stores, 5, 0)
    told = [list(queues.history([("1",)]))]
    tell(stores, 5, 0)
    told.append(list(queues.history([("1",)])))
    tell(stores, 6, 1)
    told.append(list(queues.history([("1",)])))
    assert told == [[None], [], [None]]
