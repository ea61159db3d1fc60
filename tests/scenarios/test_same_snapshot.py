"""Same snapshot: whatever is committed between two chunk reads is in no loaded image."""

from __future__ import annotations

import pytest
from psycopg import sql

from changeover.stores.base import reader
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres.store import PostgresStore
from tests.support.fix_migration import LAKE, STORE, Migration, Rows, load_one_by_one

KINDS = {STORE: PostgresStore, LAKE: DeltaStore}


def images(migration: Migration, target: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Rows, Rows]:
    """Backfill while the source changes in every range between two reads; return (rows at prepare, loaded images)."""
    migration.prepare()
    before = migration.source_rows()
    channels = iter(range(1000, 2000))

    def write() -> None:
        channel = next(channels)
        migration.old.execute("INSERT INTO follows (from_user, to_channel) SELECT u, %s FROM generate_series(0, 101) u", [channel])
        migration.old.execute("UPDATE follows SET note = 'later' WHERE to_channel = 7")
        migration.old.execute("DELETE FROM follows WHERE to_channel = 8")

    load_one_by_one(monkeypatch, KINDS[target], write)
    migration.backfill(target)
    assert len(migration.chunks(target)) > 2
    return before, migration.target_rows(target)


@pytest.mark.parametrize("target", [STORE, LAKE])
def test_a_row_committed_between_two_reads_is_in_no_image(
    migration: Migration, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, loaded = images(migration, target, monkeypatch)
    assert loaded == before


def test_without_the_snapshot_it_would_be(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_session_start", lambda table, snapshot: sql.SQL("SELECT 1"))
    before, loaded = images(migration, STORE, monkeypatch)
    assert set(loaded) - set(before), "rows from after prepare"
    assert set(before) - set(loaded), "rows that were there at prepare"
