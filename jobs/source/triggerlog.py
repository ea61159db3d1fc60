"""The trigger log: every change of a source without logical decoding, written by triggers into a table beside it.

A trigger on each table writes each change with its transaction's id, under settings of its own. So
a row reads as it does from a slot, whatever the application's session has set. No name or type that
the application changes makes its writes fail: a row is its composite text, and what an altered
table brings is for capture to stop at. How the log is read is said in `ticks`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from changeover import settings as pins
from changeover.errors import LockNotGranted
from changeover.names import joined
from changeover.session import LOCK_TIMEOUT, Connection, application_name, server_name
from changeover.spec import Spec

LOCK_TRIES = 30
ALARM_BYTES = 1 << 30
"""Size of the log from which on it is an alarm."""


@dataclass(frozen=True)
class Log:
    """The log of one migration by its names in the source."""

    migration: str

    @property
    def rows(self) -> sql.Identifier:
        """Return the table of changes."""
        return sql.Identifier("changeover", f"capture_log_{self.migration}")

    @property
    def ticks(self) -> sql.Identifier:
        """Return the table of ticks."""
        return sql.Identifier("changeover", f"capture_tick_{self.migration}")

    def function(self, number: int) -> sql.Identifier:
        """Return the function of the triggers on one of the spec's tables.

        Args:
            number: The table's number in the spec, from 0.

        Returns:
            Its qualified name.
        """
        return sql.Identifier("changeover", f"capture_{self.migration}_{number}")

    @property
    def trigger(self) -> str:
        """Return the name of the row trigger, with which that of the statement trigger begins."""
        return f"changeover_{self.migration}_log"

    @property
    def channel(self) -> str:
        """Return the channel of notifications by which capture is asked for a tick."""
        return f"capture_tick_{self.migration}"

    def __str__(self) -> str:
        return f"changeover.capture_log_{self.migration}"


TABLES = """
CREATE SCHEMA IF NOT EXISTS changeover;
CREATE TABLE {rows} (
    seq bigint GENERATED ALWAYS AS IDENTITY (CACHE 1), xid xid8 NOT NULL DEFAULT pg_current_xact_id(), tab smallint,
    op "char" NOT NULL, image text, gone text, note text DEFAULT nullif(current_setting('changeover.ours', true), ''))
    WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000);
CREATE INDEX ON {rows} (xid);
CREATE TABLE {ticks} (
    "end" pg_lsn PRIMARY KEY, snapshot pg_snapshot NOT NULL, tables jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp());
GRANT USAGE ON SCHEMA changeover TO PUBLIC;
GRANT SELECT ON {ticks} TO PUBLIC
"""

BODY = """
DECLARE image text; gone text;
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO {rows} (tab, op) VALUES ({number}, 'T');
        RETURN NULL;
    END IF;
    IF TG_OP = 'INSERT' THEN
        IF NEW.xmax = '0'::xid THEN
            INSERT INTO {rows} (tab, op, image) VALUES ({number}, 'I', NEW::text);
            RETURN NULL;
        END IF;
    END IF;
    BEGIN
        -- a version that a nested statement has replaced already comes after its successor: what the key holds now counts
        IF TG_OP <> 'DELETE' THEN
            IF NEW.xmax = '0'::xid THEN image := NEW::text;
            ELSE SELECT (r.*)::text INTO image FROM ONLY {table} r WHERE {same_as_new}; END IF;
        END IF;
        IF TG_OP = 'DELETE' THEN gone := OLD::text;
        ELSIF TG_OP = 'UPDATE' THEN
            IF {moved} THEN gone := OLD::text; END IF;
        END IF;
        IF gone IS NOT NULL AND EXISTS (SELECT FROM ONLY {table} r WHERE {same_as_old}) THEN gone := NULL; END IF;
    EXCEPTION WHEN undefined_column OR undefined_table OR undefined_function OR datatype_mismatch OR insufficient_privilege THEN
        -- the write goes on: the table was altered, and capture stops it, or a policy would hide rows, and whoever reads it says so
        IF TG_OP <> 'DELETE' THEN image := NEW::text; END IF;
        IF TG_OP <> 'INSERT' THEN gone := OLD::text; END IF;
    END;
    IF image IS NOT NULL OR gone IS NOT NULL THEN
        INSERT INTO {rows} (tab, op, image, gone)
        VALUES ({number}, CASE WHEN image IS NULL THEN 'D' ELSE substr(TG_OP, 1, 1) END::"char", image, gone);
    END IF;
    RETURN NULL;
