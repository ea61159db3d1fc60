"""A snapshot that is lost midway: pending chunks are read in a later one, and the change stream joins the two."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from changeover.errors import SnapshotLost, SourceChanged
from changeover.jobs.source import snapshot
from changeover.jobs.source.snapshot import contains
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres.store import PostgresStore
from tests.support.fix_migration import LAKE, STORE, Migration, load_one_by_one

MEANWHILE = """
DELETE FROM follows WHERE from_user % 7 = 0;
UPDATE follows SET note = 'after the loss' WHERE from_user % 5 = 0;
UPDATE follows SET from_user = from_user + 1000 WHERE from_user % 11 = 0;
INSERT INTO follows (from_user, to_channel) SELECT i, 1 FROM generate_series(200, 260) i
"""


def losing(migration: Migration) -> Callable[[], None]:
    """Return what ends the keepers once, after the first chunk."""
    once = iter([True])

    def lose() -> None:
        if next(once, False):
            assert snapshot.release(migration.spec.source.dsn.resolve(), migration.spec.name) == 2
            migration.old.execute(MEANWHILE)

    return lose


@pytest.mark.parametrize(("kind", "target"), [(PostgresStore, STORE), (DeltaStore, LAKE)], ids=["postgres", "delta"])
def test_pending_chunks_are_read_in_a_new_snapshot(
    migration: Migration, monkeypatch: pytest.MonkeyPatch, kind: type, target: str
) -> None:
    migration.prepare()
    with monkeypatch.context() as patch:
        load_one_by_one(patch, kind, losing(migration))
        with pytest.raises(SnapshotLost, match="run the same command again"):
            migration.backfill(target)
    loaded = [chunk.chunk for chunk in migration.chunks(target) if chunk.loaded]
    assert loaded == [0]
    migration.old.execute("DELETE FROM follows WHERE from_user = 3")
    migration.backfill(target)
    assert all(chunk.loaded for chunk in migration.chunks(target))
    migration.catch_up(target)
    migration.assert_equal(target)
    assert snapshot.release(migration.spec.source.dsn.resolve(), migration.spec.name) == (
        0 if len(migration.spec.targets) == 1 else 2
    )
    migration.abort()


def test_without_its_slot_there_is_nothing_to_join(migration: Migration) -> None:
    migration.prepare()
    snapshot.release(migration.spec.source.dsn.resolve(), migration.spec.name)
    migration.old.execute("SELECT pg_drop_replication_slot(%s)", [migration.spec.slot])
    with pytest.raises(SourceChanged, match="replication slot"):
        migration.backfill()


@pytest.mark.parametrize(
    ("later", "earlier", "all_of_it"),
    [
        ("100:100:", "100:100:", True),
        ("90:120:90", "90:100:90", True),
        ("90:120:90", "90:100:", False),
        ("90:120:110,115", "90:100:95", True),
        ("90:99:", "90:100:", False),
        ("95:120:95,96", "90:100:95", False),
    ],
)
def test_a_new_snapshot_must_show_all_that_the_lost_one_showed(later: str, earlier: str, all_of_it: bool) -> None:
    assert contains(later, earlier) is all_of_it
