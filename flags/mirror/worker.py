"""A worker of the mirror: a thread with a session of its own, which brings units to the other store in batches.

A batch is one transaction, pipelined. Where it fails its units are tried one by one, each in a transaction, so that a bad one loses
only itself; and of a unit that the store refuses for a row, its parts. A row that a foreign key or another unique index refuses may
have come before an older one of another worker: it waits until nothing older is under way, a few times. Every statement has a
deadline, and broken sessions are made anew. The session fires no trigger where its role may say so, as replay's does not.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg
from ldclient.migrations.types import Origin
from psycopg.pq import TransactionStatus

from changeover.errors import ServerUnavailable
from changeover.flags.mirror.books import Books
from changeover.flags.mirror.change import Change, MirroredTable
from changeover.flags.mirror.gatecall import GateCall
from changeover.flags.mirror.offer import BATCH_ROWS, Offer
from changeover.flags.retry import RETRIED, TRIES, before_retry
from changeover.session import Connection
from changeover.settings import Kind
from changeover.stores.postgres import replica

RECONNECT_SECONDS = 0.1
LOOK_AGAIN_SECONDS = 0.02
"""How often a worker that has nothing else to do looks whether what it postponed is due."""

OUT_OF_ORDER = frozenset({"23503", "23505"})
"""A foreign key, and another unique index: what they ask for may be under way with another worker."""

OF_A_ROW = (psycopg.DataError, psycopg.IntegrityError, psycopg.ProgrammingError, psycopg.errors.RaiseException)
"""Errors that a row's values may cause; whatever else is the store's, and would meet every part of a unit."""

MOST_REFUSALS = 200
"""How often parts of a unit may be refused before the rest is lost as well: where all rows are bad it would never end."""

Call = tuple[bytes, list[Any]]


@dataclass(frozen=True)
class Ready:
    """A unit as the gate's calls, in its order; and the rows that are none: not carried over, or not whole."""

    offer: Offer
    calls: list[Call]
    skipped: int
    partial: list[Exception]


class Store(Protocol):
    """What a worker needs of a store."""

    @property
    def name(self) -> str:
        """Return server and database, without a secret."""
        ...

    def open(self, application: str, settings: Mapping[str, str] | None = None, kind: Kind = Kind.CALLERS) -> Connection:
        """Open a session; raises ServerUnavailable."""
        ...


@dataclass(frozen=True)
class Way:
    """Where a mirror leads: the store, its tables, and as whom."""

    endpoint: Store
    origin: Origin
    tables: Sequence[MirroredTable]
    application: str


