"""The replica role: what replay writes fires no trigger and no foreign key's action of the user's; their effects come as events.

A parent that is deleted and inserted anew would else take its children along (ON DELETE CASCADE), and a counter count twice.
Setting `session_replication_role` asks for a superuser or, from PostgreSQL 15 on, for a grant. Triggers that are ENABLE ALWAYS
fire all the same: the store's refusal, the trigger log, and whatever the user made so.
"""

from __future__ import annotations

from changeover.session import Connection, one_row

PARAMETER = "session_replication_role"
GRANTED_SINCE = 150000
"""Server version from which the right to set a parameter can be granted (GRANT, GRANT on Parameters)."""

LIVE = """
SELECT format('TRIGGER %%I', t.tgname), t.tgrelid::regclass::text, t.tgenabled IN ('A', 'R')
FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
WHERE t.tgrelid IN (SELECT %(table)s::regclass UNION SELECT relid FROM pg_partition_tree(%(table)s::regclass))
    AND NOT t.tgisinternal AND t.tgenabled <> 'D' AND t.tgparentid = 0
    AND p.pronamespace IS DISTINCT FROM to_regnamespace('changeover')
UNION ALL
SELECT format('foreign key %%I of %%s behind it, ON %%s', c.conname, c.conrelid::regclass,
        CASE WHEN c.confdeltype IN ('c', 'n', 'd') THEN 'DELETE' ELSE 'UPDATE' END), c.confrelid::regclass::text, false
FROM pg_constraint c WHERE c.confrelid = %(table)s::regclass AND c.contype = 'f' AND c.conparentid = 0
    AND (c.confdeltype IN ('c', 'n', 'd') OR c.confupdtype IN ('c', 'n', 'd'))
ORDER BY 1
"""
"""What acts by itself when a table's rows are written, and whether it does so under the replica role, too; ours is left out."""


def allowed(connection: Connection) -> bool:
    """Return whether the session's role may take the replica role."""
    row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    if row is not None and row[0]:
        return True
    if connection.info.server_version < GRANTED_SINCE:
        return False
    row = connection.execute("SELECT has_parameter_privilege(%s, 'SET')", [PARAMETER]).fetchone()
    return bool(row and row[0])


def take(connection: Connection) -> bool:
    """Take the replica role for the rest of the session where that is allowed.

    Args:
        connection: A session with the store.

    Returns:
        Whether it was allowed.
    """
    may = allowed(connection)
    if may:
        connection.execute(f"SET {PARAMETER} = replica".encode())
    return may


def acting(connection: Connection, table: str) -> tuple[list[str], list[str]]:
    """Return sentences on a table, named as SQL names it, whose rows come back: what forbids that, and what is to be known.

    Args:
        connection: A session with the store.
        table: The table, as SQL names it.

    Returns:
        (what forbids it, what is to be known), each a list of sentences.
    """
    live = connection.execute(LIVE, {"table": table}).fetchall()
    always = [
        f"{name} has the {what} as ENABLE ALWAYS or REPLICA, so it fires for what comes back, too: ALTER TABLE {name} ENABLE {what}"
        " makes it an ordinary one"
        for what, name, fires in live
        if fires
    ]
    ordinary = [(what, name) for what, name, fires in live if not fires]
    if not ordinary or allowed(connection):
        return [], always
    row = one_row(connection.execute("SELECT quote_ident(current_user)"))
    way = f"GRANT SET ON PARAMETER {PARAMETER} TO {row[0]}"
    if connection.info.server_version < GRANTED_SINCE:
        way = "before PostgreSQL 15 only a superuser may"
    return [
        f"{name} has the {what}, which would act on what comes back, because the role {row[0]} may not set {PARAMETER}: {way}"
        for what, name in ordinary
    ], always
