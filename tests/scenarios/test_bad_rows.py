"""Rows that can't be carried over: each is named by key and column, and once it is corrected the same command goes on."""

from __future__ import annotations

from typing import Any

import pytest

from changeover.errors import ChangeoverError, RowRefused
from changeover.jobs.apply import applier
from changeover.jobs.load import copier
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, lake_rows, rows

OLD = """
CREATE TABLE t (id int, part text, ts text, qty int, note text, amount numeric(12,2), PRIMARY KEY (id, part));
INSERT INTO t SELECT i, 'p', '2020-01-02 03:04:05', i, 'n' || i, i * 1.5 FROM generate_series(1, 60) i;
CREATE TABLE days (id int PRIMARY KEY, day date); INSERT INTO days SELECT i, date '2020-01-01' + i FROM generate_series(1, 30) i
"""

NEW = """
CREATE TABLE t2 (id int, part text, ts timestamptz, qty int CONSTRAINT positive CHECK (qty > 0), note text NOT NULL,
    amount numeric(5,2), PRIMARY KEY (id, part))
"""

TABLES = """
[[table]]
source = "public.t"
target = "t2"
key = ["id", "part"]
[table.columns]
ts = "to_timestamp(ts)"
amount = "cast(amount as decimal(5,2))"
[[table]]
source = "public.days"
target = "days2"
key = ["id"]
"""

MEANWHILE = """
DELETE FROM t WHERE id IN ({0} + 1, {0} - 1); UPDATE t SET note = 'after {0}' WHERE id BETWEEN {0} - 4 AND {0} + 4;
UPDATE t SET id = id + 1000 WHERE id = {0} + 2; INSERT INTO t VALUES ({0} + 2, 'p', '2021-01-01', 1, 'again', 1),
    ({0} + 500, 'p', '2021-01-01', 1, 'new', 1)
"""


@pytest.fixture
def made(make_migration: MakeMigration) -> Migration:
    """Return a migration whose target in PostgreSQL has constraints of its own, and types that an expression casts to."""
    migration = make_migration(TABLES, OLD)
    migration.new.execute(NEW)
    return migration


def refused(step: Any, *expected: str) -> None:
    """Run a step that ends with a sentence for each bad row."""
    with pytest.raises(ChangeoverError) as raised:
        step()
    assert raised.value.exit_code == 3
    assert not isinstance(raised.value, RowRefused) or len(set(expected)) == 1
    for one in expected:
        assert one in str(raised.value), str(raised.value)
    assert "secret" not in str(raised.value), "no value of a row but its key"


def assert_equal(migration: Migration, *targets: str) -> None:
    """Compare both tables by plain SQL, and the lake's by another reader's values."""
    wanted = rows(migration.old.execute(
        "SELECT id, part, ts::timestamptz, qty, note, amount::numeric(5,2)::text FROM t").fetchall())  # fmt: skip
    days = rows(migration.old.execute("SELECT id, day FROM days").fetchall())
    if STORE in targets:
        assert rows(migration.new.execute("SELECT id, part, ts, qty, note, amount::text FROM t2").fetchall()) == wanted
        assert rows(migration.new.execute("SELECT id, day FROM days2").fetchall()) == days
    if LAKE in targets:
        lake = migration.lake("t2").selectExpr("id", "part", "ts", "qty", "note", "cast(amount as string)")
        assert lake_rows(lake) == wanted
        assert lake_rows(migration.lake("days2").select("id", "day")) == days


def pending(migration: Migration) -> list[int]:
    """Return how many chunks of the first table are not loaded, in the store and in the lake, which has no rules of its own."""
    return [sum(not row.loaded for row in migration.chunks(target)) for target in (STORE, LAKE)]


def test_a_chunk_with_a_bad_row_alone_is_read_again_in_a_newer_snapshot(made: Migration) -> None:
    made.old.execute(b"UPDATE t SET ts = 'secret' WHERE id = 33; UPDATE t SET qty = -7 WHERE id = 2")
    made.old.execute("UPDATE days SET day = 'infinity' WHERE id = 7")
    made.prepare()
    qty, day = "table public.t, key (2, p), column qty: ", "table public.days, key (7), column day: "
    refused(made.backfill, "table public.t, key (33, p), column ts: ", qty, day)
    assert pending(made) == [2, 1]
    made.old.execute(b"UPDATE t SET ts = '2020-02-02' WHERE id = 33; DELETE FROM days WHERE id = 7")
    made.old.execute(MEANWHILE.format(33).encode())
    made.catch_up(STORE)
    refused(made.backfill, qty)
    assert pending(made) == [1, 0]
    made.old.execute("DELETE FROM t WHERE id = 2")
    made.old.execute(MEANWHILE.format(20).encode())
    made.catch_up(STORE)
    made.backfill()
    made.catch_up()
    assert_equal(made, STORE, LAKE)


def test_a_rule_that_fails_everywhere_ends_after_a_few_chunks(made: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "MOST_NAMED", 2)
    made.old.execute("UPDATE t SET qty = -qty")
    made.prepare()
    with pytest.raises(ChangeoverError) as raised:
        made.backfill(STORE)
    assert str(raised.value).count("column qty: ") == 2
    made.old.execute("UPDATE t SET qty = abs(qty)")
    made.backfill(STORE)
    made.catch_up(STORE)
    assert_equal(made, STORE)


def test_replay_goes_on_when_a_bad_row_was_corrected(made: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    made.prepare()
    made.backfill()
    monkeypatch.setattr(applier, "BATCH_EVENTS", 1)  # a correction is in a later batch
    for change in ("UPDATE t SET ts = 'secret' WHERE id = 5", "UPDATE t SET qty = -7 WHERE id = 6",
                   "UPDATE t SET note = 'fine' WHERE id > 50", "UPDATE days SET day = 'infinity' WHERE id = 8",
                   "INSERT INTO t VALUES (70, 'p', NULL, 1, 'new', 99999)", "INSERT INTO days VALUES (90, 'today')"):  # fmt: skip
        made.old.execute(change.encode())
        made.capture()
    refused(lambda: made.replay(STORE), "table public.t, key (5, p), column ts: ")
    made.old.execute("UPDATE t SET ts = '2020-02-02' WHERE id = 5")
    refused(lambda: made.catch_up(STORE), "table public.t, key (6, p), column qty: ")
    made.old.execute("DELETE FROM t WHERE id = 6")
    refused(lambda: made.catch_up(STORE), "table public.t, key (70, p), column amount: ")
    made.old.execute("UPDATE t SET id = 71, amount = 2, note = 'moved' WHERE id = 70")
    monkeypatch.setattr(applier, "BATCH_EVENTS", 3)  # a lake's MERGE takes seconds
    refused(lambda: made.catch_up(LAKE), "table public.days, key (8), column day: ")
    made.old.execute("UPDATE days SET day = 'today' WHERE id = 8")
    made.catch_up()
    assert_equal(made, STORE, LAKE)
    made.old.execute("UPDATE t SET ts = 'secret' WHERE id = 9")
    made.capture()
    made.old.execute("TRUNCATE t; INSERT INTO t VALUES (9, 'p', '2022-02-02', 1, 'after', 1)")
    made.catch_up()
    assert_equal(made, STORE, LAKE)