class Worker:
    """One thread of a mirror, started by its first unit."""

    def __init__(self, books: Books, way: Way, name: str) -> None:
        self.books = books
        self.way = way
        self.wake = threading.Condition(books.lock)
        self._queue: deque[Offer] = deque()
        self._postponed: list[Offer] = []
        self._alone = 0
        """How many units are tried one by one, because a batch with them failed."""
        self._refusals = 0
        self._connection: Connection | None = None
        self._calls: dict[int, GateCall] = {}
        self._thread = threading.Thread(target=self._run, name=f"changeover-mirror-{name}", daemon=True)
        self._started = False

    def take(self, offer: Offer) -> None:
        """Queue a unit (under the lock)."""
        self._queue.append(offer)
        if not self._started:
            self._started = True
            self._thread.start()
        self.wake.notify()

    def give_up(self) -> list[Offer]:
        """Return what is still queued, and keep none of it (under the lock)."""
        left = [*self._postponed, *self._queue]
        self._postponed.clear()
        self._queue.clear()
        return left

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self._started:
            self._thread.join(seconds)

    # -- the worker's thread

    def _run(self) -> None:
        while batch := self._next():
            self._deal_with(batch)
        self._disconnect()

    def _next(self) -> list[Offer]:
        """Return the next batch, after waiting for it; none when all is done and the mirror closes."""
        with self.books.lock:
            while True:
                now = time.monotonic()
                due = next((o for o in self._postponed if o.not_before <= now and self.books.oldest(o.number)), None)
                if due is not None:
                    self._postponed.remove(due)
                    return [due]
                if self._queue:
                    return self._batch()
                if self.books.closing and not self._postponed:
                    return []
                self.wake.wait(LOOK_AGAIN_SECONDS if self._postponed else None)

    def _batch(self) -> list[Offer]:
        """Take what is queued, up to a batch's bound; one unit after a failure, and while there is no session."""
        batch = [self._queue.popleft()]
        rows = len(batch[0].changes)
        if self._alone or self._connection is None:
            self._alone = max(0, self._alone - 1)
            return batch
        while self._queue and rows + len(self._queue[0].changes) <= BATCH_ROWS:
            batch.append(self._queue.popleft())
            rows += len(batch[-1].changes)
        return batch

    def _deal_with(self, batch: list[Offer]) -> None:
        started = time.monotonic()
        units = [unit for offer in batch if (unit := self._ready(offer)) is not None]
        try:
            self._bring([call for unit in units for call in unit.calls])
        # whatever fails must not end this thread, nor take along what it does not concern
        except Exception as error:
            if len(units) > 1:
                with self.books.lock:
                    self._alone = len(units)
                    self._queue.extendleft(unit.offer for unit in reversed(units))
            elif not self._postpones(units[0].offer, error):
                self._refusals = 0
                self._lose_what_is_bad(units[0], units[0].calls, error)
                self._end(units, time.monotonic() - started, kept_up=isinstance(error, OF_A_ROW))
        else:
            self._end(units, time.monotonic() - started, kept_up=True)

    def _end(self, units: Sequence[Ready], seconds: float, *, kept_up: bool) -> None:
        for unit in units:
            self.books.count({"skipped": unit.skipped})
            for error in unit.partial:
                self.books.fail(unit.offer, error, 1)
        self.books.done([unit.offer for unit in units], seconds, kept_up=kept_up)

    def _ready(self, offer: Offer) -> Ready | None:
        """Return a unit's calls of the gate; None, and all its rows lost, where it can't be read.

        The mapping is the application's code, and may raise whatever it likes. Which key the row
        has is then not known, and an earlier image of that key must not arrive in its place. So
        the whole unit is lost.
        """
        started, skipped = time.monotonic(), 0
        last: dict[tuple[Any, ...], tuple[GateCall, Change]] = {}
        try:
            for told in offer.changes:
                row = self.way.tables[told.place].mapping(self.way.origin)(told.change.row)
                if row is None:
                    skipped += 1
                    continue
                call = self._call(told.place)
                key = (told.place, *call.key_of(row))
                last.pop(key, None)  # all have one version, and the gate takes the first: the last image, in its own place
                last[key] = (call, Change(row, told.change.deleted))
        except Exception as error:
            self.books.fail(offer, error, len(offer.changes))
            away = isinstance(error, (ServerUnavailable, psycopg.OperationalError))
            self.books.done([offer], time.monotonic() - started, kept_up=False if away else None)
            return None
        ready = Ready(offer, [], skipped, [])
        for call, change in last.values():
            try:
                ready.calls.append((call.statement, call.parameters(offer.version, change)))
            except ValueError as error:
                ready.partial.append(error)
        return ready

    def _bring(self, calls: Sequence[Call]) -> None:
        """Offer rows in one transaction, and count what the gate said; again after a lost session, a deadlock and their like."""
        tries = 0
        while calls:
            connection = self._connected()
            try:
                applied = _applied(connection, calls)
            except psycopg.Error as error:
                tries += 1
                lost = connection.closed
                if lost or connection.info.transaction_status != TransactionStatus.IDLE:
                    self._disconnect()
                if not (lost or error.sqlstate in RETRIED) or tries >= TRIES:
                    raise
                time.sleep(before_retry(tries))
            else:
                self.books.count({"applied": applied, "refused_by_gate": len(calls) - applied})
                return

    def _postpones(self, offer: Offer, error: Exception) -> bool:
        """Put a unit off that may have come too early, until nothing older is under way; tell whether that was done."""
        if not isinstance(error, psycopg.Error) or error.sqlstate not in OUT_OF_ORDER:
            return False
        with self.books.lock:
            offer.tries += 1
            if offer.tries > TRIES or self.books.closing:
                return False
            offer.not_before = time.monotonic() + before_retry(offer.tries)
            self._postponed.append(offer)
        return True

    def _lose_what_is_bad(self, unit: Ready, calls: list[Call], error: Exception) -> None:
        """Lose rows that were refused; where it was for the values of some of them, bring the others."""
        self._refusals += 1
        if len(calls) < 2 or not isinstance(error, OF_A_ROW) or self._refusals > MOST_REFUSALS:
            self.books.fail(unit.offer, error, len(calls))
            return
        middle = len(calls) // 2
        for half in (calls[:middle], calls[middle:]):
            try:
                self._bring(half)
            except Exception as refused:
                self._lose_what_is_bad(unit, half, refused)

    def _call(self, place: int) -> GateCall:
        """Return the gate's call for a table; of a session that turns out to be lost it is read anew."""
        while True:
            connection = self._connected()
            if (call := self._calls.get(place)) is not None:
                return call
            try:
                self._calls[place] = GateCall.of(connection, self.way.tables[place].name(self.way.origin))
            except psycopg.OperationalError:
                if not connection.closed:
                    raise
                self._disconnect()

    def _connected(self) -> Connection:
        """Return the session, asked for until the deadline where there is none; raises ServerUnavailable."""
        until = time.monotonic() + self.books.bounds.deadline
        while self._connection is None:
            try:
                settings = {"statement_timeout": f"{int(self.books.bounds.deadline * 1000)}ms"}
                connection = self.way.endpoint.open(self.way.application, settings, Kind.BESIDE)
                try:
                    replica.take(connection)
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
            except (ServerUnavailable, psycopg.OperationalError):
                if time.monotonic() >= until or self.books.closing:
                    raise
                time.sleep(RECONNECT_SECONDS)
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._calls.clear()


def _applied(connection: Connection, calls: Sequence[Call]) -> int:
    """Offer rows in one transaction, and return how many of them the gate took; one row is a transaction by itself."""
    if len(calls) == 1:
        cursors = [connection.execute(*calls[0])]
    else:
        with connection.pipeline(), connection.transaction():
            cursors = [connection.execute(*call) for call in calls]
    return sum(bool(row and row[0]) for row in (cursor.fetchone() for cursor in cursors))
