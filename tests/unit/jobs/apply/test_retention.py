"""Replay collects by itself once a table is closed, by position and on the record; `finalize` leaves nothing but the record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from changeover.jobs.apply import retention
from changeover.jobs.apply.retention import epoch_to_come
from changeover.jobs.finalize import finalize
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import LEDGER_TABLES, Authority
from changeover.jobs.status import status
from changeover.session import Connection
from changeover.verifiers.explain import explain
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, STORE, MakeMigration, Migration

SEED = "INSERT INTO follows (from_user, to_channel, note) SELECT i, i, 'seed' FROM generate_series(1, 200) i"

OBJECTS = """
SELECT format('schema %s', nspname) FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'
UNION ALL SELECT format('%s %s.%s', relkind, nspname, relname) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname !~ '^(pg_|information_schema)'
UNION ALL SELECT format('type %s.%s', nspname, typname) FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace
    WHERE nspname !~ '^(pg_|information_schema)'
UNION ALL SELECT format('function %s', p.oid::regprocedure) FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE nspname !~ '^(pg_|information_schema)'
UNION ALL SELECT format('trigger %s on %s', tgname, tgrelid::regclass) FROM pg_trigger
UNION ALL SELECT format('event trigger %s', evtname) FROM pg_event_trigger
UNION ALL SELECT format('publication %s', pubname) FROM pg_publication
UNION ALL SELECT format('subscription %s', subname) FROM pg_subscription
UNION ALL SELECT format('origin %s', roname) FROM pg_replication_origin
UNION ALL SELECT format('slot %s', slot_name) FROM pg_replication_slots WHERE database = current_database()
UNION ALL SELECT format('settings of %s', setrole) FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase
    WHERE datname = current_database()
UNION ALL SELECT format('columns of %s: %s', attrelid::regclass, string_agg(attname, ' ' ORDER BY attnum)) FROM pg_attribute
    WHERE attnum > 0 AND attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace) GROUP BY attrelid
"""


def objects(connection: Connection) -> set[str]:
    """Return everything that somebody has made in a database."""
    return {row[0] for row in connection.execute(OBJECTS).fetchall()}


def kept(migration: Migration) -> int:
    row = migration.new.execute('SELECT count(*) FROM changeover."versions_public.associations"').fetchone()
    assert row is not None
    return int(row[0])


def collections(migration: Migration) -> list[Mapping[str, Any]]:
    with Ledger.open(migration.spec, "test") as ledger:
        return [detail for _, _, outcome, detail in ledger.audits("collect") if outcome == "done"]


def replay_until_collected(migration: Migration) -> None:
    """Replay, as often as the server's estimate needs to be that of now."""
    deadline = time.monotonic() + 120
    while kept(migration):
        assert time.monotonic() < deadline
        migration.replay()


def late_write(migration: Migration, user: int, at: str) -> bool:
    """Offer a row as an application whose mirror is late."""
    row = migration.new.execute(
        'SELECT changeover."gate_public.associations"(0, %s, -1, false, jsonb_populate_record(NULL::associations,'
        " jsonb_build_object('entity_a', %s, 'kind', 'follows', 'entity_b', %s, 'created_at', now(), 'updated_at', now())))",
        [at, user, user],
    ).fetchone()
    assert row is not None
    return bool(row[0])


def test_replay_collects_once_the_table_is_closed_and_finalize_leaves_nothing(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ENOUGH", 1)
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, SEED, targets=[STORE])
    before = objects(made.old), objects(made.new)
    made.prepare()
    made.old.execute("UPDATE follows SET note = 'before' WHERE from_user <= 5; DELETE FROM follows WHERE from_user = 6")
    made.catch_up()
    made.replay()
    assert kept(made) == 6, "images are pending, which a raised floor would refuse"
    assert collections(made) == []
    made.backfill()
    row = made.old.execute(
        "UPDATE follows SET note = 'after' WHERE from_user = 7 RETURNING pg_current_wal_insert_lsn()::text"
    ).fetchone()
    assert row is not None
    made.old.execute("DELETE FROM follows WHERE from_user = 7")
    made.catch_up()
    assert late_write(made, 7, row[0]) is False, "by its tombstone"
    replay_until_collected(made)
    told = collections(made)
    assert sum(one["rows"] for one in told) == 7
    assert {(one["target"], one["table"]) for one in told} == {(STORE, "public.follows")}
    assert late_write(made, 7, row[0]) is False, "by the floor"
    assert late_write(made, 6, row[0]) is False
    made.assert_equal()
    assert [load["row_versions"] for load in status(made.spec).loads] == [0]
    [cell] = [part for name, part in explain(made.spec, ["7", "follows", "7"]).parts.items() if name == "store cell"]
    assert cell == f"no live write touched it above {told[0]['upto']}"
    made.old.execute(
        "INSERT INTO follows (from_user, to_channel, note) VALUES (7, 7, 'again'); DELETE FROM follows WHERE from_user = 8"
    )
    made.catch_up()
    made.assert_equal()
    finalize(made.spec)
    assert objects(made.old) == before[0]
    left = objects(made.new) - before[1]
    ours = {one for one in left if "changeover" in one and not any(f"changeover.{table}" in one for table in LEDGER_TABLES)}
    assert ours <= {"schema changeover", *(one for one in ours if one.startswith("type changeover._"))}
    assert not [one for one in left if one.startswith(("function", "trigger", "event", "publication", "slot", "origin"))
                and "RI_ConstraintTrigger" not in one]  # fmt: skip
    finalize(made.spec)


def test_a_table_that_its_owner_dropped_leaves_nothing_either(make_migration: MakeMigration) -> None:
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, SEED, targets=[STORE])
    made.prepare()
    made.backfill()
    made.new.execute("DROP TABLE associations CASCADE")
    finalize(made.spec)
    assert not [one for one in objects(made.new) if "versions" in one or "gate" in one]


def test_the_epoch_is_that_of_the_old_stores_stream() -> None:
    def moved(epoch: int, store: str, at: int) -> Authority:
        return Authority(epoch, store, at, datetime.now(UTC), 0.1)

    log = [moved(1, "new", 500), moved(2, "old", 900)]
    assert [epoch_to_come(log, applied) for applied in (0, 499, 500, 899, 900, 1000)] == [0, 0, 0, 0, 2, 2]
    assert epoch_to_come(log[:1], 500) == 0
    assert epoch_to_come([], 500) == 0


def test_no_tenant_still_writes_below_the_epoch_of_the_floor() -> None:
    def moved(epoch: int, store: str, at: int, *names: str) -> Authority:
        return Authority(epoch, store, at, datetime.now(UTC), 0.1, tenants=frozenset(names) if names else None)

    log = [moved(1, "new", 500, "7"), moved(2, "old", 900, "7"), moved(3, "new", 1000), moved(4, "old", 1200, "7")]
    assert epoch_to_come(log[:2], 950) == 0, "the others still write under the first epoch, whatever tenant 7 does"
    assert epoch_to_come(log[:3], 950) == 0, "and did so up to their own fence"
    assert epoch_to_come(log[:3], 1100) == 2, "nobody writes there any more: what was touched may go"
    assert epoch_to_come(log, 1150) == 2
    assert epoch_to_come(log, 1200) == 4
