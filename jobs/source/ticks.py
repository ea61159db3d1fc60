"""Ticks: in which order a trigger log is read, tick by tick, so that each commit comes once and every position has one meaning.

A tick is the log's rows of the transactions that one snapshot shows and the tick before it does
not. Each commit is in exactly one, however late it comes; `sequence > last` would lose those that
commit out of order. A tick's end is what PgQ calls a tick, whose way to read a log it is. Positions
are LSNs, so whoever asks the spool for one is answered as from a slot.

Tick n is recorded, under a lock and flushed, with its snapshot S(n) and its end E(n). The end is
one byte below P(n), the insert LSN read before S(n) was taken. The tick's events stand at the end
of the tick before, E(n-1), in the order of the log's sequence. Hence, for an event e of tick n:

- *Complete.* Let X be read after e was visible, and let the spool end at E(m) >= X. Then P(m) was
  read after X, so S(m) shows e, and n <= m: e is in the spool. S(n-1) hides e, so P(n-1) was read
  before X, and e stands at E(n-1) < X.
- *Ordered.* A row's later write waits for the earlier one's commit: it is in a later tick, or in the same with a higher sequence.
- *Exact.* The first tick's snapshot is the one that is loaded, and a verification's is the one that it compares. Ends grow,
  because the record of a tick is itself in the log of the server before the next P is read.
- *Below its own event.* A dual write bears the newest tick's end W that it can see. That tick's snapshot hides its own
  transaction, whose event therefore stands at W or above and wins: whatever order they come in, each key ends as its last event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import sql
from psycopg.rows import args_row

from changeover.errors import SourceChanged, SpoolGap
from changeover.jobs.decode import pgoutput
from changeover.jobs.ledger.records import Stream
from changeover.jobs.source.snapshot import contains
from changeover.jobs.source.triggerlog import TRIGGERS, Log, exists
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, connect, has_no_encoding, one_row, speaking_to, wal_position
from changeover.stores.base.reader import ExportedSnapshot
from changeover.stores.postgres.store import exporting

SESSION = {
    "enable_seqscan": "off",  # what was pruned may still be there for vacuum, and the catalogue knows nothing of it
}


@dataclass(frozen=True)
class TableState:
    """A source table as a tick's snapshot shows it, None for one that is gone; whether its triggers always fire.

    `numbers` are those of its columns by name.
    """

    relation: pgoutput.Relation | None
    enabled: bool
    numbers: Mapping[str, int]


@dataclass(frozen=True)
class Tick:
    """One tick: its end, the snapshot, how the tables look in it, when it was recorded."""

    end: int
    snapshot: str
    tables: tuple[TableState, ...]
    at: datetime


class Row(NamedTuple):
    """A row of the log: `tab` is the table's place in the spec, None for a marker; images are composite texts."""

    xid: int
    tab: int | None
    op: str
    image: bytes | None
    gone: bytes | None
    note: str | None


@dataclass(frozen=True)
class Aligned:
    """A tick whose snapshot is held: its end, the session that holds the snapshot, and the snapshot for others to import."""

    end: int
    holder: Connection
    snapshot: ExportedSnapshot


TABLE_STATES = """
SELECT pg_current_snapshot()::text, (SELECT jsonb_agg(jsonb_build_object('oid', asked.oid::bigint, 'schema', n.nspname,
    'name', c.relname, 'enabled', (SELECT count(*) = %(triggers)s FROM pg_trigger t WHERE t.tgrelid = c.oid
        AND t.tgname = ANY (%(names)s) AND t.tgenabled = 'A'),
    'columns', (SELECT jsonb_agg(jsonb_build_array(a.attname, a.atttypid::bigint, a.atttypmod, EXISTS (SELECT FROM pg_index i
            WHERE i.indrelid = c.oid AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END
            AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])), a.attnum) ORDER BY a.attnum)
        FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)) ORDER BY asked.place)
    FROM unnest(%(oids)s::oid[]) WITH ORDINALITY AS asked(oid, place)
    LEFT JOIN pg_class c ON c.oid = asked.oid LEFT JOIN pg_namespace n ON n.oid = c.relnamespace)::text
"""
"""One statement, so that the snapshot and the catalogue agree: a row in a new shape is never shown without that shape."""


