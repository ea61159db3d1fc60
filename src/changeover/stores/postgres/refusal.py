"""The refusal: how a store rejects writes to rows over which it has no authority.

An ENABLE ALWAYS trigger on the table refuses whatever does not come through the gate of the present
epoch: of all rows, or of some tenants. A statement is refused as well as a row, since an UPDATE or a DELETE
may find no row here that the other store has by now. Creating it, or replacing it with another list, takes SHARE
ROW EXCLUSIVE, so once that is granted every older writing transaction has ended: the lock is the
drain as well. It is asked for with a short lock_timeout and again, so that writers never queue long
behind it. The list stands in the trigger's function, which every session looks up anew in the
catalogue. A transaction with an old snapshot meets the list of today; from a table it would read
that of its snapshot.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import sql

from changeover.session import Connection, one_row
from changeover.stores.postgres.gate import FENCED, body_of, ours
from changeover.tenants import EVERY, Tenants

LOCK_TIMEOUT = "300ms"

TRIGGERS: tuple[tuple[str, LiteralString, LiteralString], ...] = (
    ("", "INSERT OR UPDATE OR DELETE", "ROW"),
    ("_statement", "INSERT OR UPDATE OR DELETE OR TRUNCATE", "STATEMENT"),
)
"""(suffix of the trigger's name, events, level)."""

TENANT_SETTING = "changeover.tenant"
"""The setting by which a transaction says for which tenant it writes: no row tells it of a statement that finds none."""


@dataclass(frozen=True)
class TenantEpoch:
    """An epoch of authority, and the tenants whose rows it is over.

    What does not come through the gate in this epoch or a later one is refused.
    """

    epoch: int
    tenants: Tenants = EVERY


@dataclass(frozen=True)
class Refusal:
    """What a store refuses: `standing` for good, `begun` up to a deadline; `column` holds the tenant where there are some."""

    standing: tuple[TenantEpoch, ...] = ()
    begun: TenantEpoch | None = None
    column: str | None = None


def install(connection: Connection, schema: str, name: str, refusal: Refusal, deadline: float) -> bool:
    """Refuse from now on; False when the lock was not granted before `deadline` (monotonic seconds).

    Once this returns True, no transaction that could write without the refusal is alive. What is
    begun ends by itself at the deadline, so that a fence that died gives the writers back, until it
    is among what stands.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        refusal: What is refused, and to whom.
        deadline: Until when the lock may be asked for, in monotonic seconds.

    Returns:
        Whether the lock was granted in time; if not, nothing is refused.
    """
    table, function = sql.Identifier(schema, name), ours("refuse", schema, name)
    while (left := deadline - time.monotonic()) > 0:
        try:
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                connection.execute("CREATE SCHEMA IF NOT EXISTS changeover")
                connection.execute(_function(function, refusal, _server_time(connection, left)))
                for suffix, event, level in TRIGGERS:
                    # a row's trigger is every partition's, present and to come; a statement's is the table's own alone
                    for relation in (table, *(_partitions(connection, table) if level == "STATEMENT" else ())):
                        _refuse(connection, relation, sql.Identifier(f"changeover_refusal{suffix}"), event, level, function)
            return True
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.05)
    return False


def replace(connection: Connection, schema: str, name: str, refusal: Refusal) -> None:
    """Refuse something else, at once and without a lock: for a deadline that is taken away, and for writers that are let in.

    The caller makes sure that no deadline has passed.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        refusal: What is refused, and to whom.
    """
    connection.execute(_function(ours("refuse", schema, name), refusal, "infinity"))


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


def _server_time(connection: Connection, seconds: float) -> str:
    """Return a moment of the server's own clock, which is the one that the refusal goes by."""
    row = one_row(connection.execute("SELECT (clock_timestamp() + make_interval(secs => %s))::text", [seconds]))
    return str(row[0])


