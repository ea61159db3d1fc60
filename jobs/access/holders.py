"""Holders: open transactions that a fence, or a slot, will wait for, named before anybody waits.

A fence asks for a lock that waits for every transaction which writes to the table. A slot begins
where every transaction has ended that has written anything on the server. Those of our own sessions
are left out. Whose age the server does not tell us is looked at twice: what is the same transaction
a while later is long. It looks only; runs on the driver.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from psycopg import sql

from changeover.session import Connection

LONG_SECONDS = 2.0
"""From how long on an open transaction is worth a word: the application's own are over by then."""

HOLDING = """
WITH held AS (
    SELECT DISTINCT pid, virtualtransaction FROM pg_locks WHERE granted AND locktype = 'relation'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND relation IN (SELECT unnest(%(tables)s::text[])::regclass::oid)
        AND mode NOT IN ('AccessShareLock', 'RowShareLock'))
SELECT a.pid::text || ' ' || h.virtualtransaction, extract(epoch FROM clock_timestamp() - a.xact_start)::float8,
    format('process %%s of %%s (%%s), %%s', a.pid, coalesce(a.usename, '-'),
        coalesce(nullif(a.application_name, ''), a.backend_type, 'no name'), coalesce(a.state, 'state not shown'))
FROM held h JOIN pg_stat_activity a USING (pid)
WHERE a.pid <> pg_backend_pid() AND NOT starts_with(coalesce(a.application_name, ''), 'changeover:')
UNION ALL SELECT 'prepared ' || gid, extract(epoch FROM clock_timestamp() - prepared)::float8,
    format('the prepared transaction %%s of %%s', gid, owner)
FROM pg_prepared_xacts WHERE database = current_database()
"""

WRITING = """
SELECT a.pid::text || ' ' || a.backend_xid::text, extract(epoch FROM clock_timestamp() - a.xact_start)::float8,
    format('process %%s of %%s (%%s), %%s', a.pid, coalesce(a.usename, '-'),
        coalesce(nullif(a.application_name, ''), a.backend_type, 'no name'), coalesce(a.state, 'state not shown'))
FROM pg_stat_activity a WHERE a.backend_xid IS NOT NULL AND a.pid <> pg_backend_pid()
    AND NOT starts_with(coalesce(a.application_name, ''), 'changeover:')
UNION ALL SELECT 'prepared ' || gid, extract(epoch FROM clock_timestamp() - prepared)::float8,
    format('the prepared transaction %%s of %%s', gid, owner)
FROM pg_prepared_xacts
"""


def of_tables(connection: Connection, tables: Sequence[tuple[str, str]]) -> list[str]:
    """Return the long transactions that hold up a fence's lock on tables (driver).

    Args:
        connection: A session with the store.
        tables: (schema, table) of each.

    Returns:
        Phrases, oldest transaction first.
    """
    names = [sql.Identifier(*table).as_string(connection) for table in tables]
    return _long(connection, HOLDING, {"tables": names})


def of_slot(connection: Connection) -> list[str]:
    """Return the long transactions of a server that a new slot will wait for (driver).

    Args:
        connection: A session with the store.

    Returns:
        Phrases, oldest transaction first.
    """
    return _long(connection, WRITING, {})


def _long(connection: Connection, query: str, asked: dict[str, list[str]]) -> list[str]:
    first = {row[0]: (row[1], row[2]) for row in connection.execute(query.encode(), asked).fetchall()}
    unknown = {name for name, (age, _) in first.items() if age is None}
    still: set[str] = set()
    if unknown:
        time.sleep(LONG_SECONDS)
        still = unknown & {row[0] for row in connection.execute(query.encode(), asked).fetchall()}
    long = {name: (age, who) for name, (age, who) in first.items() if name in still or (age is not None and age >= LONG_SECONDS)}
    oldest = sorted(long.values(), key=lambda one: -(one[0] or 0.0))
    return [f"{who}, open for {f'{age:.0f} s' if age is not None else f'more than {LONG_SECONDS:g} s'}" for age, who in oldest]
