"""A unit of work: the store that serves it, as the application's block or function gets it (application).

For a write it is one transaction of the store that has authority. Where the application mirrors,
the unit says which rows it wrote, and they are offered to the other store after the COMMIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from ldclient.migrations.types import Origin, Stage

from changeover.flags.mirror.change import Change
from changeover.flags.router.endpoint import Cursor
from changeover.position import Version

Value = TypeVar("Value")


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of an error of psycopg, or of one that a framework made of it; None for any other.

    SQLAlchemy and Django raise theirs from psycopg's.

    Args:
        error: The error.

    Returns:
        The five characters, None where there are none.
    """
    while error is not None:
        found = getattr(error, "sqlstate", None)
        if isinstance(found, str):
            return found
        error = error.__cause__
    return None


@dataclass
class Place:
    """Where a unit of work goes: which store it is, at which stage this process acts, and since which move of authority.

    `tenant` is the unit's, as text, None where all rows move at once.
    """

    origin: Origin
    stage: Stage
    epoch: int
    tenant: str | None

    def of(self, old: Value, new: Value) -> Value:
        """Return what belongs to this store, of what there is for the old one and for the new one.

        Args:
            old: The old store's statement, function or other value.
            new: The new store's.

        Returns:
            One of the two.
        """
        return old if self.origin is Origin.OLD else new


@dataclass
class RoutedStore(Place):
    """The store that serves one unit of work, by a cursor of its.

    `version` and `mirrored` are of a write whose rows are mirrored, once it is committed: `mirrored` says that they were queued
    for the other store, not that they are there.
    """

    cursor: Cursor
    changes: list[Change] = field(default_factory=list)
    version: Version | None = None
    mirrored: bool = False

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """Return the session, for more cursors; its transaction is the router's to end."""
        return self.cursor.connection

    def execute(self, statement: Any, parameters: Any = None) -> Cursor:
        """Run a statement on the unit's cursor.

        Args:
            statement: The statement, as psycopg takes it.
            parameters: Its parameters, as psycopg takes them.

        Returns:
            The cursor.

        Raises:
            psycopg.Error: The store refuses it.
        """
        return self.cursor.execute(statement, parameters)

    def mirror(self, changes: Sequence[Change]) -> None:
        """Say which rows were written, for `flag.mirror = "application"`; elsewhere it is not needed, and does nothing.

        A unit that changed more rows of a mirrored table than it says is refused before its COMMIT.

        Args:
            changes: Every row written, whole: `returned(cursor)` after `RETURNING *`. For a key change that is the old row as
                deleted, and the new one.

        Raises:
            TypeError: Something else is given.
        """
        if not isinstance(changes, (list, tuple)) or not all(isinstance(change, Change) for change in changes):
            raise TypeError("mirror() takes a list of Change: `returned(cursor)` after RETURNING *")
        self.changes.extend(changes)
