"""Read differences: the last shadow reads that mismatched, as routers put them on record beside the verdicts.

A router holds whole answers and knows no column of them, so it can mask none. What is kept names the read and holds no value: its
experiment, when and at which stage, and where the authority's log was. `description` is the experiment's own word. The last
hundred of a migration are kept. Runs in the application, by any role that has a router's rights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import class_row

from changeover.session import Connection

KEPT = 100
"""Read differences of a migration that are kept: they are a sample, and the counts are in the heartbeats."""

DESCRIPTION = 200
"""Characters of a description that are kept."""


@dataclass(frozen=True)
class ReadDifference:
    """A shadow read that mismatched: which kind of read, at which stage, and how often both stores were looked at.

    `position` is where the authority's log was when that store was read last, None where it was judged by the clock. `at` is when
    it was put on record, by the ledger's clock.
    """

    experiment: str
    stage: str
    authority: str
    looks: int
    position: str | None
    description: str | None
    at: datetime | None = None

    def __str__(self) -> str:
        named = f" ({self.description})" if self.description else ""
        return f"{self.experiment}{named} at {self.stage}"


def record(ledger: Connection, migration: str, differences: Sequence[ReadDifference]) -> None:
    """Put mismatched reads on record, and take those off that are more than are kept (application).

    Args:
        ledger: A session with the ledger.
        migration: The migration's name.
        differences: The reads, oldest first.
    """
    with ledger.transaction(), ledger.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO changeover.read_difference (migration, experiment, stage, authority, looks, position, description)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [[migration, d.experiment, d.stage, d.authority, d.looks, d.position, d.description and d.description[:DESCRIPTION]]
             for d in differences],
        )  # fmt: skip
        cursor.execute(
            "DELETE FROM changeover.read_difference WHERE migration = %s AND entry <= (SELECT entry"
            " FROM changeover.read_difference WHERE migration = %s ORDER BY entry DESC OFFSET %s LIMIT 1)",
            [migration, migration, KEPT],
        )


def recorded(ledger: Connection, migration: str) -> list[ReadDifference]:
    """Return the mismatched reads on record.

    Args:
        ledger: A session with the ledger.
        migration: The migration's name.

    Returns:
        The reads, newest first.
    """
    with ledger.cursor(row_factory=class_row(ReadDifference)) as cursor:
        return cursor.execute(
            "SELECT experiment, stage, authority, looks, position::text, description, at FROM changeover.read_difference"
            " WHERE migration = %s ORDER BY entry DESC LIMIT %s",
            [migration, KEPT],
        ).fetchall()
