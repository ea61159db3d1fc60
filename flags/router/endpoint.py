"""An endpoint: one of the two stores as the application's process reaches it, its sessions, and its version gate.

A write runs in one transaction that the router owns. Where its rows are mirrored it is READ
COMMITTED, and a later statement of it reads its position on the version axis. The COMMIT after it
is durable when it is acknowledged. Sessions are the application's own pool, or a small one kept here; a session that the
server has closed meanwhile is never handed out.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.json import Json, Jsonb

from changeover.errors import StepOrder
from changeover.jobs.source.triggerlog import Log
from changeover.names import qualified
from changeover.position import ZERO_LSN, Version, format_lsn, parse_lsn
from changeover.session import Connection, connect, escaped, one_row, server_name
from changeover.settings import Kind
from changeover.stores.postgres.gate import GatedTable

Row = Mapping[str, Any]
Cursor = psycopg.Cursor[Any]
RowMapping = Callable[[Row], Row | None]
"""Makes the other store's whole row of a whole row; None says that the row isn't carried over."""

READ_COMMITTED = psycopg.IsolationLevel.READ_COMMITTED
IDLE_SESSIONS = 16
"""Idle sessions kept for each store; more than these are closed when they come back."""

EXACT_FLOATS = "SET LOCAL extra_float_digits = 1"
"""For a row that is mirrored, in a session of the application's own: with fewer digits its floats would not be the store's."""

POSITION = (
    "SELECT pg_catalog.pg_current_wal_insert_lsn()::text, CASE WHEN pg_catalog.current_setting('synchronous_commit')"
    " OPERATOR(pg_catalog.=) 'off' THEN pg_catalog.set_config('synchronous_commit', 'on', true) END"
)
"""The write's position; where a crash could take it back (`synchronous_commit = off`) this COMMIT is made durable."""

SWALLOWED = "a statement of this unit failed and its error was caught, so nothing can be committed: let it pass, or use a savepoint"

JSON_TYPES: Mapping[str, type[Json | Jsonb]] = {"json": Json, "jsonb": Jsonb}


@dataclass(frozen=True)
class Change:
    """A row as the store returned it (`RETURNING *`), every column of it; of a deleted row the last image."""

    row: Row
    deleted: bool = False


def returned(cursor: Cursor, *, deleted: bool = False) -> list[Change]:
    """Return the rows of a statement with `RETURNING *` as changes.

    Args:
        cursor: The cursor that ran the statement (application).
        deleted: Whether the statement deleted the rows.

    Returns:
        One change a row, in the statement's order.
    """
    names = [column.name for column in cursor.description or ()]
    return [Change(row if isinstance(row, dict) else dict(zip(names, row, strict=True)), deleted) for row in cursor.fetchall()]


Tenant = str | int | UUID
"""The value of a row in the column that `flag.context` names."""


def as_text(value: Any) -> str | None:
    """Return a tenant as PostgreSQL prints it, None for a value that is of no type of a tenant (pure).

    Args:
        value: The tenant as the application has it.

    Returns:
        The text, None for a value that is no tenant.
    """
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, UUID)) and not isinstance(value, bool) else None


