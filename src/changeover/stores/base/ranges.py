"""Key ranges that partition a table from minus to plus infinity, bounds chosen and compared by the database.

The bounds come from a sample, so they need no scan and no count; rows beyond the sampled least and greatest keys fall into
the first and last range. A range is the unit of reading; a chunk of the ledger is a range that is loaded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from psycopg import sql

from changeover.errors import CouldNotCheck
from changeover.names import RESERVED
from changeover.session import Connection
from changeover.stores.base.reader import KeyRange

SAMPLE_PER_CHUNK = 200
"""Sampled keys per chunk: chunk sizes then differ by some ten percent."""

SAMPLE_LEAST = 10_000
"""Sampled keys at least: they come page by page, so a few hundred may all lie on a handful of pages, or on none."""


def chunk_count(connection: Connection, schema: str, name: str, rows_per_chunk: int, at_least: int) -> int:
    """Return how many chunks a table gets, from the catalogue's estimate of its rows (driver).

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        rows_per_chunk: About how many rows a chunk is to have.
        at_least: The least number of chunks.

    Returns:
        The number.
    """
    return max(at_least, math.ceil(estimated_rows(connection, schema, name) / rows_per_chunk))


def estimated_rows(connection: Connection, schema: str, name: str) -> int:
    """Return the planner's estimate of a table's rows, scaled to its present size.

    It is never a count(*).

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        About how many rows.
    """
    row = connection.execute(
        "SELECT sum(CASE WHEN c.reltuples > 0 AND c.relpages > 0"
        " THEN c.reltuples / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::int)"
        " ELSE pg_relation_size(c.oid) / 100 END) FROM pg_class c WHERE c.relkind <> 'p'"
        " AND c.oid IN (SELECT %(table)s::regclass UNION ALL SELECT relid FROM pg_partition_tree(%(table)s::regclass))",
        {"table": sql.Identifier(schema, name).as_string(connection)},
    ).fetchone()
    return int(row[0]) if row and row[0] else 0


def plan_ranges(connection: Connection, schema: str, name: str, key: Sequence[str], count: int) -> list[KeyRange]:
    """Return ranges that partition the key's order (driver).

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        key: The key's columns, in its order.
        count: How many ranges; a small table has fewer.

    Returns:
        (lower bound or None, upper bound or None) in key order, bounds as texts.
    """
    estimate = max(estimated_rows(connection, schema, name), 1)
    percent = min(100.0, 100.0 * max(count * SAMPLE_PER_CHUNK, SAMPLE_LEAST) / estimate)
    columns = sql.SQL(", ").join(sql.Identifier(column) for column in key)
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(column)) for column in key)
    rows = connection.execute(
        sql.SQL(
            "SELECT {texts} FROM (SELECT {columns}, {tile}, lag({tile}) OVER (ORDER BY {columns}) AS {before}"
            " FROM (SELECT {columns}, ntile({count}) OVER (ORDER BY {columns}) AS {tile}"
            " FROM {table} TABLESAMPLE SYSTEM ({percent})) AS sample) AS tiled WHERE {tile} <> {before} ORDER BY {tile}"
        ).format(
            texts=texts,
            columns=columns,
            count=sql.Literal(count),
            table=sql.Identifier(schema, name),
            percent=sql.Literal(percent),
            tile=sql.Identifier(f"{RESERVED}tile"),
            before=sql.Identifier(f"{RESERVED}before"),
        )
    ).fetchall()
    return ranges_between([tuple(row) for row in rows])


def ranges_between(bounds: Sequence[tuple[str, ...]]) -> list[KeyRange]:
    """Return the ranges that increasing bounds cut the key's order into; no bound gives the one infinite range."""
    edges: list[tuple[str, ...] | None] = [None, *bounds, None]
    return list(pairwise(edges))


def require_partition(table: str, ranges: Sequence[KeyRange], owner: str = "") -> None:
    """Prove that ranges partition the key's order: no gap, no overlap, open at both ends (pure).

    Args:
        table: The table's name, for the error.
        ranges: The ranges, in key order.
        owner: To what they belong, such as a side of a comparison, for the error.

    Raises:
        CouldNotCheck: They do not.
    """
    named = f"{owner} ranges".lstrip()
    if not ranges or ranges[0][0] is not None or ranges[-1][1] is not None:
        raise CouldNotCheck(table, f"the {named} do not reach from minus to plus infinity")
    for number, (left, right) in enumerate(pairwise(ranges)):
        if left[1] is None or left[1] != right[0]:
            raise CouldNotCheck(table, f"there is a gap or an overlap between the {named} {number} and {number + 1}")
