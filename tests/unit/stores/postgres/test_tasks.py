"""A chunk's task beside a writer with whom it is in a deadlock: the chunk is loaded all the same, once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pyarrow as pa
import pytest

from changeover.errors import DatabaseFailed
from changeover.position import image_version
from changeover.session import Connection, connect
from changeover.stores.base.interface import Counts
from changeover.stores.postgres import gate, tasks
from changeover.stores.postgres.tasks import LoadTask

TABLE = gate.GatedTable("public", "kept", ("id",), ("id", "note"))
WAITING = """
SELECT FROM pg_stat_activity
WHERE wait_event_type = 'Lock' AND application_name LIKE 'test-load%' AND datname = current_database()
"""


@dataclass
class Marked:
    """A mark in a table of the test's own, in the rows' transaction."""

    seen: list[Counts] = field(default_factory=list)

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark."""
        self.seen.append(counts)
        return cursor.execute("UPDATE marked SET loaded = true WHERE chunk = %s AND NOT loaded", [chunk]).rowcount == 1

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Not asked by this store."""
        raise AssertionError

    def identity(self, chunk: int) -> str:
        """Not asked by this store."""
        raise AssertionError


@pytest.fixture
def kept(new_dsn: str) -> Iterator[Connection]:
    with connect(new_dsn, "test") as connection:
        connection.execute(
            "CREATE TABLE kept (id integer PRIMARY KEY, note text); CREATE TABLE marked (chunk integer, loaded boolean)"
        )
        connection.execute("INSERT INTO marked VALUES (7, false)")
        gate.install(connection, TABLE, image_version(100))
        yield connection


def lines(*rows: str) -> Iterator[pa.RecordBatch]:
    return iter([pa.RecordBatch.from_arrays([pa.array([f"{row}\n" for row in rows])], names=["line"])])


def crossed(kept: Connection, dsn: str, task: LoadTask) -> Counts:
    """Load rows 1 and 2 beside a writer that has written 2 and then wants 1: the server ends the task's, the first to wait."""
    with connect(dsn, "test-writer", autocommit=False) as writer, ThreadPoolExecutor(1) as pool:
        writer.execute("INSERT INTO kept VALUES (2, 'in the way')")
        loading = pool.submit(task.load, 7, lines("1,image", "2,image"))
        while not kept.execute(WAITING).fetchall():
            assert not loading.done(), loading.exception()
        writer.execute("SET deadlock_timeout = '20s'")
        writer.execute("INSERT INTO kept VALUES (1, 'in the way')")
        writer.rollback()
        return loading.result()


def test_a_deadlock_does_not_end_the_load(kept: Connection, new_dsn: str) -> None:
    mark = Marked()
    assert crossed(kept, new_dsn, LoadTask(new_dsn, "test-load", TABLE, (7,), mark)) == Counts(2, 2)
    assert mark.seen == [Counts(2, 2)]
    assert kept.execute("SELECT id, note FROM kept ORDER BY id").fetchall() == [(1, "image"), (2, "image")]
    assert kept.execute("SELECT chunk, loaded FROM marked").fetchall() == [(7, True)]


def test_deadlocks_without_end_are_told(kept: Connection, new_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TRIES", 1)
    task = LoadTask(new_dsn, "test-load", TABLE, (7,), Marked())
    with pytest.raises(DatabaseFailed, match=r"loading chunk 7 of .*: deadlock detected"):
        crossed(kept, new_dsn, task)
    assert kept.execute("SELECT FROM kept").fetchall() == []
    assert kept.execute("SELECT chunk, loaded FROM marked").fetchall() == [(7, False)]