class Pool(Protocol):
    """What the router needs of a pool such as psycopg_pool's `ConnectionPool`."""

    def connection(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """Lend a session."""
        ...


@dataclass(frozen=True)
class PgEndpoint:
    """A store: a DSN, with which the router keeps sessions of its own, and the table whose rows are mirrored, if there is one.

    With `pool` the callers' statements run on the application's pool; mirrored writes and comparisons keep to sessions
    by the DSN, so that they never take a session from a caller. `key` is the gate's key, by default the one with which
    it was installed. `tenant` is the key column that holds a row's tenant, where authority moves by tenants.
    """

    dsn: str = field(repr=False)
    table: str = ""
    key: tuple[str, ...] = ()
    pool: Pool | None = None
    log: Log | None = None
    tenant: str | None = None

    @property
    def name(self) -> str:
        """Return server, database and table, without a secret."""
        return f"{server_name(self.dsn)} {self.table}".strip()

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
            if _failed(connection):
                raise psycopg.errors.InFailedSqlTransaction(SWALLOWED)
        if asked is not None:
            raise asked
    finally:
        if pinned and connection.info.transaction_status == TransactionStatus.IDLE:
            connection.isolation_level = before


def _failed(connection: psycopg.Connection[Any]) -> bool:
    return connection.info.transaction_status == TransactionStatus.INERROR


def position(cursor: Cursor, log: Log | None = None) -> int:
    """Return the LSN of what the transaction has written so far, and make its COMMIT durable.

    Where a trigger log captures the write, the position is that of the log's newest tick, above
    which the write's own event comes to stand. Without a tick, as after `abort`, it is below
    everything.
    """
    with cursor.connection.cursor(row_factory=psycopg.rows.tuple_row) as plain:
        (position, *_) = one_row(plain.execute(POSITION))
        if log is not None:
            (position,) = one_row(plain.execute("SELECT pg_catalog.to_regclass(%s)", [log.ticks.as_string(plain)]))
            if position is not None:
                (position,) = one_row(plain.execute(sql.SQL('SELECT pg_catalog.max("end")::text FROM {}').format(log.ticks)))
    return parse_lsn(position) if position is not None else ZERO_LSN


@dataclass(frozen=True)
class GateCall:
    """The gate of one table as a statement, composed once per session from the catalogue."""

    table: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    generated: frozenset[str]
    key: tuple[str, ...]
    statement: sql.Composed

    @classmethod
    def of(cls, connection: Connection, endpoint: PgEndpoint) -> GateCall:
        """Read the table's columns and the gate's key; raises StepOrder where there is no gate."""
        schema, name = qualified(endpoint.table)
        gated = GatedTable(schema, name, (), ())
        columns = connection.execute(COLUMNS, [gated.table.as_string(connection)]).fetchall()
        key = endpoint.key or tuple(row[0] for row in connection.execute(KEY, [gated.row_versions.as_string(connection)]))
        if not columns or not key:
            raise StepOrder(f"a mirrored write to {endpoint.name}", "prepare")
        row = sql.SQL(", ").join(sql.Placeholder() for _ in columns)
        statement = sql.SQL("SELECT {}(%s, %s, %s, %s, ROW({})::{})").format(escaped(gated.function), row, escaped(gated.table))
        names, types, generated = zip(*columns, strict=True)
        computed = frozenset(name for name, is_computed in zip(names, generated, strict=True) if is_computed)
        return cls(endpoint.table, names, types, computed, key, statement)

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """Return a row's key."""
        return tuple(row[name] for name in self.key)

    def parameters(self, version: Version, change: Change) -> list[Any]:
        """Return the statement's parameters; raises ValueError for a row that isn't whole: no part of it is offered."""
        needed = set(self.key) if change.deleted else set(self.columns) - self.generated
        missing = sorted(needed - set(change.row))
        unknown = sorted(set(change.row) - set(self.columns))
        if missing or (unknown and not change.deleted):
            raise ValueError(f"a row mirrored to {self.table} lacks {missing} and has {unknown} beside the table's columns")
        image = [
            self._value(name, type_name, change.row[name]) if name in needed else None
            for name, type_name in zip(self.columns, self.types, strict=True)
        ]
        return [version.epoch, format_lsn(version.lsn), version.ordinal, change.deleted, *image]

    @staticmethod
    def _value(name: str, type_name: str, value: Any) -> Any:
        wrapper = JSON_TYPES.get(type_name)
        return wrapper(value) if wrapper is not None and value is not None else value


COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attgenerated <> '' FROM pg_attribute
WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""

KEY = """
SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
WHERE i.indrelid = to_regclass(%s) AND i.indisprimary ORDER BY array_position(i.indkey::int2[], a.attnum)
"""


def last_of_each_key(changes: Sequence[Change], call: GateCall) -> list[Change]:
    """Return the last change of each key in a transaction: all have one version, and the gate takes the first."""
    return list({call.key_of(change.row): change for change in changes}.values())
