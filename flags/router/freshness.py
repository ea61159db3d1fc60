"""Reads before writes: contexts that the flag serves live read from the new store while the old one still has authority.

Writes follow the ledger alone. A context moves its reads where three things agree: the flag serves
it live or above, the ledger has it on record that reads may move, and a replay runs. It never reads
older than what this process wrote last for it. After such a COMMIT the old store's position is
noted, and a read waits until replay has passed it; after the deadline the authority is read, and
counted. A write that names no context counts for all of them. Runs on the callers' threads.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from typing import Any

import psycopg
from ldclient import Context

from changeover.flags.router.follower import Follower
from changeover.jobs.source.marker import emit_message
from changeover.position import parse_lsn
from changeover.session import one_row

KEPT = 10_000
"""Contexts whose last write is kept; of those before, the newest position counts for every context."""

UNKNOWN = 1 << 64
"""Above every position: after a COMMIT whose position could not be read."""

HURRY_SECONDS = 0.5
"""How often a marker is written at most while a read waits: it has a log at rest passed."""


class Reads:
    """What this process wrote for whom, and whether the new store has it by now; thread-safe."""

    def __init__(self, follower: Follower | None, wait: float) -> None:
        self.follower = follower
        self.wait = wait
        self._written: OrderedDict[str, int] = OrderedDict()
        self._floor = 0
        self._opened: int | None = None
        self._hurried = float("-inf")
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        """Return whether reads may move, as the record has it."""
        return self.follower is not None and self.follower.reads_open is not None

    def counters(self) -> dict[str, Any]:
        """Return how many reads went to the new store, and how many could not: it was behind, or no replay ran."""
        with self._lock:
            return {name: self._counts[name] for name in ("moved", "behind", "unreplayed")}

    def wrote(self, context: Context | None, connection: psycopg.Connection[Any]) -> None:
        """Note where the old store's log is after a COMMIT for a context, or for nobody in particular."""
        try:
            position = _position(connection)
        except psycopg.Error:  # the write is done all the same: its context reads from the authority until a later write
            position = UNKNOWN
        with self._lock:
            if position != UNKNOWN:  # it is behind all that was written before
                self._floor = position if self._floor == UNKNOWN else self._floor
                for key in [key for key, written in self._written.items() if written == UNKNOWN]:
                    self._written[key] = position
            if context is None:
                self._floor = max(self._floor, position)
                return
            self._written[context.fully_qualified_key] = position
            self._written.move_to_end(context.fully_qualified_key)
            if len(self._written) > KEPT:
                self._floor = max(self._floor, self._written.popitem(last=False)[1])

    def moved(self, context: Context, connection: Any) -> bool:
        """Return whether a context that the flag serves live may read from the new store now; it waits for its own writes.

        `connection` lends a session with the old store, by which a log at rest is moved on.
        """
        self._begin(connection)
        with self._lock:
            needed = max(self._floor, self._written.get(context.fully_qualified_key, 0))
        outcome = self._outcome(needed, connection)
        with self._lock:
            self._counts[outcome] += 1
        return outcome == "moved"

    def _begin(self, connection: Any) -> None:
        """Count what was written before reads were opened for every context: no position of it was noted."""
        opened = self.follower.reads_open if self.follower is not None else None
        if opened == self._opened:
            return
        with connection() as session:
            position = _position(session)
        with self._lock:
            self._floor, self._opened = max(self._floor, position), opened

    def _outcome(self, needed: int, connection: Any) -> str:
        follower, until = self.follower, time.monotonic() + self.wait
        if follower is None or not follower.replaying:
            return "unreplayed"
        while follower.applied < needed:
            left = until - time.monotonic()
            if left <= 0 or needed == UNKNOWN:
                return "behind"
            self._hurry(connection)
            follower.wait_applied(needed, min(left, HURRY_SECONDS))
        return "moved"

    def _hurry(self, connection: Any) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._hurried < HURRY_SECONDS:
                return
            self._hurried = now
        with connection() as session:
            emit_message(session, "read")


def _position(connection: psycopg.Connection[Any]) -> int:
    """Return where a store's log is; the session may be an application's, with a row factory of its own."""
    with connection.cursor(row_factory=psycopg.rows.tuple_row) as plain:
        return parse_lsn(one_row(plain.execute("SELECT pg_catalog.pg_current_wal_insert_lsn()::text"))[0])