@contextmanager
def _opened(connection: Connection, log: Log, sources: Sequence[tuple[str, str]] = ()) -> Iterator[tuple[int, list[int]]]:
    """Begin a tick, alone: yield its end and the tables' oids; what the block does comes after the position was read."""
    named = [sql.Identifier(*one).as_string(connection) for one in sources]
    with connection.transaction():
        connection.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(log.ticks))
        oids = (
            connection.execute(
                "SELECT name::regclass::oid::bigint FROM unnest(%s::text[]) WITH ORDINALITY AS one(name, place) ORDER BY place",
                [named],
            ).fetchall()
            or connection.execute(
                sql.SQL(
                    "SELECT (one -> 'oid')::bigint FROM (SELECT tables FROM {} ORDER BY \"end\" DESC LIMIT 1) last,"
                    " jsonb_array_elements(tables) WITH ORDINALITY AS each(one, place) ORDER BY place"
                ).format(log.ticks)
            ).fetchall()
        )
        yield wal_position(connection) - 1, [oid for (oid,) in oids]


def _look(connection: Connection, log: Log, oids: Sequence[int]) -> tuple[str, str]:
    """Return the snapshot of this statement, and what the catalogue says of the tables in it."""
    names = [log.trigger + suffix for suffix, _, _ in TRIGGERS]
    row = one_row(connection.execute(TABLE_STATES, {"oids": list(oids), "names": names, "triggers": len(names)}))
    return row[0], row[1]


def _record(connection: Connection, log: Log, end: int, snapshot: str, tables: str) -> None:
    connection.execute(
        sql.SQL('INSERT INTO {} ("end", snapshot, tables) VALUES (%s, %s, %s)').format(log.ticks),
        [format_lsn(end), snapshot, tables],
    )


def cut(connection: Connection, log: Log) -> int:
    """Record a tick of this moment.

    What is visible now stands below the end, and whatever commits later at the end or above it.

    The session is one by `log_session`, outside a transaction.

    Args:
        connection: A session with the store.
        log: The trigger log.

    Returns:
        The tick's end, an LSN.
    """
    with _opened(connection, log) as (end, oids):
        _record(connection, log, end, *_look(connection, log, oids))
    return end


@contextmanager
def aligned(dsn: str, application: str, log: Log, sources: Sequence[tuple[str, str]] = ()) -> Iterator[Aligned]:
    """Record a tick and hold its snapshot for others to import (driver).

    What is in the spool below the tick's end is then exactly what the snapshot shows beyond the
    first one.

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        log: The trigger log.
        sources: The tables of the very first tick, as (schema, table).

    Yields:
        The tick's end, and the snapshot with the session that holds it.
    """
    with log_session(dsn, application) as connection, ExitStack() as held:
        with speaking_to(dsn, "recording a tick of the trigger log"), _opened(connection, log, sources) as (end, oids):
            holder, exported = held.enter_context(exporting(dsn, application))
            _record(connection, log, end, *_look(holder, log, oids))
        yield Aligned(end, holder, exported)


@contextmanager
def log_session(dsn: str, application: str) -> Iterator[Connection]:
    """Open a session that reads the log and records ticks (driver, capture).

    Args:
        dsn: The store's DSN.
        application: The session's application name.

    Yields:
        The session.
    """
    with connect(dsn, application, settings=SESSION) as connection:
        yield connection


def ticks(connection: Connection, log: Log, since: int) -> list[Tick]:
    """Return the ticks that end at a position or later, in order of their positions.

    Args:
        connection: A session with the store.
        log: The trigger log.
        since: The LSN.

    Returns:
        The ticks; the first is the one that ends there, where it is still on record.
    """
    rows = connection.execute(
        sql.SQL(
            'SELECT w."end"::text, w.snapshot::text, w.tables, w.at FROM {} w WHERE w."end" >= %s::pg_lsn ORDER BY w."end"'
        ).format(log.ticks),
        [format_lsn(since)],
    ).fetchall()
    return [Tick(parse_lsn(row[0]), row[1], tuple(map(_table_state, row[2])), row[3]) for row in rows]


def _table_state(entry: dict[str, Any]) -> TableState:
    if entry["name"] is None:
        return TableState(None, False, {})
    columns = entry["columns"] or []
    relation = pgoutput.Relation(
        entry["oid"], entry["schema"], entry["name"], "d", tuple(pgoutput.Column(*column[:4]) for column in columns)
    )
    return TableState(relation, entry["enabled"], {column[0]: number for column in columns for number in column[4:]})


ROWS = """
SELECT xid::text::bigint, tab, op::text, convert_to(image, {encoding}), convert_to(gone, {encoding}), note FROM {rows}
WHERE (xid >= %(next)s::text::xid8 OR xid = ANY (%(running)s::text[]::xid8[])) AND pg_visible_in_snapshot(xid, %(now)s::pg_snapshot)
ORDER BY seq
"""
"""A tick's rows: what the snapshot before it did not show is what began later or was running then.

Images come as bytes, in UTF-8 where the server has an encoding: what is no text there is told of its table.
"""


def _bounds(before: str, now: str) -> dict[str, Any]:
    _, following, running = before.split(":")
    return {"next": following, "running": [xid for xid in running.split(",") if xid], "now": now}


