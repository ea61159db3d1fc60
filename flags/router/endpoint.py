"""An endpoint: one of the two stores as the application's process reaches it, and its sessions.

A write runs in one transaction that the router owns, at READ COMMITTED where its rows are mirrored. Sessions are the application's
own pool, or a small one kept here; a session that the server has closed meanwhile is never handed out.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import psycopg
from psycopg.pq import TransactionStatus

from changeover.jobs.source.triggerlog import Log
from changeover.session import Connection, connect, server_name
from changeover.settings import Kind

Cursor = psycopg.Cursor[Any]

READ_COMMITTED = psycopg.IsolationLevel.READ_COMMITTED
IDLE_SESSIONS = 16
"""Idle sessions kept for each store; more than these are closed when they come back."""

SWALLOWED = "a statement of this unit failed and its error was caught, so nothing can be committed: let it pass, or use a savepoint"


class Pool(Protocol):
    """What the router needs of a pool such as psycopg_pool's `ConnectionPool`."""

    def connection(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """Lend a session."""
        ...


@dataclass(frozen=True)
class PgEndpoint:
    """A store: a DSN, with which the router keeps sessions of its own.

    With `pool` the callers' statements run on the application's pool; mirrored writes and comparisons keep to sessions
    by the DSN, so that they never take a session from a caller. `tenant` is the key column that holds a row's tenant, where
    authority moves by tenants.
    """

    dsn: str = field(repr=False)
    pool: Pool | None = None
    log: Log | None = None
    tenant: str | None = None

    @property
    def name(self) -> str:
        """Return server and database, without a secret."""
        return server_name(self.dsn)

    def open(self, application: str, settings: Mapping[str, str] | None = None, kind: Kind = Kind.CALLERS) -> Connection:
        """Open a session by the DSN.

        Args:
            application: The session's name in pg_stat_activity.
            settings: What the session sets besides what is pinned.
            kind: Whose statements it runs.

        Returns:
            The session, at READ COMMITTED; the caller closes it.

        Raises:
            ServerUnavailable: The store can't be reached.
        """
        connection = connect(self.dsn, application, settings=settings, kind=kind)
        connection.isolation_level = READ_COMMITTED
        return connection


class Sessions:
    """The sessions of one endpoint in one process, for its callers' threads; last used first."""

    def __init__(self, endpoint: PgEndpoint, application: str, settings: Mapping[str, str] | None = None) -> None:
        self.endpoint = endpoint
        self.application = application
        self.settings = settings
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend a session; it comes back only when it is idle and unbroken."""
        connection = self._take()
        try:
            yield connection
        finally:
            self._put(connection)

    def close(self) -> None:
        """Close the idle sessions; those lent out are closed when they come back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self.endpoint.open(self.application, self.settings)
            if not _readable(connection):
                return connection
            connection.close()

    def _put(self, connection: Connection) -> None:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            with self._lock:
                if not self._closed and len(self._idle) < IDLE_SESSIONS:
                    self._idle.append(connection)
                    return
        connection.close()


def _readable(connection: Connection) -> bool:
    """Return whether something waits on an idle session: most often the server's good-bye."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def transaction(connection: psycopg.Connection[Any], *, mirrored: bool = True) -> Iterator[Cursor]:
    """Run a block in one transaction; leaving it without an error means that COMMIT was acknowledged.

    One whose rows are mirrored is READ COMMITTED, for which the gate is proved. Else it is in the session's own level.
    """
    if connection.info.transaction_status != TransactionStatus.IDLE:
        raise RuntimeError(
            "a write through the router needs a session outside a transaction: the router owns it from BEGIN to COMMIT"
        )
    before = connection.isolation_level
    pinned = mirrored and before != READ_COMMITTED
    if pinned:
        connection.isolation_level = READ_COMMITTED
    asked: psycopg.Rollback | None = None
    try:
        with connection.transaction(), connection.cursor() as cursor:
            try:
                yield cursor
            except psycopg.Rollback as rollback:  # which psycopg would take as an end like any other
                asked = rollback
                raise
            if failed(connection):
                raise psycopg.errors.InFailedSqlTransaction(SWALLOWED)
        if asked is not None:
            raise asked
    finally:
        if pinned and connection.info.transaction_status == TransactionStatus.IDLE:
            connection.isolation_level = before


def failed(connection: psycopg.Connection[Any]) -> bool:
    """Return whether a statement of the transaction failed, so that it can't be committed."""
    return connection.info.transaction_status == TransactionStatus.INERROR
