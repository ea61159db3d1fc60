"""A whole migration beside a live writer: after it stops, both targets equal the source."""

from __future__ import annotations

from tests.support.fix_migration import LAKE, STORE, Migration
from tests.support.fix_writer import writing


def test_equal_after_a_migration_beside_a_live_writer(migration: Migration, old_dsn: str) -> None:
    with writing(old_dsn) as writer:
        migration.prepare()
        migration.catch_up()
        migration.backfill(STORE)
        migration.catch_up()
        migration.backfill(LAKE)
        migration.catch_up()
    migration.catch_up()
    assert writer.writes
    migration.assert_equal()
