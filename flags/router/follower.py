"""The follower: which store has authority, followed by a background thread, and what this process last acknowledged of it.

`LedgerAuthority` asks the ledger for its newest move every 50 ms on a connection of its own, and at
once when a write was refused. It reads those that came since only where that is another one: many
tenants may be named there. It records a heartbeat every 0.5 s and at once when the stage or the
epoch has changed. A ledger that can't be reached keeps what was last observed: that is safe,
because the store that lost authority refuses by itself. The caller's thread only reads an
attribute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import psycopg
from ldclient.migrations.types import Origin, Stage

from changeover.errors import ServerUnavailable
from changeover.flags.observed import Observation, Observations, observations
from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.shadow.positions import LedgerPositions, Positions
from changeover.jobs.ledger.ledger import Ledger
from changeover.position import parse_lsn
from changeover.session import application_name, connect, one_row
from changeover.settings import Kind

log = logging.getLogger("changeover.flags")

POLL_SECONDS = 0.05
LOOK_AGAIN_SECONDS = 0.01
BEAT_SECONDS = 0.5
RECONNECT_SECONDS = 0.5
FIRST_LOOK_SECONDS = 3.0
SETTINGS = {"statement_timeout": "2s"}

NEWEST = """
SELECT a.epoch, a.at, f.stage, f.switches, CASE WHEN f.reads > 0 THEN (SELECT min(applied)::text FROM changeover.load
    WHERE migration = %(migration)s AND store = 'old' AND target = %(target)s HAVING bool_and(state = 'closed' AND stopped IS NULL))
    END
FROM (VALUES (%(migration)s)) AS one (migration) LEFT JOIN changeover.flag AS f USING (migration)
LEFT JOIN LATERAL (SELECT epoch, at FROM changeover.authority WHERE migration = %(migration)s ORDER BY epoch DESC LIMIT 1)
    AS a ON true
"""
"""The newest move, by its time as well: a migration that was aborted and prepared again counts its epochs anew. And where the
flag stands on record, and while reads may move how far the new store is: not where a table is loaded anew, or goes no further."""


@dataclass(frozen=True)
class Beat:
    """What a process says of itself: the stage at which it acts, the newest epoch that it knows of, and its counters."""

    stage: Stage
    epoch: int
    counters: Mapping[str, Any]


class AuthoritySource(Protocol):
    """Makes one follower per process; a forked child makes its own."""

    def follow(self, process: str, beat: Callable[[], Beat | None]) -> Follower:
        """Start following (first use in a process)."""
        ...

    def positions(self, endpoints: Mapping[Origin, PgEndpoint], application: str) -> Positions | None:
        """Return how far the streams are, as comparisons ask it; None where it isn't known."""
        ...


class Follower(Protocol):
    """What the router asks for the observed authority, within one process."""

    observations: Observations | None
    recorded: Stage | None
    """The stage that is on record, None before the first switch."""
    reads_open: int | None
    """By which switch on record reads may move before writes, None where they may not."""
    applied: int
    """Below which position the new store has what was written to the old one; known while reads may move."""
    replaying: bool
    """Whether a replay ran at the last look; known while reads may move."""
    last_stage: Stage | None

    def wait_applied(self, position: int, seconds: float) -> None:
        """Wait, at most so long, until the new store has everything below a position (caller's thread)."""
        ...

    def wait(self, tenant: str, observation: Observation, seconds: float) -> None:
        """Wait, at most so long, until a tenant's observed stage is another one (caller's thread, after a refusal)."""
        ...

    def hurry(self) -> None:
        """Have the ledger asked at once."""
        ...

    def close(self) -> None:
        """Record a last heartbeat and end the thread."""
        ...


@dataclass(frozen=True)
class LedgerAuthority:
    """The ledger of a migration as the source of authority; `target` is the new store's name in the spec, by which its loads go."""

    dsn: str
    migration: str
    target: str | None = None

    def follow(self, process: str, beat: Callable[[], Beat | None]) -> LedgerFollower:
        """Start the background thread; the first look is waited for, so that the first call already has it."""
        return LedgerFollower(self, process, beat)

    def positions(self, endpoints: Mapping[Origin, PgEndpoint], application: str) -> LedgerPositions | None:
        """Return the ledger's positions of the new store's loads, and of those back to the old store."""
        if self.target is None:
            return None
        return LedgerPositions(endpoints, self.dsn, self.migration, self.target, application)