END
"""
"""What the triggers do. A row is its composite text, which needs no column's name, under the settings pinned at the function."""

TRIGGERS = (("", "INSERT OR UPDATE OR DELETE", "ROW"), ("_truncate", "TRUNCATE", "STATEMENT"))
"""(suffix of the trigger's name, events, level); AFTER, because what a BEFORE trigger saw may be changed or dropped by the next."""


# -- making and removing


def install(connection: Connection, spec: Spec, keys: Sequence[Sequence[str]]) -> None:
    """Make log, ticks and triggers in the source (driver); locks are asked for briefly.

    Creating a trigger waits for the transactions that wrote without it, so each of those is visible
    in a snapshot taken later.

    Args:
        connection: A session with the store.
        spec: The migration's spec.
        keys: The key columns of each table, in the spec's order.

    Raises:
        LockNotGranted: A transaction that uses a table stays open.
    """
    log = Log(spec.name)
    with connection.transaction():
        for statement in TABLES.strip().split(";\n"):
            connection.execute(sql.SQL(statement).format(rows=log.rows, ticks=log.ticks))
    for number, (table, key) in enumerate(zip(spec.tables, keys, strict=True)):
        statements = [_function(connection, log, number, table.source_name, key), *_triggers(log, number, table.source_name)]
        _patiently(connection, f"lock for the triggers on {table.source}", statements)


def _function(connection: Connection, log: Log, number: int, table: tuple[str, str], key: Sequence[str]) -> sql.Composed:
    def all_of(template: str, joint: str) -> sql.Composed:
        return sql.SQL(joint).join(sql.SQL(template).format(k=sql.Identifier(column)) for column in key)

    same = '(r.{{k}} = {0}.{{k}} AND r.{{k}}::text COLLATE "C" = {0}.{{k}}::text)'
    body = sql.SQL(BODY).format(
        rows=log.rows, number=sql.Literal(number), table=sql.Identifier(*table),
        same_as_new=all_of(same.format("NEW"), " AND "), same_as_old=all_of(same.format("OLD"), " AND "),
        moved=all_of('OLD.{k}::text COLLATE "C" IS DISTINCT FROM NEW.{k}::text', " OR "),
    )  # fmt: skip
    pinned = {**pins.output(), "row_security": "off", "search_path": "pg_catalog, pg_temp"}
    settings = sql.SQL(" ").join(sql.SQL("SET {}").format(pins.assignment(name, value)) for name, value in pinned.items())
    return sql.SQL("CREATE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER {} AS {}").format(
        log.function(number), settings, sql.Literal(body.as_string(connection))
    )


def _triggers(log: Log, number: int, table: tuple[str, str]) -> Iterator[sql.Composed]:
    for suffix, events, level in TRIGGERS:
        named = {"trigger": sql.Identifier(log.trigger + suffix), "table": sql.Identifier(*table)}
        yield sql.SQL("CREATE TRIGGER {trigger} AFTER {events} ON {table} FOR EACH {level} EXECUTE FUNCTION {function}()").format(
            **named, events=sql.SQL(events), level=sql.SQL(level), function=log.function(number)
        )
        yield sql.SQL("ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}").format(**named)


def _patiently(connection: Connection, wanted: str, statements: Sequence[sql.Composed]) -> None:
    """Run statements in one transaction whose locks are asked for briefly and again, so that writers go first."""
    for _ in range(LOCK_TRIES):
        try:
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                for statement in statements:
                    connection.execute(statement)
            return
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.2)
    raise LockNotGranted(server_name(connection.info.dsn), wanted, "an open transaction that uses the table")


