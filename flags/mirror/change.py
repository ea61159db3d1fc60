"""Changes: the rows that a unit of work wrote, as it tells them to the mirror, and the tables that are mirrored.

A row is whole, and of a deleted row it is the last image. Which rows a statement deleted is told by the server's command tag, and
of which table they are by the result's columns. Runs in the application.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from ldclient.migrations.types import Origin

Cursor = psycopg.Cursor[Any]
Row = Mapping[str, Any]
RowMapping = Callable[[Row], Row | None]
"""Makes the other store's whole row of a whole row; None says that the row isn't carried over."""

ACTION = "merge_action"
"""The column in which MERGE says what it did with a row."""

VERBS = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})


@dataclass(frozen=True)
class TableMapping:
    """What makes a row of one store a row of the other, for one table, in each direction."""

    to_new: RowMapping
    to_old: RowMapping


@dataclass(frozen=True)
class MirroredTable:
    """A table that the application mirrors: its name in each store, its mappings, and the columns of tenants, if there are any."""

    old: str
    new: str
    to_new: RowMapping
    to_old: RowMapping
    old_tenant: str | None = None
    new_tenant: str | None = None

    def name(self, origin: Origin) -> str:
        """Return the table's name in a store.

        Args:
            origin: The store.

        Returns:
            The name, with its schema.
        """
        return self.old if origin is Origin.OLD else self.new

    def mapping(self, origin: Origin) -> RowMapping:
        """Return what makes a store's row of one of the other store.

        Args:
            origin: The store whose rows are made.

        Returns:
            The mapping.
        """
        return self.to_old if origin is Origin.OLD else self.to_new

    def tenant(self, origin: Origin) -> str | None:
        """Return the column of a store's table in which a row's tenant stands.

        Args:
            origin: The store.

        Returns:
            The column, None where all rows move at once.
        """
        return self.old_tenant if origin is Origin.OLD else self.new_tenant


@dataclass(frozen=True)
class Change:
    """A row as the store returned it, every column of it; of a deleted row the last image.

    `table` names its table, by the old store's name or by the new one's. `relation` does so by the server's number, which
    `returned` has from the result. A router that mirrors one table needs neither.
    """

    row: Row
    deleted: bool = False
    table: str = ""
    relation: int = 0


def returned(cursor: Cursor, *, table: str = "") -> list[Change]:
    """Return the rows of statements with `RETURNING *` as changes: of all result sets from the cursor's present one on.

    Args:
        cursor: The cursor that ran an INSERT, UPDATE, DELETE or MERGE, or several, as by `executemany(..., returning=True)`.
        table: The table, where a statement names a view of it; elsewhere the result tells.

    Returns:
        One change a row, in the statements' order. What a DELETE returned is deleted, by the command tag.

    Raises:
        TypeError: The rows are of something else, of several tables, or of a MERGE that does not say what it deleted.
    """
    changes = _of_one(cursor, table)
    while cursor.nextset():
        changes += _of_one(cursor, table)
    return changes


def _of_one(cursor: Cursor, table: str) -> list[Change]:
    """Return the changes of the cursor's present result set; none of a statement that returns no rows."""
    if cursor.description is None:
        return []
    verb = (cursor.statusmessage or "").partition(" ")[0]
    names = [column.name for column in cursor.description]
    if verb not in VERBS:
        raise TypeError(f"returned() takes the rows of INSERT, UPDATE, DELETE or MERGE: {verb} does not tell which are deleted")
    relations = _relations(cursor)
    if len(relations) > 1 or len(set(names)) < len(names):
        raise TypeError(f"{verb} returned columns of several tables, or two of one name: write RETURNING the_table.*")
    if verb == "MERGE" and ACTION not in names:
        raise TypeError(f"MERGE does not tell which rows it deleted: write RETURNING {ACTION}(), the_table.*")
    (relation,) = relations or (0,)
    changes = []
    for row in cursor.fetchall():
        whole = dict(row if isinstance(row, dict) else zip(names, row, strict=True))
        action = whole.pop(ACTION) if verb == "MERGE" else verb
        changes.append(Change(whole, action == "DELETE", table, relation))
    return changes


def _relations(cursor: Cursor) -> set[int]:
    """Return the tables whose columns a result has, by the server's numbers; an expression is of none."""
    result = cursor.pgresult
    return set() if result is None else {result.ftable(place) for place in range(result.nfields)} - {0}
