"""Reads before writes: contexts that the flag serves live read from the new store while the old one still has authority.

Writes follow the ledger alone. A context moves its reads where three things agree: the flag serves
it live or above, the ledger has it on record that reads may move, and a replay runs. It never reads
older than what this process wrote last for it. After such a COMMIT the old store's position is
noted, and a read waits until replay has passed it; after the deadline the authority is read, and
counted. A write that names no context counts for all of them. Runs on the callers' threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psycopg
from ldclient import Context

from changeover.flags.router.follower import Follower
from changeover.jobs.source.marker import move_on
from changeover.jobs.source.triggerlog import Log
from changeover.position import parse_lsn
from changeover.session import one_row

log = logging.getLogger("changeover.flags")

Lender = Callable[[], AbstractContextManager[psycopg.Connection[Any]]]
"""Lends a session with the old store."""

KEPT = 10_000
"""Contexts whose last write is kept; of those before, the newest position counts for every context."""

UNKNOWN = 1 << 64
"""Above every position: after a COMMIT whose position could not be read."""

HURRY_SECONDS = 0.5
"""How often a log at rest is moved on at most while a read waits."""


class Reads:
    """What this process wrote for whom, and whether the new store has it by now; thread-safe."""

    def __init__(self, follower: Follower | None, log: Log | None, wait: float) -> None:
        self.follower = follower
        self.log = log
        self.wait = wait
        self._written: OrderedDict[str, int] = OrderedDict()
        self._floor = 0
        self._doubts = 0
        self._unsure: set[str] = set()
        self._unnoted = object()
        self._begun: tuple[int | None, object] | None = None
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

    def wrote(self, context: Context | None, session: Lender | None) -> None:
        """Note where the old store's log is after a COMMIT for a context, or for nobody in particular.

        It raises nothing: the write is done. Without a position its context reads from the authority until a later write. So it
        does where there is no session to ask, because nobody knows whether a COMMIT was done.
        """
        if not self.open:
            self._unnoted = object()  # whoever reads next counts it with what was written before
            return
        doubts, position = self._doubts, UNKNOWN
        try:
            if session is not None:
                with session() as connection:
                    position = _position(connection)
        except Exception as error:  # whatever the application's pool raises
            log.warning("where a write is in the old store's log can't be read (%s)", type(error).__name__)
        self.note(context, position, doubts)

    def note(self, context: Context | None, position: int, doubts: int) -> None:
        """Note the position of a write; `doubts` is how many were unknown before it was read, which it is behind."""
        with self._lock:
            if position == UNKNOWN:
                self._doubts += 1
            elif doubts == self._doubts:
                self._floor = position if self._floor == UNKNOWN else self._floor
                self._written.update(dict.fromkeys(self._unsure & self._written.keys(), position))
                self._unsure.clear()
            if context is None:
                self._floor = max(self._floor, position)
                return
            key = context.fully_qualified_key
            # another thread's write may be behind this one, and noted before it
            self._written[key] = max(position, self._written.get(key, 0))
            self._written.move_to_end(key)
            if position == UNKNOWN:
                self._unsure.add(key)
            if len(self._written) > KEPT:
                self._floor = max(self._floor, self._written.popitem(last=False)[1])

    def needed(self, context: Context) -> int:
        """Return which position replay has to have passed for a context's reads."""
        with self._lock:
            return max(self._floor, self._written.get(context.fully_qualified_key, 0))

    def moved(self, context: Context, connection: Lender) -> bool:
        """Return whether a context that the flag serves live may read from the new store now; it waits for its own writes.

        `connection` lends a session with the old store, by which a log at rest is moved on.
        """
        self._begin(connection)
        outcome = self._outcome(self.needed(context), connection)
        with self._lock:
            self._counts[outcome] += 1
        return outcome == "moved"

    def _begin(self, connection: Lender) -> None:
        """Count what was written while reads were not open for every context: no position of it was noted."""
        begun = (self.follower.reads_open if self.follower is not None else None, self._unnoted)
        if begun == self._begun:
            return
        with connection() as session:
            position = _position(session)
        with self._lock:
            self._floor, self._begun = max(self._floor, position), begun

    def _outcome(self, needed: int, connection: Lender) -> str:
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

    def _hurry(self, connection: Lender) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._hurried < HURRY_SECONDS:
                return
            self._hurried = now
        with connection() as session:
            move_on(session, self.log, "read")


def _position(connection: psycopg.Connection[Any]) -> int:
    """Return where a store's log is; the session may be an application's, with a row factory of its own."""
    with connection.cursor(row_factory=psycopg.rows.tuple_row) as plain:
        return parse_lsn(one_row(plain.execute("SELECT pg_catalog.pg_current_wal_insert_lsn()::text"))[0])
