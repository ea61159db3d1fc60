"""Positions: how far a store has what was written to the other one, by the logs and never by the clock (application).

A shadow read is judged by them. A position of the authority's log is marked after it was read, and the other store is read once
all below it was offered there. `told` says whether anything was offered since. Runs on the thread of comparisons.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from ldclient.migrations.types import Origin

from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.stages import other
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.records import OLD_STORE
from changeover.jobs.source.marker import emit_message
from changeover.position import parse_lsn
from changeover.session import Connection, connect, wal_position
from changeover.settings import Kind

REACHED = """
SELECT min(applied)::text, max(told)::text FROM changeover.load WHERE migration = %s AND store = %s AND target = %s
"""


FRESH_SECONDS = 0.04
"""For how long an answer of the ledger is taken for that of now: many comparisons ask the same."""

HURRY_SECONDS = 0.5
"""How often a marker is written while anyone waits: a log at rest is passed by it."""


class Positions(Protocol):
    """What comparisons ask of the streams."""

    def mark(self, origin: Origin) -> int:
        """Return where a store's log is now."""
        ...

    def reached(self, origin: Origin) -> tuple[int, int]:
        """Return below which position of the other's log all was offered to a store, and that of the last change offered.

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
        self._known: dict[Origin, tuple[float, tuple[int, int]]] = {}
        self._hurried: dict[Origin, float] = {}

    def mark(self, origin: Origin) -> int:
        """Read a store's position."""
        return wal_position(self._session(origin))

    def reached(self, origin: Origin) -> tuple[int, int]:
        """Ask the ledger; nothing was offered to a store that no stream goes to."""
        asked, known = self._known.get(origin, (float("-inf"), (-1, -1)))
        if time.monotonic() - asked < FRESH_SECONDS:
            return known
        self._hurry(other(origin))
        now = time.monotonic()  # what is offered while the ledger answers is younger
        row = self._session(None).execute(REACHED, [self.migration, *self.loads[origin]]).fetchone()
        known = (parse_lsn(row[0]), parse_lsn(row[1])) if row and row[0] else (-1, -1)
        self._known[origin] = (now, known)
        return known

    def _hurry(self, origin: Origin) -> None:
        """Write a marker into a store's log, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._hurried.get(origin, float("-inf")) >= HURRY_SECONDS:
            emit_message(self._session(origin), "compared")
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
