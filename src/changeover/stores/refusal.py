"""The refusal: how the store that has lost authority turns stale writes away.

All rows at once: an ENABLE ALWAYS trigger on the table that refuses whatever does not come through the gate of the present
epoch. Creating it takes SHARE ROW EXCLUSIVE, so once it is granted every older writing transaction has ended: the lock is the
drain as well. It is asked for with a short lock_timeout and again, so that writers never queue long behind it.
"""

from __future__ import annotations

import time
from typing import LiteralString

import psycopg
from psycopg import sql

from changeover.session import Connection
from changeover.stores.gate import FENCED, ours

LOCK_TIMEOUT = "300ms"

TRIGGERS: tuple[tuple[str, LiteralString, LiteralString], ...] = (
    ("", "INSERT OR UPDATE OR DELETE", "ROW"),
    ("_truncate", "TRUNCATE", "STATEMENT"),
)
"""(suffix of the trigger's name, events, level)."""


def install(connection: Connection, schema: str, name: str, epoch: int, deadline: float) -> bool:
    """Refuse writes of epochs before `epoch`; False when the lock was not granted before `deadline` (monotonic seconds).

    Once this returns True, no transaction that could write without the refusal is alive. The refusal ends by itself at the
    deadline, so that a fence that died gives the writers back, until `make_permanent`.
    """
    table, function = sql.Identifier(schema, name), ours("refuse", schema, name)
    while (left := deadline - time.monotonic()) > 0:
        try:
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                connection.execute("CREATE SCHEMA IF NOT EXISTS changeover")
                connection.execute(_function(function, epoch, _server_time(connection, left)))
                for suffix, event, level in TRIGGERS:
                    # a row's trigger is every partition's, present and to come; a statement's is the table's own alone
                    for one in (table, *(_partitions(connection, table) if level == "STATEMENT" else ())):
                        _refuse(connection, one, sql.Identifier(f"changeover_refusal{suffix}"), event, level, function)
            return True
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.05)
    return False


def _refuse(
    connection: Connection, table: sql.Identifier, trigger: sql.Identifier, event: LiteralString, level: LiteralString,
    function: sql.Identifier,
) -> None:  # fmt: skip
    connection.execute(
        sql.SQL("CREATE OR REPLACE TRIGGER {} BEFORE {} ON {} FOR EACH {} EXECUTE FUNCTION {}()").format(
            trigger, sql.SQL(event), table, sql.SQL(level), function
        )
    )
    connection.execute(sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(table, trigger))


def _partitions(connection: Connection, table: sql.Identifier) -> list[sql.Identifier]:
    """Return the partitions of a table, none for one that is not partitioned or not there."""
    rows = connection.execute(
        "SELECT n.nspname, c.relname FROM pg_partition_tree(to_regclass(%s)) t JOIN pg_class c ON c.oid = t.relid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE t.level > 0 ORDER BY 1, 2",
        [table.as_string(connection)],
    )
    return [sql.Identifier(*row) for row in rows.fetchall()]


def make_permanent(connection: Connection, schema: str, name: str, epoch: int) -> None:
    """Take the deadline off a refusal; the caller makes sure that it has not passed."""
    connection.execute(_function(ours("refuse", schema, name), epoch, "infinity"))


def _server_time(connection: Connection, seconds: float) -> str:
    """Return a moment of the server's own clock, which is the one that the refusal goes by."""
    row = connection.execute("SELECT (clock_timestamp() + make_interval(secs => %s))::text", [seconds]).fetchone()
    assert row is not None
    return str(row[0])


def _function(function: sql.Identifier, epoch: int, ends: str) -> sql.Composed:
    """The trigger's body: what comes through the gate of the present epoch passes, and everything once `ends` has come."""
    return sql.SQL(
        "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN"
        " IF coalesce(nullif(current_setting('changeover.epoch', true), '')::integer, -1) < {epoch}"
        " AND clock_timestamp() < {ends}::timestamptz THEN"
        " RAISE EXCEPTION 'changeover: this store has no authority over % since epoch {epoch}: write to the other one',"
        " TG_RELID::regclass USING ERRCODE = {state}; END IF;"
        " IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END $body$"
    ).format(function=function, epoch=sql.Literal(epoch), ends=sql.Literal(ends), state=sql.Literal(FENCED))


def remove(connection: Connection, schema: str, name: str) -> list[str]:
    """Let every write pass again: remove the triggers, the mirror's gate, and our schema when nothing else is in it."""
    if connection.execute("SELECT FROM pg_namespace WHERE nspname = 'changeover'").fetchone() is None:
        return []
    removed = []
    with connection.transaction():
        table = sql.Identifier(schema, name)
        for one in (table, *_partitions(connection, table)):
            found = connection.execute(
                "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass(%s) AND tgparentid = 0"
                " AND tgname LIKE 'changeover_refusal%%'",
                [one.as_string(connection)],
            ).fetchall()
            for row in found:
                connection.execute(sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(row[0]), one))
                removed.append(f"trigger {row[0]} on {one.as_string(connection).replace(chr(34), '')}")
        connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}()").format(ours("refuse", schema, name)))
    return removed


def drop_empty_schema(connection: Connection) -> None:
    """Drop our schema where no table and no function is left in it."""
    connection.execute(
        "DO $body$ BEGIN IF NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = to_regnamespace('changeover'))"
        " AND NOT EXISTS (SELECT FROM pg_proc WHERE pronamespace = to_regnamespace('changeover'))"
        " THEN DROP SCHEMA IF EXISTS changeover; END IF; END $body$"
    )
