"""The mirror: writes that the authority has committed, offered to the other store off the caller's thread.

Each row goes through the store's version gate in a transaction of its own, so that late, repeated and overtaken offers
are harmless. The queue is bounded and one worker empties it in order, which keeps the order per key; every statement
has a deadline. What is dropped or fails is counted and never counts as equal: the change stream brings it. Broken
sessions are made anew. Lives in one process of the application.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg

from changeover.errors import ServerUnavailable
from changeover.flags.alarm import Alarm, reason_of
from changeover.flags.router.endpoint import Change, GateCall, PgEndpoint, RowMapping, last_of_each_key
from changeover.position import Version
from changeover.session import Connection
from changeover.settings import Kind

RETRIED = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: nothing was done, and the same again may work."""

TRIES = 3
RETRY_SECONDS = 0.05
RECONNECT_SECONDS = 0.1


class Ended(Protocol):
    """What hears how an offer ended."""

    def __call__(self, seconds: float | None, failed: bool = False) -> None:
        """Take how long the other store took, None where it was never asked, and whether a row of it failed."""
        ...


def unheard(seconds: float | None, failed: bool = False) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Offer:
    """The rows of one committed transaction, at their version."""

    version: Version
    changes: tuple[Change, ...]
    ended: Ended = unheard


def before_retry(tries: int) -> float:
    """Return the seconds to wait: at once, the loser of a deadlock may overtake its winner and meet it again."""
    return RETRY_SECONDS * tries * random.uniform(0.5, 1.0)