class LedgerFollower:
    """Follows the ledger in one process."""

    def __init__(self, source: LedgerAuthority, process: str, beat: Callable[[], Beat | None]) -> None:
        self.source = source
        self.process = process
        self.observations: Observations | None = None
        self.recorded: Stage | None = None
        self.reads_open: int | None = None
        self.applied = 0
        self.replaying = False
        self.last_stage: Stage | None = None
        self.failures = 0
        self._beat = beat
        self._newest: tuple[int, datetime] | None = None
        self._beaten: tuple[Stage, int] | None = None
        self._beaten_at = float("-inf")
        self._ledger: Ledger | None = None
        self._changed = threading.Condition()
        self._looks = 0
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="changeover-authority", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._looks or self.failures, FIRST_LOOK_SECONDS)

    def wait(self, tenant: str, observation: Observation, seconds: float) -> None:
        """Wait until the ledger says something else of a tenant, or the time is over."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self._says_else(tenant, observation) and time.monotonic() < until:
                self._wake.set()
                self._changed.wait(LOOK_AGAIN_SECONDS)
                # `wait` ends with the first look, which may come at once: the next one is not asked for before its
                # time.
                self._changed.wait_for(lambda: self._says_else(tenant, observation), LOOK_AGAIN_SECONDS)

    def wait_applied(self, position: int, seconds: float) -> None:
        """Wait until replay has passed a position, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.applied >= position, seconds)

    def hurry(self) -> None:
        """Wake the thread."""
        self._wake.set()

    def _says_else(self, tenant: str, observation: Observation) -> bool:
        return self.observations is not None and self.observations.of(tenant) != observation

    def close(self) -> None:
        """Record the last counters, then end the thread and its connection."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        looked = self._look()
        while not self._stop.is_set():
            self._wake.wait(POLL_SECONDS if looked else RECONNECT_SECONDS)
            self._wake.clear()
            looked = self._look()
        # The look that the stop fell into may have begun before the last counts were final.
        if looked:
            self._look()
        if self._ledger is not None:
            self._ledger.connection.close()

    def _look(self) -> bool:
        """Read authority and beat where due; False when the ledger can't be used now."""
        try:
            ledger = self._open()
            known = self._known(ledger)
            if self.reads_open is not None and (self._beat_due() or not self.replaying):
                self.replaying = ledger.is_connected("replay")
            with self._changed:
                self.observations = known
                self._looks += 1
                self._changed.notify_all()
            self._beat_where_due(ledger)
        except (psycopg.Error, ServerUnavailable) as error:
            self._failed(error)
            return False
        return True

    def _known(self, ledger: Ledger) -> Observations:
        """Return what is observed, with the moves since the last look; all are read where the last one is gone."""
        asked = {"migration": self.source.migration, "target": self.source.target}
        (epoch, at, stage, switches, applied) = one_row(ledger.connection.execute(NEWEST, asked))
        self.recorded = Stage.from_str(stage) if stage is not None else None
        self.applied = parse_lsn(applied) if applied is not None else 0
        self.reads_open = switches if applied is not None else None
        newest = (epoch, at) if epoch is not None else None
        if self.observations is not None and newest == self._newest:
            return self.observations
        later = ledger.authorities(self._newest[0]) if self._newest is not None else []
        if later and self.observations is not None and (later[0].epoch, later[0].at) == self._newest:
            known = observations(later[1:], self.observations)
        else:
            known = observations(ledger.authorities())
        self._newest = newest
        return known

    def _open(self) -> Ledger:
        if self._ledger is None:
            name = application_name(self.source.migration, "router")
            self._ledger = Ledger(
                connect(self.source.dsn, name, settings=SETTINGS, kind=Kind.BESIDE), self.source.migration, self.source.dsn
            )
            if self.last_stage is None:
                self.last_stage = _last_stage(self._ledger)
        return self._ledger

    def _beat_where_due(self, ledger: Ledger) -> None:
        beat = self._beat()
        if beat is None:
            return
        beaten = (beat.stage, beat.epoch)
        if beaten != self._beaten or self._beat_due() or self._stop.is_set():
            ledger.beat(self.process, beat.stage.value, beat.epoch, beat.counters)
            self._beaten, self._beaten_at = beaten, time.monotonic()

    def _beat_due(self) -> bool:
        return time.monotonic() - self._beaten_at >= BEAT_SECONDS

    def _failed(self, error: Exception) -> None:
        if not self.failures or self._ledger is not None:
            log.warning("the ledger can't be read (%s): the last known authority stays", type(error).__name__)
        self.replaying = False  # for all that is known
        with self._changed:
            self.failures += 1
            self._changed.notify_all()
        if self._ledger is not None:
            self._ledger.connection.close()
            self._ledger = None


def _last_stage(ledger: Ledger) -> Stage | None:
    """Return the stage that a process of this migration acknowledged last: a restart without a flag starts there."""
    beats = sorted(ledger.heartbeats(), key=lambda beat: beat.at)
    return Stage.from_str(beats[-1].stage) if beats else None
