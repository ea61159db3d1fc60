"""The table that is copied: users follow channels, with notification settings, in the order in which they did so.

It holds what a real one holds and what plain JDBC can still carry: a text timestamp, a numeric, an array, jsonb, NULLs
and non-ASCII text. The demo's table (`changeover.demo.schema`) is another one on purpose: it holds what breaks careless copies,
and a party that fails or carries something else has no time to compare. Every party gets a target table made by the same
statement, with its primary key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from psycopg import sql

from changeover.session import Connection

SOURCE = """
CREATE TABLE follows (
    from_user bigint NOT NULL, to_channel bigint NOT NULL, notify boolean NOT NULL, note text, weight numeric(12,4),
    score double precision, tags text[], blocked_on text, created_at timestamptz NOT NULL, settings jsonb,
    PRIMARY KEY (from_user, to_channel))
"""

ROWS = """
INSERT INTO follows SELECT i %% %(users)s + 1, i / %(users)s + 1, i %% 3 = 0,
    CASE i %% 5 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN 'Zoë ☂ "q" \\ back' WHEN 3 THEN E'two\\nlines\\tand tab'
        ELSE 'note ' || i END,
    CASE WHEN i %% 11 = 0 THEN NULL ELSE (i::numeric / 7)::numeric(12,4) END, CASE WHEN i %% 13 > 0 THEN i / 3.0 END,
    CASE i %% 5 WHEN 0 THEN NULL WHEN 1 THEN '{}' WHEN 2 THEN ARRAY['a,b', NULL, '', 'q"x\\y'] ELSE ARRAY['t' || i] END,
    CASE WHEN i %% 6 > 0
        THEN to_char(timestamp '2016-01-01' + i %% 4000000 * interval '1 minute', 'YYYY-MM-DD HH24:MI:SS') END,
    timestamptz '2015-01-01 00:00:00Z' + i * interval '61.000003 seconds',
    jsonb_build_object('push', i %% 2 = 0, 'lang', 'é')
FROM generate_series(0, %(rows)s - 1) AS i
"""

USERS = 5_000


@dataclass(frozen=True)
class Case:
    """One thing to copy: what becomes of the columns (Spark SQL), the target's key, and the kind of store."""

    name: str
    target: str
    key: tuple[str, ...]
    kind: str = "postgres"
    columns: Mapping[str, str] = field(default_factory=dict)
    table: str = ""
    peers: tuple[str, ...] = ("spark_jdbc",)

    def expressions(self) -> dict[str, str]:
        """Return target column -> expression for every column, as the product's transform has them."""
        carried = [name for name in NAMES if name not in {*self.columns, *self.columns.values()}]
        return {**self.columns, **{name: name for name in carried}}


NAMES = (
    "from_user", "to_channel", "notify", "note", "weight", "score", "tags", "blocked_on", "created_at", "settings",
)  # fmt: skip

REST = (
    "notify boolean NOT NULL, note text, weight numeric(12,4), score double precision, tags text[],"
    " created_at timestamptz NOT NULL, settings jsonb"
)

ASSOCIATIONS = {
    "entity_a": "from_user",
    "kind": "'follows'",
    "entity_b": "to_channel",
    "blocked_on": "to_timestamp(blocked_on)",
}

CASES = {
    case.name: case
    for case in (
        Case("identity", "follows_new", ("from_user", "to_channel"), peers=("psql_pipe", "spark_jdbc"),
             table=SOURCE.replace("follows", "follows_new")),
        Case("transformed", "associations", ("entity_a", "kind", "entity_b"), columns=ASSOCIATIONS,
             table=f"CREATE TABLE associations (entity_a bigint, kind text, entity_b bigint, blocked_on timestamptz,"
                   f" {REST}, PRIMARY KEY (entity_a, kind, entity_b))"),
        Case("delta", "associations", ("entity_a", "kind", "entity_b"), kind="delta", columns=ASSOCIATIONS),
    )
}  # fmt: skip


def create_source(connection: Connection, rows: int) -> None:
    """Create and fill the table, and let the server settle, so that the first reader does no other's work."""
    connection.execute(SOURCE)
    connection.execute(ROWS, {"rows": rows, "users": min(USERS, rows)})
    connection.execute("VACUUM (ANALYZE, FREEZE) follows")


def fingerprint(connection: Connection, case: Case) -> str:
    """Return the number of rows of a PostgreSQL target and a sum over all of them, the same for the same rows."""
    columns = sql.SQL(", ").join(map(sql.Identifier, case.expressions()))
    row = connection.execute(
        sql.SQL("SELECT count(*), sum(hashtextextended(ROW({})::text, 0)) FROM {}").format(columns, sql.Identifier(case.target))
    ).fetchone()
    assert row is not None
    return f"{row[0]} rows, hash {row[1]}"
