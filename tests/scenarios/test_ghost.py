"""Ghosts: t1 a chunk is read, t2 a row of it is deleted and the delete replayed, t3 the old image is inserted.

The row must not come back. Its twin, the late update, goes through the same schedule. Each rule is taken away once, and the
ghost is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from changeover.errors import LockNotGranted
from changeover.position import Version, image_version
from changeover.session import connect
from changeover.stores.base.interface import VERSION_COLUMNS, TargetTable
from changeover.stores.base.pgtypes import Column
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres import batches, gate
from changeover.stores.postgres.store import PostgresStore
from tests.support.fix_migration import LAKE, STORE, Migration, load_after

DELETED, UPDATED, ADDED = 1, 2, 200
"""Users whose every row is deleted, or updated, or added between the read and the insert."""


def race(migration: Migration, kind: type, monkeypatch: pytest.MonkeyPatch, forget: str = "SELECT 1") -> int:
    """Run the race with the real loader; return how many images a tombstone refused."""
    migration.prepare()

    def meanwhile() -> None:
        migration.old.execute("DELETE FROM follows WHERE from_user = %s", [DELETED])
        migration.old.execute("UPDATE follows SET note = 'newer' WHERE from_user = %s", [UPDATED])
        migration.old.execute("INSERT INTO follows (from_user, to_channel) VALUES (%s, 1)", [ADDED])
        migration.catch_up()
        migration.new.execute(forget.encode())

    load_after(monkeypatch, kind, meanwhile)
    target = STORE if kind is PostgresStore else LAKE
    return sum(load.refused for load in migration.backfill(target))


def rows_of(migration: Migration, user: int, target: str) -> int:
    """Return how many live rows of a user a target has."""
    return sum(row.startswith(f"({user},") for row in migration.target_rows(target))


def test_a_deleted_row_does_not_come_back_to_postgres(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    assert race(migration, PostgresStore, monkeypatch) == 20
    assert rows_of(migration, DELETED, STORE) == 0
    migration.assert_equal(STORE)


def test_without_tombstones_it_would(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    tombstones = 'changeover."versions_public.associations" WHERE _changeover_deleted'
    race(migration, PostgresStore, monkeypatch, forget=f"DELETE FROM {tombstones}")
    assert rows_of(migration, DELETED, STORE) == 20


def test_a_deleted_row_does_not_come_back_to_delta(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    race(migration, DeltaStore, monkeypatch)
    assert rows_of(migration, DELETED, LAKE) == 20, "no event reaches the lake before its last append"
    migration.replay(LAKE)
    migration.assert_equal(LAKE)


def test_a_merge_before_the_append_would_leave_it(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeltaStore, "merges_while_loading", True)
    race(migration, DeltaStore, monkeypatch)
    migration.replay(LAKE)
    assert rows_of(migration, DELETED, LAKE) == 20


# -- the write skew: loader and gate in two sessions, each blind to what the other has not committed

TABLE = TargetTable("public", "kept", (Column("id", "integer", "int", True), Column("note", "text", "string")), ("id",))
GATED = gate.GatedTable("public", "kept", ("id",), ("id", "note"))
V0 = image_version(100)


@contextmanager
def offering(dsn: str, row: str, version: Version | None = None, deleted: bool = False) -> Iterator[psycopg.Cursor]:
    """Open a session whose batch table holds one row: an image, or a change with its version."""
    with connect(dsn, "test-offer", autocommit=False) as connection, connection.cursor() as cursor:
        batches.prepare_batch(cursor, GATED, versions=version is not None)
        columns = ", ".join([*(VERSION_COLUMNS if version else ()), "id", "note"])
        if version:
            row = f"{version.epoch}\t{version.lsn >> 32:X}/{version.lsn & 0xFFFFFFFF:X}\t{version.ordinal}\t{deleted}\t{row}"
        with cursor.copy(f"COPY pg_temp.changeover_batch ({columns}) FROM STDIN".encode()) as copy:
            copy.write(row + "\n")
        yield cursor
        connection.commit()


def test_the_sweep_removes_what_the_write_skew_left(new_dsn: str) -> None:
    with connect(new_dsn, "test") as connection:
        store = PostgresStore("store", new_dsn, "m", "test", connection)
        store.create(TABLE)
        store.install(TABLE, V0)
        with offering(new_dsn, "1\told image") as loader:
            assert batches.load_batch(loader, GATED).taken == 1
            with offering(new_dsn, "1\t\\N", Version(0, 200, 0), deleted=True) as writer:
                batches.apply_batch(writer, GATED)
        ghosts = connection.execute("SELECT note FROM kept").fetchall()
        assert ghosts == [("old image",)], "neither saw the other: the schedule is the race"
        assert store.close(TABLE) == 1
        assert connection.execute("SELECT FROM kept").fetchall() == []
        assert store.close(TABLE) == 0


def test_the_barrier_waits_for_a_loader_that_is_still_open(new_dsn: str) -> None:
    with connect(new_dsn, "test") as connection:
        store = PostgresStore("store", new_dsn, "m", "test", connection)
        store.create(TABLE)
        store.install(TABLE, V0)
        with offering(new_dsn, "1\told image") as loader:
            batches.load_batch(loader, GATED)
            with pytest.raises(LockNotGranted, match=r"barrier of public\.kept"):
                gate.barrier(connection, GATED, "server", tries=1)
        gate.barrier(connection, GATED, "server", tries=1)