@contextmanager
def reading(connection: Connection, log: Log, before: Tick, tick: Tick) -> Iterator[Iterable[Row]]:
    """Yield a tick's rows in the log's order, the same ones each time (capture).

    Args:
        connection: A session with the store.
        log: The trigger log.
        before: The tick before.
        tick: The tick.

    Yields:
        The rows, which are fetched as they are asked for.

    Raises:
        SourceChanged: The tick does not see all that the one before saw.
    """
    if not contains(tick.snapshot, before.snapshot):
        raise SourceChanged("snapshot of the trigger log's ticks", before.snapshot, tick.snapshot)
    with connection.transaction(), connection.cursor("changeover_tick", row_factory=args_row(Row)) as cursor:
        cursor.itersize = 2000
        encoding = sql.Literal("SQL_ASCII" if has_no_encoding(connection) else "UTF8")
        cursor.execute(sql.SQL(ROWS).format(rows=log.rows, encoding=encoding), _bounds(before.snapshot, tick.snapshot))
        yield cursor


def waiting(connection: Connection, log: Log, last: Tick) -> tuple[bool, int]:
    """Return whether the log holds what the last tick did not show (capture).

    Args:
        connection: A session with the store.
        log: The trigger log.
        last: The last tick.

    Returns:
        (whether it does, the source's insert LSN).
    """
    bounds = _bounds(last.snapshot, last.snapshot)
    row = one_row(
        connection.execute(
            sql.SQL(
                "SELECT EXISTS (SELECT FROM {rows} WHERE xid >= %(next)s::text::xid8) OR EXISTS (SELECT FROM {rows}"
                " WHERE xid = ANY (%(running)s::text[]::xid8[])), pg_current_wal_insert_lsn()::text"
            ).format(rows=log.rows),
            bounds,
        )
    )
    return row[0], parse_lsn(row[1])


def prune(connection: Connection, log: Log, tick: Tick, before: Tick | None = None) -> None:
    """Delete what a tick shows, and the ticks before it; the caller has it durably (capture).

    Args:
        connection: A session with the store.
        log: The trigger log.
        tick: The tick.
        before: The tick before, which spares a look at all rows.
    """
    statement = sql.SQL("DELETE FROM {rows} WHERE {own} pg_visible_in_snapshot(xid, %(now)s::pg_snapshot)").format(
        rows=log.rows,
        own=sql.SQL("(xid >= %(next)s::text::xid8 OR xid = ANY (%(running)s::text[]::xid8[])) AND" if before else ""),
    )
    with connection.transaction():
        connection.execute(statement, _bounds((before or tick).snapshot, tick.snapshot))
        connection.execute(sql.SQL('DELETE FROM {} WHERE "end" < %s::pg_lsn').format(log.ticks), [format_lsn(tick.end)])


# -- what must still be true


def identify(connection: Connection) -> tuple[str, int]:
    """Return which server it is, for a role that may not replicate.

    Args:
        connection: A session with the store.

    Returns:
        (system identifier, timeline).
    """
    row = one_row(
        connection.execute(
            "SELECT system_identifier::text, left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) FROM pg_control_system()"
        )
    )
    return row[0], int(row[1], 16)


def require(connection: Connection, stream: Stream, log: Log, durable: int) -> None:
    """Raise unless this is the prepared log on the prepared server, whole from a position on.

    Args:
        connection: A session with the store.
        stream: What prepare made.
        log: The trigger log.
        durable: The LSN up to which all is spooled.

    Raises:
        SourceChanged: It is another server, or the log is gone.
        SpoolGap: The log does not go back to what is durable.
    """
    system_id, timeline = identify(connection)
    for what, prepared, now in (("system identifier", stream.system_id, system_id), ("timeline", stream.timeline, timeline)):
        if str(prepared) != str(now):
            raise SourceChanged(what, str(prepared), str(now))
    if not exists(connection, log):
        raise SourceChanged("trigger log", str(log), "missing")
    kept = ticks(connection, log, 0)
    if not any(tick.end == durable for tick in kept):
        raise SpoolGap(format_lsn(kept[0].end) if kept else "everything", format_lsn(durable))


def require_log(dsn: str, application: str, stream: Stream, migration: str, durable: int) -> None:
    """Raise unless the log is still whole from a position on (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        stream: What prepare made.
        migration: The migration's name.
        durable: The LSN up to which all is spooled.

    Raises:
        SourceChanged: It is another server, or the log is gone.
        SpoolGap: The log does not go back to what is durable.
    """
    with connect(dsn, application) as connection, speaking_to(dsn, "checking the trigger log"):
        require(connection, stream, Log(migration), durable)
