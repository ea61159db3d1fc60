"""Positions: how far a store has what was written to the other one, by the logs and never by the clock (application).

A shadow read is judged by them. A position of the authority's log is marked after it was read, and the other store is read once
all below it was offered there. `told` says whether anything was offered since. Runs on the thread of comparisons, which also
puts mismatched reads on record here.

A trigger log has positions of its own making (`jobs.source.ticks`). A change that was visible when P was marked is in the tick
whose end is at P or above it, or in an earlier one, and stands below P. So once all below P was offered, that change was. A
change that comes after the other store was read stands at P or above, so `told` passes P. No tick has what its snapshot does not
show, so the other store is never ahead of what the old one shows, whatever a commit waits for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ldclient.migrations.types import Origin

from changeover.flags.stages import other
from changeover.jobs.ledger import readdifferences
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.readdifferences import ReadDifference
from changeover.jobs.ledger.records import OLD_STORE
from changeover.jobs.source.marker import move_on
from changeover.jobs.source.triggerlog import Log
from changeover.position import parse_lsn
from changeover.session import Connection, connect, one_row
from changeover.settings import Kind

REACHED = """
SELECT min(applied)::text, max(told)::text, (SELECT max(epoch) FROM changeover.authority WHERE migration = %(migration)s)
FROM changeover.load WHERE migration = %(migration)s AND store = %(store)s AND target = %(target)s
"""

AT = """
SELECT pg_catalog.pg_current_wal_insert_lsn()::text,
    pg_catalog.current_setting('synchronous_standby_names') OPERATOR(pg_catalog.<>) ''
    AND EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'transactionid'
        AND mode OPERATOR(pg_catalog.=) 'ExclusiveLock')
"""
"""Where the log is, and whether a commit may wait for a standby: its row is in the log, and no session sees it yet.

A transaction that writes holds its own number locked, which anybody may see.
"""


FRESH_SECONDS = 0.04
"""For how long an answer of the ledger is taken for that of now: many comparisons ask the same."""

HURRY_SECONDS = 0.5
"""How often a marker is written at most, or a tick asked for, and only behind a position that is waited for.

It has a log at rest passed.
"""


class Store(Protocol):
    """A store as comparisons reach it."""

    @property
    def log(self) -> Log | None:
        """Return the trigger log by which it is captured, None where a slot does it."""
        ...

    def open(self, application: str, settings: Mapping[str, str] | None = None, kind: Kind = Kind.CALLERS) -> Connection:
        """Open a session."""
        ...


@dataclass(frozen=True)
class Reached:
    """Below which position of the other's log all was offered to a store, that of the last change offered, and the newest epoch."""

    applied: int
    told: int
    epoch: int


class Positions(Protocol):
    """What comparisons ask of the streams."""

    def mark(self, origin: Origin) -> tuple[int, bool]:
        """Return where a store's log is now.

        Args:
            origin: The store.

        Returns:
            (position, an LSN; whether the other store may have what is not visible there yet).
        """
        ...

    def reached(self, origin: Origin) -> Reached | None:
        """Return how far a store has what was written to the other one. Who asks waits, so the other's stream is hurried on.

        Args:
            origin: The store that is written to by a stream.

        Returns:
            How far it is; None where no stream goes to it.
        """
        ...

    def record(self, differences: Sequence[ReadDifference]) -> None:
        """Put mismatched reads on record.

        Args:
            differences: The reads, oldest first.
        """
        ...

    def close(self) -> None:
        """End the sessions."""
        ...


class LedgerPositions:
    """The positions that the ledger has."""

    def __init__(
        self, endpoints: Mapping[Origin, Store], ledger_dsn: str, migration: str, target: str, application: str
    ) -> None:  # fmt: skip
        self.endpoints = endpoints
        self.ledger_dsn = ledger_dsn
        self.migration = migration
        self.application = application
        self.loads = {Origin.NEW: (OLD, target), Origin.OLD: (NEW, OLD_STORE)}
        self._sessions: dict[Origin | None, Connection] = {}
        self._known: dict[Origin, tuple[float, Reached | None]] = {}
        self._hurried: dict[Origin, float] = {}
        self._marked: dict[Origin, int] = {}
        """The last position that was marked in a store's log, until it is sure to be passed."""

    def mark(self, origin: Origin) -> tuple[int, bool]:
        """Read a store's position."""
        (at, waits) = one_row(self._session(origin).execute(AT))
        self._marked[origin] = parse_lsn(at)
        return self._marked[origin], waits and self.endpoints[origin].log is None

    def reached(self, origin: Origin) -> Reached | None:
        """Ask the ledger."""
        asked, known = self._known.get(origin, (float("-inf"), None))
        if time.monotonic() - asked < FRESH_SECONDS:
            return known
        self._hurry(other(origin))
        now = time.monotonic()  # what is offered while the ledger answers is younger
        store, target = self.loads[origin]
        (applied, told, epoch) = one_row(
            self._session(None).execute(REACHED, {"migration": self.migration, "store": store, "target": target})
        )
        known = Reached(parse_lsn(applied), parse_lsn(told), epoch or 0) if applied is not None else None
        self._known[origin] = (now, known)
        if known is not None and known.applied >= self._marked.get(other(origin), known.applied + 1):
            del self._marked[other(origin)]
        return known

    def record(self, differences: Sequence[ReadDifference]) -> None:
        """Write to the ledger."""
        readdifferences.record(self._session(None), self.migration, differences)

    def _hurry(self, origin: Origin) -> None:
        """Have a store's log pass the last position that was marked in it, unless that was done a moment ago."""
        now = time.monotonic()
        if origin not in self._marked or now - self._hurried.get(origin, float("-inf")) < HURRY_SECONDS:
            return
        log = self.endpoints[origin].log
        move_on(self._session(origin), log, "compared")
        if log is None:  # the marker is in the log for good; a notification may meet no capture, and is sent again
            del self._marked[origin]
        self._hurried[origin] = now

    def close(self) -> None:
        """Close what is open."""
        for session in self._sessions.values():
            session.close()

    def _session(self, origin: Origin | None) -> Connection:
        """Return a session with a store, or with the ledger."""
        session = self._sessions.get(origin)
        if session is None or session.closed:
            if origin is None:
                session = connect(self.ledger_dsn, self.application, kind=Kind.BESIDE)
            else:
                session = self.endpoints[origin].open(self.application, kind=Kind.BESIDE)
            self._sessions[origin] = session
        return session
