"""Leftovers: what of a migration is in the old store, and of its reverse replication in the new one.

It goes by the names that this migration gives, in this database's own catalogue, and not by any record, so it also finds what a
killed run left. What another migration has, or another database of the server, is none of it, however alike the names are. What
migrations share, the schema and the table of floors, counts where nothing else is in it. It looks only. Runs where its caller runs,
without Spark.
"""

from __future__ import annotations

import time

from psycopg import sql

from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source.triggerlog import TRIGGERS, Log
from changeover.names import joined
from changeover.session import Connection, application_name, connect
from changeover.spec import Spec
from changeover.stores.postgres.gate import our_name

SESSION = "session "
SESSION_SECONDS = 5.0

KINDS = ("versions", "gate", "refuse", "floor")
"""What stands beside a table of the user's in our schema."""

LEFTOVERS = """
SELECT 'replication slot ' || slot_name FROM pg_replication_slots
WHERE slot_name = %(slot)s AND database = current_database()
UNION ALL SELECT 'publication ' || pubname FROM pg_publication WHERE pubname = %(slot)s
UNION ALL SELECT format('trigger %%s on %%s', tgname, tgrelid::regclass) FROM pg_trigger
WHERE tgname = ANY (%(logging)s) AND tgparentid = 0
    OR tgname LIKE 'changeover\\_refusal%%' AND tgparentid = 0 AND tgrelid IN (
        SELECT to_regclass(t)::oid FROM unnest(%(tables)s::text[]) AS t
        UNION SELECT p.relid FROM unnest(%(tables)s::text[]) AS t, pg_partition_tree(to_regclass(t)) AS p)
UNION ALL SELECT format('%%s in schema changeover', relname) FROM pg_class
WHERE relnamespace = to_regnamespace('changeover') AND relname = ANY (%(ours)s)
UNION ALL SELECT format('function changeover.%%s', proname) FROM pg_proc
WHERE pronamespace = to_regnamespace('changeover') AND (proname = ANY (%(ours)s) OR proname ~ %(functions)s)
UNION ALL SELECT format('session %%s', application_name) FROM pg_stat_activity
WHERE starts_with(application_name, %(sessions)s) AND pid <> pg_backend_pid() AND datname = current_database()
"""

EMPTY = """
SELECT 'schema changeover' FROM pg_namespace n WHERE nspname = 'changeover'
    AND NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = n.oid AND relname <> ALL (%(ours)s) AND relkind IN ('r', 'p'))
    AND NOT EXISTS (SELECT FROM pg_proc WHERE pronamespace = n.oid AND proname <> ALL (%(ours)s) AND proname !~ %(functions)s)
"""
"""The schema, where nobody else's is in it."""


def leftovers(spec: Spec) -> list[str]:
    """Return everything of the migration that is still in the old store, and what is left of its reverse path (driver; looks only).

    Where it is sessions alone it looks again for a while: the server ends one a little after its
    client has gone.

    Args:
        spec: The migration's spec.

    Returns:
        What is left, each as a phrase; none where the old store is clean.
    """
    deadline = time.monotonic() + SESSION_SECONDS
    while (left := _left(spec)) and all(one.startswith(SESSION) for one in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _left(spec: Spec) -> list[str]:
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "leftovers")) as old:
        left = _of_old(old, spec)
    return left + [one for one in reverse_setup.leftovers(spec) if one not in left]


def _of_old(old: Connection, spec: Spec) -> list[str]:
    log = Log(spec.name)
    ours = [our_name(kind, *table.source_name) for table in spec.tables for kind in KINDS]
    ours += [f"capture_log_{spec.name}", f"capture_tick_{spec.name}", *(["gate"] if _floors_are_ours(old, spec) else [])]
    asked = {
        "slot": spec.slot, "logging": [log.trigger + suffix for suffix, _, _ in TRIGGERS],
        "tables": [sql.Identifier(*table.source_name).as_string(old) for table in spec.tables],
        "ours": ours, "functions": f"^capture_{spec.name}_[0-9]+$", "sessions": application_name(spec.name, ""),
    }  # fmt: skip
    return [row[0] for query in (LEFTOVERS, EMPTY) for row in old.execute(query, asked).fetchall()]


def _floors_are_ours(old: Connection, spec: Spec) -> bool:
    """Return whether the table of floors is there for this migration alone, or for nobody."""
    row = old.execute("SELECT has_table_privilege(to_regclass('changeover.gate'), 'SELECT')").fetchone()
    if row is None or not row[0]:
        return False
    names = [joined(*table.source_name) for table in spec.tables]
    return old.execute("SELECT FROM changeover.gate WHERE target <> ALL (%s)", [names]).fetchone() is None
