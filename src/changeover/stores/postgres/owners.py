"""Owners: the source key of each live row, kept where nothing proves that no other source row has its target key.

An expression may make one target key of two source rows (`lower(email)`). Of two that are alive one
would overwrite the other without a trace. So each batch and chunk is held against the owners first,
and what meets is refused with both source keys. The owners decide nothing about a cell. Once
authority has moved the application itself writes here, so the source key of a row is no longer
known. Then verification alone looks: it counts the source's rows under each target key. Runs in the
transaction of the rows.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from changeover.errors import RowRefused
from changeover.stores.base.interface import HASHED, LEFT, MEET, OWNER
from changeover.stores.postgres.gate import GatedTable, version_of

SOLE = """
SELECT o.{owner}, b.{owner} FROM {batch} AS b JOIN {owners} AS o ON {same_owner} JOIN {table} AS t ON {same_row}
JOIN changeover.gate AS g ON g.target = {target}
WHERE NOT b._changeover_deleted AND b._changeover_epoch = g.image_epoch AND o.{owner} <> b.{owner}
    AND (o.{owner} LIKE {hashed}) = (b.{owner} LIKE {hashed}) AND o.{owner} <> ALL (coalesce(b.{left}, '{{}}'))
    AND {offered} > (g.epoch, g.lsn, g.ordinal)
    AND NOT EXISTS (SELECT FROM {row_versions} AS d WHERE {same_versions} AND (d._changeover_deleted OR {cell} >= {offered}))
LIMIT 1
"""
"""Puts that will be taken, and would overwrite the live row of a source key that the batch does not delete.

A key that was kept before its column became sensitive, or ceased to be, tells nothing.
"""

GONE = "DELETE FROM {owners} AS o USING {batch} AS b WHERE b._changeover_deleted AND {same_owner}"
TAKEN = """
INSERT INTO {owners} ({key}, {owner}) SELECT {b_key}, b.{owner} FROM {batch} AS b WHERE NOT b._changeover_deleted ORDER BY {b_key}
ON CONFLICT ({key}) DO UPDATE SET {owner} = excluded.{owner}
"""
LOADED = """
INSERT INTO {owners} ({key}, {owner}) SELECT {b_key}, b.{owner} FROM {batch} AS b ORDER BY {b_key} ON CONFLICT DO NOTHING
"""
MEETING = """
SELECT min(b.{owner}), max(b.{owner}) FROM (SELECT {key}, {owner} FROM {batch} UNION SELECT {key}, {owner} FROM {owners}) AS b
GROUP BY {b_key} HAVING count(*) > 1 LIMIT 1
"""


def _composed(statement: str, table: GatedTable, batch: sql.Composable) -> sql.Composed:
    return sql.SQL(statement).format(
        owners=table.owners, table=table.table, row_versions=table.row_versions, batch=batch, target=sql.Literal(table.target),
        owner=sql.Identifier(OWNER), left=sql.Identifier(LEFT), key=table.list(table.key), b_key=table.list(table.key, "b"),
        same_owner=table.same_key("o", "b"), same_row=table.same_key("t", "b"), same_versions=table.same_key("d", "b"),
        offered=version_of("b"), cell=version_of("d"), hashed=sql.Literal(f"%{HASHED}%"),
    )  # fmt: skip


def require_sole(cursor: psycopg.Cursor[Any], table: GatedTable, batch: sql.Composable) -> None:
    """Raise RowRefused where a batch of changes would overwrite the live row of another source key.

    It is asked before any change is applied.
    """
    if table.owned and (met := cursor.execute(_composed(SOLE, table, batch)).fetchone()) is not None:
        raise RowRefused(table.target, f"source keys {met[0]} and {met[1]}", MEET)


def record_changes(cursor: psycopg.Cursor[Any], table: GatedTable, batch: sql.Composable) -> None:
    """Keep the source keys of the changes that were taken, which the batch has left; what was deleted is nobody's."""
    for statement in (GONE, TAKEN) if table.owned else ():
        cursor.execute(_composed(statement, table, batch))


def record_images(cursor: psycopg.Cursor[Any], table: GatedTable, batch: sql.Composable) -> None:
    """Keep the source keys of the images that were inserted."""
    if table.owned:
        cursor.execute(_composed(LOADED, table, batch))


def meeting(cursor: psycopg.Cursor[Any], table: GatedTable, batch: sql.Composable) -> str:
    """Return the source keys of two images that meet, in the batch or in another chunk, for a sentence; nothing if not kept."""
    row = cursor.execute(_composed(MEETING, table, batch)).fetchone() if table.owned else None
    return f"source keys {row[0]} and {row[1]}" if row is not None else ""
