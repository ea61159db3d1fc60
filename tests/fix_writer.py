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
DELETE = "DELETE FROM follows WHERE from_user = %(user)s AND to_channel = %(channel)s"


class Writer(threading.Thread):
    """Writes until stopped; `writes` counts transactions, `failure` is what ended it early."""

    def __init__(self, dsn: str, seed: int, pause: float) -> None:
        super().__init__(name="writer", daemon=True)
        self.dsn = dsn
        self.random = random.Random(seed)
        self.pause = pause
        self.stopped = threading.Event()
        self.writes = 0
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
        """Run one transaction."""
        with connection.transaction(force_rollback=self.random.random() < 0.1):
            for _ in range(self.random.randint(1, 3)):
                connection.execute(
                    self.random.choice((INSERT, UPDATE, DELETE)),
                    {
                        "user": self.random.randint(1, 110),
                        "channel": self.random.randint(1, 22),
                        "note": self.random.choice(("new", "", "NULL", "\\N", "ü\t", None)),
                    },
                )
        self.writes += 1


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