class Mirror:
    """Mirrors writes to one endpoint; `offer` runs on the caller's thread and never waits."""

    def __init__(self, endpoint: PgEndpoint, mapping: RowMapping, application: str, *, limit: int, deadline: float) -> None:
        self.endpoint = endpoint
        self.mapping = mapping
        self.application = application
        self.limit = limit
        self.deadline = deadline
        self.drops = Alarm(f"mirrored writes to {endpoint.name} are dropped, the queue is full")
        self.failures = Alarm(f"mirrored writes to {endpoint.name} fail")
        self._counts: Counter[str] = Counter()
        self._lost: Counter[int] = Counter()
        self._queue: deque[Offer] = deque()
        self._changed = threading.Condition()
        self._current: Offer | None = None
        self._closing = False
        self._connection: Connection | None = None
        self._call: GateCall | None = None
        self._thread = threading.Thread(target=self._run, name=f"changeover-mirror-{endpoint.table}", daemon=True)
        self._thread.start()

    def offer(self, version: Version, changes: Sequence[Change], ended: Ended = unheard) -> bool:
        """Queue the rows of one transaction; False, and counted, when the queue is full. `ended` hears of its end, once."""
        # The caller may change its rows afterwards, so they are copied here.
        offer = Offer(version, tuple(Change(dict(change.row), change.deleted) for change in changes), ended)
        with self._changed:
            taken = len(self._queue) < self.limit and not self._closing
            if taken:
                self._queue.append(offer)
                self._counts["mirrored"] += 1
                self._changed.notify_all()
        if not taken:
            self._drop(offer, "queue full" if not self._closing else "closing")
        return taken

    def counters(self) -> dict[str, Any]:
        """Return the counts: transactions mirrored and dropped; rows applied, refused, skipped and failed.

        `lost` has the rows that were dropped or failed, by the epoch in which they were written, `queued` those under way.
        """
        with self._changed:
            lost = {str(epoch): rows for epoch, rows in self._lost.items()}
            counts = {name: self._counts[name] for name in ("mirrored", "applied", "refused_by_gate", "skipped")}
            under_way = [*self._queue, *([self._current] if self._current else [])]
        queued: Counter[str] = Counter()
        for offer in under_way:
            queued[str(offer.version.epoch)] += len(offer.changes)
        return {
            **counts, "lost": lost, "queued": dict(queued), "failed": self.failures.count, "dropped": self.drops.count,
            "depth": len(under_way), "last_failure": self.failures.last, "last_drop": self.drops.last,
        }  # fmt: skip

    def under_way(self) -> Callable[[], bool]:
        """Return what tells, whenever it is asked, whether anything of what is offered by now is still to be dealt with."""
        with self._changed:
            offered = self._counts["mirrored"]

        def still() -> bool:
            with self._changed:
                return self._counts["mirrored"] - len(self._queue) - (self._current is not None) < offered

        return still

    def drain(self, seconds: float) -> bool:
        """Wait until everything that was offered has been dealt with; False when the time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._current is None, seconds)

    def close(self, seconds: float) -> None:
        """Deal with what is queued, for so long at most; the rest is counted as dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.drain(seconds)
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for offer in left:
            self._drop(offer, "closing")
        self._thread.join(self.deadline + 1)

    # -- the worker's thread

    def _run(self) -> None:
        while (offer := self._next()) is not None:
            started = time.monotonic()
            whole = self._deal_with(offer)
            offer.ended(time.monotonic() - started, failed=not whole)
            with self._changed:
                self._current = None
                self._changed.notify_all()
        self._disconnect()

    def _next(self) -> Offer | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            self._current = self._queue.popleft()
            return self._current

    def _deal_with(self, offer: Offer) -> bool:
        """Bring a transaction's rows to the store; return whether none of them failed."""
        until = time.monotonic() + self.deadline
        try:
            changes = self._mapped(offer.changes)
            call = self._connected(until)[1]
            last = last_of_each_key(changes, call)
        # The mapping is the application's code: whatever it raises is counted as its failure and doesn't end this
        # thread.
        except Exception as error:
            self._fail(error, offer.version.epoch, len(offer.changes))
            return False
        whole = True
        for change in last:
            try:
                self._count("applied" if self._apply(offer.version, change, until) else "refused_by_gate")
            # One row's failure must not keep the next one from its store.
            except Exception as error:
                self._fail(error, offer.version.epoch, 1)
                whole = False
        return whole

    def _mapped(self, changes: Sequence[Change]) -> list[Change]:
        mapped = []
        for change in changes:
            row = self.mapping(change.row)
            if row is None:
                self._count("skipped")
            else:
                mapped.append(Change(row, change.deleted))
        return mapped

    def _apply(self, version: Version, change: Change, until: float) -> bool:
        """Offer one row until it is answered; a lost session, a deadlock or a serialization failure is tried again."""
        tries = 0
        while True:
            connection, call = self._connected(until)
            parameters = call.parameters(version, change)
            try:
                row = connection.execute(call.statement, parameters).fetchone()
                return bool(row and row[0])
            except psycopg.Error as error:
                tries += 1
                if connection.closed:
                    self._disconnect()
                elif error.sqlstate not in RETRIED:
                    raise
                if tries >= TRIES or time.monotonic() >= until:
                    raise
                time.sleep(before_retry(tries))

    def _connected(self, until: float) -> tuple[Connection, GateCall]:
        while self._connection is None or self._call is None:
            try:
                self._connection = self.endpoint.open(self.application, self._settings(), Kind.BESIDE)
                self._call = GateCall.of(self._connection, self.endpoint)
            except (ServerUnavailable, psycopg.OperationalError):
                self._disconnect()
                if time.monotonic() >= until or self._closing:
                    raise
                time.sleep(RECONNECT_SECONDS)
            except BaseException:
                self._disconnect()
                raise
        return self._connection, self._call

    def _settings(self) -> dict[str, str]:
        return {"statement_timeout": f"{int(self.deadline * 1000)}ms"}

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = self._call = None

    def _drop(self, offer: Offer, reason: str) -> None:
        self._lose(offer.version.epoch, len(offer.changes))
        self.drops.raise_for(reason)
        offer.ended(None)

    def _fail(self, error: Exception, epoch: int, rows: int) -> None:
        self._lose(epoch, rows)
        for _ in range(rows):
            self.failures.raise_for(reason_of(error))

    def _lose(self, epoch: int, rows: int) -> None:
        with self._changed:
            self._lost[epoch] += rows

    def _count(self, name: str) -> None:
        with self._changed:
            self._counts[name] += 1
