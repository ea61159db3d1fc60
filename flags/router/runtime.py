"""The runtime: a router's threads, sessions and counts in one process, made on first use there.

It holds what must not cross a fork, and turns the desired and the observed stage into the pin by which a call goes. A forked
child makes its own and leaves the parent's alone.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import psycopg
from ldclient import Context
from ldclient.migrations.types import Operation, Origin, Stage

from changeover.errors import ServerUnavailable
from changeover.flags.mirror.change import MirroredTable
from changeover.flags.mirror.mirror import Mirror
from changeover.flags.mirror.offer import Bounds, Ended, unheard
from changeover.flags.mirror.worker import Way
from changeover.flags.mirror.written import StoreTables
from changeover.flags.observed import BEGINNING, Observation
from changeover.flags.retry import RETRIED
from changeover.flags.router.desired import StageSource
from changeover.flags.router.endpoint import PgEndpoint, Sessions
from changeover.flags.router.follower import AuthoritySource, Beat, Follower
from changeover.flags.router.freshness import Reads
from changeover.flags.router.operations import Asked, Done
from changeover.flags.router.unit import sqlstate
from changeover.flags.shadow.comparisons import Comparisons
from changeover.flags.shadow.experiment import Result
from changeover.flags.shadow.judge import nothing
from changeover.flags.shadow.sampling import Sampling
from changeover.flags.stages import FENCED, TABLE, StageRule, effective, other
from changeover.jobs.ledger.epochs import EVERYTHING

PASSING = frozenset({FENCED, *RETRIED})


@dataclass(frozen=True)
class Limits:
    """Bounds of what runs beside the callers, and of the pause that a fence may cost one of them. Times in seconds."""

    max_pause: float = 10.0
    deadline: float = 30.0
    """How long a statement of a caller's, or its wait for a lock, may take in a session that the router opened."""
    mirror_workers: int = 4
    mirror_queue: int = 10_000
    """Rows of small units under way to the other store; of bulks as many again."""
    mirror_bytes: int = 64 << 20
    mirror_wait: float = 0.05
    """How long a full queue makes a caller wait at most, where the other store keeps up."""
    mirror_deadline: float = 2.0
    compare_queue: int = 1_000
    compare_deadline: float = 2.0
    compare_share: float = 1.0
    """Which share of the reads is compared, from 0 to 1, of those that the flag's check ratio leaves."""
    compare_bytes: int = 32 << 20
    """About how many bytes of answers are kept for comparisons, and of mismatches, in each process."""
    close_wait: float = 5.0
    read_wait: float = 1.0
    """How long a read of a context that reads before writes waits for what this process wrote for it."""


@dataclass(frozen=True)
class Pin:
    """What one call, or one request, goes by: the desired and the observed stage, and the stage that the two give."""

    desired: Stage
    observation: Observation
    stage: Stage
    rule: StageRule


@dataclass(frozen=True)
class Parts:
    """What a router was made of: the same in the process that made it and in its forked children."""

    endpoints: Mapping[Origin, PgEndpoint]
    mirrored: Sequence[MirroredTable]
    """The tables whose rows the application mirrors; none where the streams alone bring them."""
    stage: StageSource
    authority: AuthoritySource | None
    application: str
    process: str | None
    limits: Limits