def remove(connection: Connection, migration: str) -> list[str]:
    """Remove triggers, functions, log and ticks of a migration, wherever its tables are now (driver).

    Args:
        connection: A session with the store.
        migration: The migration's name.

    Returns:
        What was removed, each as a phrase.

    Raises:
        LockNotGranted: A transaction that uses a table stays open.
    """
    log = Log(migration)
    removed = []
    names = [log.trigger + suffix for suffix, _, _ in TRIGGERS]
    triggers = connection.execute(
        "SELECT t.tgname, n.nspname, c.relname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE t.tgname = ANY (%s) ORDER BY 2, 3, 1",
        [names],
    ).fetchall()
    for name, schema, table in triggers:
        drop = sql.SQL("DROP TRIGGER IF EXISTS {} ON {}").format(sql.Identifier(name), sql.Identifier(schema, table))
        _patiently(connection, f"lock to remove the trigger on {joined(schema, table)}", [drop])
        removed.append(f"trigger {name} on {joined(schema, table)}")
    functions = connection.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = to_regnamespace('changeover') AND proname ~ %s",
        [f"^capture_{migration}_[0-9]+$"],
    ).fetchall()
    drops: list[sql.Composed] = [sql.SQL("DROP FUNCTION {}()").format(sql.Identifier("changeover", name)) for (name,) in functions]
    if exists(connection, log):
        drops.append(sql.SQL("DROP TABLE {}, {}").format(log.rows, log.ticks))
        removed.append(f"log {log}")
    _patiently(connection, f"lock to remove {log}", drops)
    if drops and not _logs(connection):
        connection.execute("REVOKE USAGE ON SCHEMA changeover FROM PUBLIC")
    return removed


def exists(connection: Connection, log: Log) -> bool:
    """Return whether the log is there.

    Args:
        connection: A session with the store.
        log: The trigger log.

    Returns:
        Whether its table is.
    """
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [log.rows.as_string(connection)]).fetchone()
    return bool(row and row[0])


def _logs(connection: Connection) -> list[str]:
    rows = connection.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('changeover') AND relkind = 'r'"
        " AND relname LIKE 'capture\\_log\\_%'"
    )
    return [row[0] for row in rows.fetchall()]


def mark(connection: Connection, note: str) -> None:
    """Write a marker into every log of a source; it reaches the spools when the caller's transaction commits."""
    for name in _logs(connection):
        connection.execute(sql.SQL("INSERT INTO {} (op, note) VALUES ('M', %s)").format(sql.Identifier("changeover", name)), [note])


def ask_for_a_tick(connection: Connection, log: Log) -> None:
    """Have capture record a tick though nothing is in the log, so that a position that was read before is passed.

    Any role may: nothing is written but a notification, which commits behind that position. Where no capture runs, nobody hears it.

    Args:
        connection: A session with the store.
        log: The trigger log.
    """
    connection.execute("SELECT pg_catalog.pg_notify(%s, '')", [log.channel])


def state(connection: Connection, migration: str) -> tuple[str, int | None, str | None]:
    """Return how the log stands, for status.

    Args:
        connection: A session with the store.
        migration: The migration's name.

    Returns:
        (`no log`, `inactive` or `active`; the log's bytes; an alarm or None).
    """
    log = Log(migration)
    if not exists(connection, log):
        return "no log", None, None
    row = connection.execute("SELECT pg_total_relation_size(to_regclass(%s))", [log.rows.as_string(connection)]).fetchone()
    size = int(row[0] or 0) if row else 0
    alarm = (
        f"the trigger log {log} has {size:,} bytes: see that capture runs, that no transaction stays open for long, and that the"
        " copy ends, since until then vacuum can't give its space back"
    )
    return "active" if capturing(connection, migration) else "inactive", size, alarm if size > ALARM_BYTES else None


def capturing(connection: Connection, migration: str) -> bool:
    """Return whether a capture of this migration is connected.

    Args:
        connection: A session with the store.
        migration: The migration's name.

    Returns:
        Whether a session of its capture is open.
    """
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = %s AND datname = current_database())",
        [application_name(migration, "capture")],
    ).fetchone()
    return bool(row and row[0])
