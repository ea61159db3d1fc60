"""A live writer: random inserts, updates and deletes of follows, in a thread with a session of its own, until it is stopped.

Its seed makes a run repeatable up to the interleaving with the pipeline; it writes to the source alone, as the application does.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from changeover.session import Connection, connect

INSERT = """
INSERT INTO follows (from_user, to_channel, note, tags) VALUES (%(user)s, %(channel)s, %(note)s, ARRAY[%(note)s, NULL, ''])
ON CONFLICT (from_user, to_channel) DO UPDATE SET note = excluded.note
"""
UPDATE = "UPDATE follows SET note = %(note)s, score = -score WHERE from_user = %(user)s AND to_channel = %(channel)s"
NOTES = ("new", "", "NULL", "\\N", "ü\t", None)
DELETE = "DELETE FROM follows WHERE from_user = %(user)s AND to_channel = %(channel)s"


class Writer(threading.Thread):
    """Writes until stopped; `writes` counts transactions, `changes` committed rows, `failure` is what ended it early."""

    def __init__(self, dsn: str, seed: int, pause: float) -> None:
        super().__init__(name="writer", daemon=True)
        self.dsn = dsn
        self.random = random.Random(seed)
        self.pause = pause
        self.stopped = threading.Event()
        self.writes = 0
        self.changes = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Write, one to three changes a transaction, some of them rolled back."""
        try:
            with connect(self.dsn, "test-writer") as connection:
                while not self.stopped.wait(self.pause):
                    self.write(connection)
        except BaseException as error:  # told to the test by `writing`
            self.failure = error

    def write(self, connection: Connection) -> None:
        """Run one transaction, in one round trip; in the order of keys, so that two writers can't deadlock."""
        undone = self.random.random() < 0.1
        drawn = sorted(
            ((self.random.randint(1, 110), self.random.randint(1, 22)), self.random.choice((INSERT, UPDATE, DELETE)))
            for _ in range(self.random.randint(1, 3))
        )
        with connection.pipeline(), connection.transaction(force_rollback=undone):
            done = [
                connection.execute(statement, {"user": user, "channel": channel, "note": self.random.choice(NOTES)})
                for (user, channel), statement in drawn
            ]
        self.writes += 1
        self.changes += 0 if undone else sum(cursor.rowcount for cursor in done)


@contextmanager
def writing(dsn: str, seed: int = 1, pause: float = 0.002) -> Iterator[Writer]:
    """Write to the source for as long as the block lasts; what failed in the writer fails the test."""
    writer = Writer(dsn, seed, pause)
    writer.start()
    try:
        yield writer
    finally:
        writer.stopped.set()
        writer.join()
    if writer.failure is not None:
        raise writer.failure
    assert writer.writes, "the writer wrote nothing"


@pytest.fixture
def live_writer(old_dsn: str) -> Callable[[], object]:
    """Return what makes a live writer on the old store, as a context manager."""
    return lambda: writing(old_dsn)