def _function(function: sql.Identifier, refusal: Refusal, ends: str) -> sql.Composed:
    """The trigger's body: what comes through the gate of the present epoch passes, and what is begun once `ends` has come.

    A row that changes its tenant is a write to both. A TRUNCATE is one to all, so no store takes it where tenants are told apart.
    A statement of another trigger is judged by its rows alone: a foreign key's action runs one for each parent, most find nothing.
    The writer's search_path counts for nothing: every name says its schema, operators too.
    """
    statement = _since(None if refusal.column is None else sql.SQL("stated"), refusal, ends)
    epochs = [refused.epoch for refused in (*refusal.standing, *([refusal.begun] if refusal.begun else []))]
    body = sql.SQL(
        """
        DECLARE since integer := -1; given pg_catalog.text; epoch integer := -1; stated pg_catalog.text;
        BEGIN
            IF TG_OP {same} 'TRUNCATE' THEN since := {whole};
            ELSIF TG_LEVEL {same} 'STATEMENT' AND pg_catalog.pg_trigger_depth() OPERATOR(pg_catalog.<) 2 THEN
                given := pg_catalog.current_setting({setting}, true);
                IF given OPERATOR(pg_catalog.<>) '' THEN stated := given; END IF;
                since := {statement};
            END IF;
            IF TG_LEVEL {same} 'ROW' AND TG_OP OPERATOR(pg_catalog.<>) 'INSERT' THEN since := {old}; END IF;
            IF TG_LEVEL {same} 'ROW' AND TG_OP OPERATOR(pg_catalog.<>) 'DELETE' THEN since := greatest(since, {new}); END IF;
            given := pg_catalog.current_setting('changeover.epoch', true);
            IF given OPERATOR(pg_catalog.<>) '' THEN epoch := given; END IF;
            IF epoch OPERATOR(pg_catalog.<) since THEN
                RAISE EXCEPTION 'changeover: this store has no authority over % since epoch %: write to the other one',
                    TG_RELID::pg_catalog.regclass, since USING ERRCODE = {state};
            END IF;
            IF TG_OP {same} 'DELETE' THEN RETURN OLD; END IF;
            RETURN NEW;
        END
        """
    ).format(
        state=sql.Literal(FENCED), same=sql.SQL("OPERATOR(pg_catalog.=)"),
        old=_since(_of_row("OLD", refusal), refusal, ends), new=_since(_of_row("NEW", refusal), refusal, ends),
        statement=statement, setting=sql.Literal(TENANT_SETTING),
        whole=statement if refusal.column is None else sql.Literal(max([0, *epochs])),
    )  # fmt: skip
    return sql.SQL("CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS {}").format(function, body_of(body))


def _of_row(row: str, refusal: Refusal) -> sql.Composable | None:
    return None if refusal.column is None else tenant_of(row, refusal.column)


def _since(tenant: sql.Composable | None, refusal: Refusal, ends: str) -> sql.Composed:
    """Return the expression of the epoch since which a tenant's writes are refused, -1 where they are not."""
    begun = sql.SQL("pg_catalog.clock_timestamp() OPERATOR(pg_catalog.<) {}::pg_catalog.timestamptz").format(sql.Literal(ends))
    arms: list[tuple[TenantEpoch, sql.Composable]] = [(one, sql.SQL("true")) for one in refusal.standing]
    arms += [(refusal.begun, begun)] if refusal.begun else []
    return sql.SQL("CASE {} ELSE -1 END").format(
        sql.SQL(" ").join(
            sql.SQL("WHEN {} AND {} THEN {}").format(belongs(tenant, one.tenants), when, sql.Literal(one.epoch))
            for one, when in (*arms, (TenantEpoch(-1), sql.SQL("false")))
        )
    )


def tenant_of(row: str, column: str) -> sql.Composable:
    """Return the tenant of a trigger's row as text: `row` is OLD or NEW."""
    return sql.SQL("{}::pg_catalog.text").format(sql.Identifier(row.lower(), column))


def belongs(tenant: sql.Composable | None, tenants: Tenants) -> sql.Composable:
    """Return the condition that a tenant, an expression of text, is one of some; None is told apart by nothing.

    The names are the keys of one JSON constant, which a session reads once and then searches by
    halves. Of an array it would make a table in each transaction anew.
    """
    if tenant is None or tenants == EVERY:
        return sql.SQL("true")
    names = sql.Literal(json.dumps(dict.fromkeys(sorted(tenants.names))))
    inside = sql.SQL("{}::pg_catalog.jsonb OPERATOR(pg_catalog.?) {}").format(names, tenant)
    return sql.SQL("NOT ({})").format(inside) if tenants.others else inside


def remove(connection: Connection, schema: str, name: str) -> list[str]:
    """Let every write pass again: remove the triggers, the mirror's gate, and our schema when nothing else is in it.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        What was removed, each as a phrase.
    """
    if connection.execute("SELECT FROM pg_namespace WHERE nspname = 'changeover'").fetchone() is None:
        return []
    removed = []
    with connection.transaction():
        function = ours("refuse", schema, name)
        # by its function: a partition that was detached since has kept the statement's trigger
        triggers = connection.execute(
            "SELECT n.nspname, c.relname, t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid"
            " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE t.tgfoid = to_regprocedure(%s) AND t.tgparentid = 0"
            " ORDER BY t.oid",
            [f"{function.as_string(connection)}()"],
        ).fetchall()
        for of_schema, relation, trigger in triggers:
            on = sql.Identifier(of_schema, relation)
            connection.execute(sql.SQL("DROP TRIGGER {} ON {}").format(sql.Identifier(trigger), on))
            removed.append(f"trigger {trigger} on {of_schema}.{relation}")
        connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}()").format(function))
    return removed


def drop_empty_schema(connection: Connection) -> None:
    """Drop our schema where no table and no function is left in it.

    Args:
        connection: A session with the store.
    """
    connection.execute(
        "DO $body$ BEGIN IF NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = to_regnamespace('changeover'))"
        " AND NOT EXISTS (SELECT FROM pg_proc WHERE pronamespace = to_regnamespace('changeover'))"
        " THEN DROP SCHEMA IF EXISTS changeover; END IF; END $body$"
    )
