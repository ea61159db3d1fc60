"""The backlog that is caught up with: single-row updates of one table, ten a transaction, on random keys or on hot ones."""

from __future__ import annotations

from psycopg import sql

from changeover.position import parse_lsn
from changeover.session import Connection

ROWS = 200_000
"""Rows of the table."""

TABLE = """
CREATE TABLE accounts (id bigint PRIMARY KEY, owner text NOT NULL, note text, amount numeric(12,2), tags text[],
    updated_at timestamptz NOT NULL)
"""

FILL = """
INSERT INTO accounts SELECT i, 'owner ' || i, 'a note of some length, as people write them, number ' || i,
    (i % 1000000)::numeric / 100,
    ARRAY['t' || i % 10, 'é'], timestamptz '2024-01-01 00:00:00Z' + i * interval '1 second' FROM generate_series(1, {rows}) AS i
"""

CHANGE = """
DO $do$ DECLARE chosen bigint; BEGIN
    FOR transaction IN 1..{transactions} LOOP
        FOR change IN 1..10 LOOP
            chosen := {key};
            UPDATE accounts SET note = 'changed ' || transaction || '/' || change, amount = amount + 0.01,
                updated_at = clock_timestamp() WHERE id = chosen;
        END LOOP;
        COMMIT;
    END LOOP;
END $do$
"""

KEYS = {
    "random": "1 + floor(random() * {rows})::bigint",
    # every decade of keys is met as often as the next one: Zipf's law with the exponent 1
    "hot": "floor(power({rows}, random()))::bigint",
}
"""Case -> the key of one change."""


def create(connection: Connection) -> None:
    """Create and fill the table."""
    connection.execute(TABLE)
    connection.execute(sql.SQL(FILL).format(rows=sql.Literal(ROWS)))
    connection.execute("VACUUM (ANALYZE, FREEZE) accounts")


def change(connection: Connection, case: str, changes: int) -> int:
    """Make the changes and return the position behind the last one."""
    key = sql.SQL(KEYS[case]).format(rows=sql.Literal(ROWS))
    connection.execute("SET synchronous_commit = off")
    connection.execute(sql.SQL(CHANGE).format(transactions=sql.Literal(changes // 10), key=key))
    connection.execute("RESET synchronous_commit")
    row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    connection.execute("SELECT pg_logical_emit_message(true, 'benchmark', 'end')")  # nothing else would pass the position
    connection.execute("CHECKPOINT")
    return parse_lsn(row[0])


def fingerprint(connection: Connection, table: str) -> str:
    """Return the number of rows and a sum over all of them, the same for the same rows."""
    row = connection.execute(
        sql.SQL("SELECT count(*), sum(hashtextextended(t::text, 0)) FROM {} AS t").format(sql.Identifier(table))
    ).fetchone()
    assert row is not None
    return f"{row[0]} rows, hash {row[1]}"
