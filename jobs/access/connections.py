"""Connections: whether each kind that a run needs can be had from a server, and what stands in between; asked by `check`.

A plain session says little of the others. The walsender has conditions of its own, and the driver
of Java takes less than libpq. A pooler may give each transaction another session. Nothing is
changed by it, and no JVM is started.
"""

from __future__ import annotations

import os
from contextlib import closing

from changeover import settings
from changeover.errors import ServerUnavailable, UsageError
from changeover.session import NO_POOLER, Connection, connect
from changeover.spark import jdbc

LOOKS = 4
"""How often two sessions are asked for their processes: a pooler that changes them does so between two transactions."""

SESSIONS = 16
"""How many sessions capture, replay and another step hold beside each other in a server with both stores, for any number of tables.

Each task of Spark's that runs has one more.
"""

LEFT = """
SELECT least(CASE WHEN NOT r.rolsuper AND r.rolconnlimit >= 0 THEN r.rolconnlimit - count(*) FILTER (WHERE a.usesysid = r.oid) END,
        CASE WHEN NOT r.rolsuper AND d.datconnlimit >= 0 THEN d.datconnlimit - count(*) FILTER (WHERE a.datid = d.oid) END,
        current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true)::int, 0) - count(*))
    + count(*) FILTER (WHERE a.usesysid = r.oid AND starts_with(a.application_name, %s))
FROM pg_roles r CROSS JOIN pg_database d CROSS JOIN pg_stat_activity a
WHERE r.rolname = current_user AND d.datname = current_database() AND a.usesysid IS NOT NULL AND a.datid IS NOT NULL
GROUP BY r.oid, r.rolsuper, r.rolconnlimit, d.oid, d.datconnlimit
"""
"""How many sessions the role may open, those of ours that are open among them."""


def reasons(dsn: str, application: str, where: str) -> list[str]:
    """Return what stands against a server's sessions of psycopg and of Java (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        where: What the server is called in a sentence.

    Returns:
        Reasons, each a sentence.

    Raises:
        ServerUnavailable: The server can't be reached.
    """
    if shares_sessions(dsn, application):
        return [f"{where} is reached through a pooler that changes sessions between transactions: {NO_POOLER}"]
    try:
        jdbc.options(dsn, application)
    except UsageError as error:
        return [f"{where}: {error}"]
    return []


def streaming(dsn: str, application: str, where: str) -> list[str]:
    """Return why a server gives no session for replication (driver).

    A role that may not replicate is a reason of its own.

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        where: What the server is called in a sentence.

    Returns:
        Reasons, each a sentence.
    """
    if not _may_replicate(dsn, application):
        return []
    try:
        with closing(connect(dsn, application, replication=True)) as session:
            session.execute("IDENTIFY_SYSTEM")
    except ServerUnavailable as error:
        ways = "see max_wal_senders and pg_hba.conf, and that no pooler is in between"
        return [f"{where} gives no session for replication ({error.problem}): {ways}"]
    return []


def _may_replicate(dsn: str, application: str) -> bool:
    """Return whether the role may; where it may not, there is a reason of its own."""
    with closing(connect(dsn, application)) as session:
        row = session.execute("SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    return bool(row and row[0])


def look_at_settings(connection: Connection, where: str, reasons: list[str], notes: list[str]) -> None:
    """Add what there is to say of settings that no session of ours can pin (driver).

    Args:
        connection: A session with the store.
        where: What the server is called in a sentence.
        reasons: Gets what stands against the plan.
        notes: Gets what a person should know.
    """
    for asked in settings.ASKED:
        for (value,) in connection.execute(settings.question(asked)).fetchall():
            sentence = f"{where} has {asked.name} = {value.strip()} for this role: {asked.consequence}"
            (reasons if asked.reason else notes).append(sentence)


def look_at_limits(connection: Connection, application: str, where: str, notes: list[str]) -> None:
    """Note where a server lets the role open fewer sessions than a run may hold.

    Args:
        connection: A session with the store.
        application: The session's application name.
        where: What the server is called in a sentence.
        notes: Gets what a person should know.
    """
    row = connection.execute(LEFT, [application.rpartition(":")[0] + ":"]).fetchone()
    tasks = os.cpu_count() or 1
    if row is not None and row[0] < SESSIONS + tasks:
        notes.append(
            f"{where} has {row[0]} sessions left for this role, and {SESSIONS + tasks} may be open at once, one of them for each of"
            f" {tasks} tasks of Spark's: raise the role's CONNECTION LIMIT, the database's, or max_connections"
        )


def shares_sessions(dsn: str, application: str) -> bool:
    """Return whether a pooler lends processes: two open sessions share one, or one has several."""
    with closing(connect(dsn, application)) as one, closing(connect(dsn, application)) as other:
        backends: tuple[set[int], set[int]] = (set(), set())
        for _ in range(LOOKS):
            for session, pids in zip((one, other), backends, strict=True):
                row = session.execute("SELECT pg_backend_pid()").fetchone()
                pids.add(row[0] if row else 0)
    return any(len(pids) > 1 for pids in backends) or bool(backends[0] & backends[1])