class Runtime:
    """The threads, sessions and counts of a router in one process."""

    def __init__(self, parts: Parts) -> None:
        self.pid = os.getpid()
        self.parts = parts
        self.pins: dict[tuple[Stage, Observation, Stage | None], Pin] = {}
        self._lock = threading.Lock()
        self._counts = {"retries": 0, "fence_waits": 0}
        self._writes = count(1)
        self._written = 0
        self._longest_wait = 0.0
        self._mirrors: dict[Origin, Mirror] = {}
        self.tables = {origin: StoreTables(origin, parts.mirrored) for origin in Origin}
        limit = f"{int(parts.limits.deadline * 1000)}ms"
        self._sessions = {
            origin: Sessions(endpoint, parts.application, {"statement_timeout": limit, "lock_timeout": limit})
            for origin, endpoint in parts.endpoints.items()
        }
        self._lenders: dict[Origin, Callable[[], AbstractContextManager[psycopg.Connection[Any]]]] = {
            origin: endpoint.pool.connection if endpoint.pool is not None else self._sessions[origin].connection
            for origin, endpoint in parts.endpoints.items()
        }
        self.comparisons = Comparisons(
            parts.endpoints, parts.application, limit=parts.limits.compare_queue, deadline=parts.limits.compare_deadline,
            limit_bytes=parts.limits.compare_bytes, under_way=self.under_way,
            sampling=Sampling(parts.limits.compare_share, parts.stage.check_ratio),
            positions=parts.authority.positions(parts.endpoints, parts.application) if parts.authority is not None else None,
        )  # fmt: skip
        self.operations = parts.stage.operations()
        self.follower: Follower | None = None
        if parts.authority is not None:
            # a name for each start of each process: what one counted before its end stays on record beside its successor's
            process = f"{parts.process or socket.gethostname()}:{self.pid}.{secrets.token_hex(2)}"
            self.follower = parts.authority.follow(process, self._beat)
        self.reads = Reads(self.follower, parts.endpoints[Origin.OLD].log, parts.limits.read_wait)

    def desired(self, tenant: str = EVERYTHING) -> Stage:
        """Return the flag's stage; a process that never had an answer goes on from the migration's last heartbeat."""
        desired = self.parts.stage.stage(tenant)
        if desired is None:
            last = self.follower.last_stage if self.follower is not None else None
            desired = last or self.parts.stage.default
        return desired

    def decide(self, desired: Stage, tenant: str = EVERYTHING) -> Pin:
        """Return what a tenant's desired and observed stages give; raises ServerUnavailable where only the ledger could tell."""
        writes, recorded = TABLE[desired].writes, self.follower.recorded if self.follower is not None else desired
        if self.follower is None:
            observation = Observation(int(writes is Origin.NEW), writes)
        elif (observations := self.follower.observations) is not None:
            observation = observations.of(tenant)
        elif writes is Origin.OLD:
            observation = BEGINNING  # unread as yet: the old store refuses by itself what it may not take
        else:
            raise ServerUnavailable("the ledger", "so it isn't known whether the new store has authority yet")
        key = (desired, observation, recorded)
        if (pin := self.pins.get(key)) is None:
            stage = effective(desired, observation.store, recorded)
            pin = self.pins[key] = Pin(desired, observation, stage, TABLE[stage])
        return pin

    def comparable(self, pin: Pin, tenant: str) -> int | None:
        """Return the newest move of authority that this process knows; None where a request's pin is of an earlier one."""
        observations = self.follower.observations if self.follower is not None else None
        if observations is None:
            return 0
        return observations.epoch if observations.of(tenant) == pin.observation else None

    def apart(self, pin: Pin) -> bool:
        """Return whether a pin is of a tenant at another store than all the others."""
        observations = self.follower.observations if self.follower is not None else None
        return observations is not None and pin.observation.store is not observations.rest.store

    def reading(self, pin: Pin, context: Context | None) -> Origin:
        """Return which store a read goes to, of a context that may read from the new store before writes go there."""
        if context is None or pin.rule.reads is Origin.NEW or not self.reads.open:
            return pin.rule.reads
        asked = self.parts.stage.of(context)
        if asked is None or TABLE[asked].reads is Origin.OLD:
            return Origin.OLD
        return Origin.NEW if self.reads.moved(context, self._lenders[Origin.OLD]) else Origin.OLD

    def wrote_for(self, context: Context | None, origin: Origin, connection: psycopg.Connection[Any] | None = None) -> None:
        """Note where the log is after a COMMIT, where reads may move before writes; by a session of ours where none is given."""
        if origin is Origin.OLD:
            self.reads.wrote(context, (lambda: nullcontext(connection)) if connection is not None else self._lenders[origin])

    def may_have_written(self, context: Context | None, origin: Origin) -> None:
        """Note a unit that failed, in sessions that are not ours: its COMMIT may be done."""
        if origin is Origin.OLD:
            self.reads.wrote(context, None)

    def session(self, origin: Origin) -> AbstractContextManager[psycopg.Connection[Any]]:
        """Lend a session with a store."""
        return self._lenders[origin]()

    def mirror(self, origin: Origin) -> Mirror:
        """Return the mirror to a store, made on first use."""
        mirror = self._mirrors.get(origin)
        if mirror is None:
            with self._lock:
                mirror = self._mirrors.get(origin)
                if mirror is None:
                    parts, limits = self.parts, self.parts.limits
                    bounds = Bounds(
                        limits.mirror_workers, limits.mirror_queue, limits.mirror_bytes, limits.mirror_wait, limits.mirror_deadline
                    )
                    way = Way(parts.endpoints[origin], origin, parts.mirrored, parts.application)
                    mirror = self._mirrors[origin] = Mirror(way, bounds)
        return mirror

    def under_way(self, origin: Origin) -> Callable[[], bool]:
        """Return what tells whether a store still lacks what this process has to bring it by now."""
        mirror = self._mirrors.get(origin)
        return nothing if mirror is None else mirror.under_way()

    def done(self, operation: Operation, tenant: str, origin: Origin, started: float, error: BaseException | None = None) -> None:
        """Put an operation of one store down for the SDK; what a fence or another transaction refused is run again, and none."""
        if self.operations is None or (error is not None and sqlstate(error) in PASSING):
            return
        self.operations.record(Done(operation, tenant, [Asked(origin, time.monotonic() - started, failed=error is not None)]))

    def mirrored(self, tenant: str, origin: Origin, started: float) -> Ended:
        """Return what puts a write of both stores down for the SDK, once the mirror has dealt with it."""
        if (operations := self.operations) is None:
            return unheard
        first = Asked(origin, time.monotonic() - started)

        def ended(seconds: float | None, failed: bool = False) -> None:
            asked = [first] if seconds is None else [first, Asked(other(origin), seconds, failed)]
            operations.record(Done(Operation.WRITE, tenant, asked))

        return ended

    def compared(self, tenant: str, authority: Origin, seconds: float, result: Result | None) -> None:
        """Put the end of a comparison down for the SDK; None where the other store was never asked.

        The authority is told as its caller found it: it answered, and the caller waited so many seconds.
        """
        if self.operations is None:
            return
        asked, consistent = [Asked(authority, seconds)], None
        if result is not None:
            asked.append(Asked(other(authority), result.candidate.seconds, failed=result.candidate.error is not None))
            known = not (result.failed or result.inconclusive)
            consistent = result.matched or result.ignored if known else None
        self.operations.record(Done(Operation.READ, tenant, asked, consistent))

    def wrote(self) -> None:
        """Count a write. It takes no lock, for which many threads would queue; for a moment it may be behind by as many."""
        self._written = next(self._writes)

    def count(self, name: str) -> None:
        """Count one occurrence."""
        with self._lock:
            self._counts[name] += 1

    def waited(self, seconds: float) -> None:
        """Record how long a fence held up a writer."""
        with self._lock:
            self._counts["fence_waits"] += 1
            self._longest_wait = max(self._longest_wait, seconds)

    def counters(self) -> Mapping[str, Any]:
        """Return all counts, ready for JSON."""
        with self._lock:
            counts: dict[str, Any] = {**self._counts, "longest_wait_seconds": round(self._longest_wait, 4)}
            mirrors = dict(self._mirrors)
        alarm = self.parts.stage.alarm
        counts.update(
            writes=self._written,
            mirrors=bool(self.parts.mirrored),
            alarms=alarm.count,
            last_alarm=alarm.last,
            comparisons=self.comparisons.counters(),
            reads=self.reads.counters(),
        )
        counts.update({f"mirror_{origin.value}": mirror.counters() for origin, mirror in mirrors.items()})
        return counts

    def drain(self, seconds: float) -> bool:
        """Wait for the mirrors and comparisons."""
        until = time.monotonic() + seconds
        queues: list[Mirror | Comparisons] = [*self._mirrors.values(), self.comparisons]
        return all([queue.drain(max(0.0, until - time.monotonic())) for queue in queues])

    def close(self) -> None:
        """End all threads, the ledger's last, so that the last heartbeat has the final counts."""
        for mirror in self._mirrors.values():
            mirror.close(self.parts.limits.close_wait)
        self.comparisons.close()
        if self.operations is not None:
            self.operations.close()
        if self.follower is not None:
            self.follower.close()
        for sessions in self._sessions.values():
            sessions.close()

    def _beat(self) -> Beat | None:
        """Return what the heartbeat says (the follower's thread); None while this process has no stage yet.

        The stage is everybody's, by which the flag goes up and down; the epoch is that of the newest move, of whatever tenant.
        """
        if self.follower is None or (observations := self.follower.observations) is None:
            return None
        pin = self.decide(self.desired())
        self.comparisons.tally.begin(pin.stage)
        return Beat(pin.stage, observations.epoch, self.counters())
