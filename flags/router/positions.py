"""Positions: how far a store has what was written to the other one, by the logs and never by the clock (application).

A shadow read is judged by them. A position of the authority's log is marked after it was read, and the other store is read once
all below it was offered there. `told` says whether anything was offered since. Runs on the thread of comparisons.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ldclient.migrations.types import Origin

from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.stages import other
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.records import OLD_STORE
from changeover.jobs.source.marker import emit_message
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
"""How often a marker is written at most, and only behind a position that is waited for: it has a log at rest passed."""


@dataclass(frozen=True)
class Reached:
    """Below which position of the other's log all was offered to a store, that of the last change offered, and the newest epoch."""

    applied: int
    told: int
    epoch: int


class Positions(Protocol):
    """What comparisons ask of the streams."""

    def mark(self, origin: Origin) -> tuple[int, bool]:
        """Return where a store's log is now, and whether something in it may not be visible yet."""
        ...

    def reached(self, origin: Origin) -> Reached | None:
        """Return how far a store has what was written to the other one; None where no stream goes to it.

        Who asks waits, so the other's stream is hurried on.
        """
        ...

    def close(self) -> None:
        """End the sessions."""
        ...


class LedgerPositions:
    """The positions that the ledger has."""

    def __init__(
        self, endpoints: Mapping[Origin, PgEndpoint], ledger_dsn: str, migration: str, target: str, application: str
    ) -> None:  # fmt: skip
        self.endpoints = endpoints
        self.ledger_dsn = ledger_dsn
        self.migration = migration
        self.application = application
        self.loads = {Origin.NEW: (OLD, target), Origin.OLD: (NEW, OLD_STORE)}
        self._sessions: dict[Origin | None, Connection] = {}
        self._known: dict[Origin, tuple[float, Reached | None]] = {}
        self._hurried: dict[Origin, float] = {}
        self._marked: set[Origin] = set()

    def mark(self, origin: Origin) -> tuple[int, bool]:
        """Read a store's position."""
        (at, waits) = one_row(self._session(origin).execute(AT))
        self._marked.add(origin)
        return parse_lsn(at), waits

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
        return known

    def _hurry(self, origin: Origin) -> None:
        """Write a marker behind the last position that was marked in a store's log, unless one was written a moment ago."""
        now = time.monotonic()
        if origin in self._marked and now - self._hurried.get(origin, float("-inf")) >= HURRY_SECONDS:
            emit_message(self._session(origin), "compared")
            self._marked.discard(origin)
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
