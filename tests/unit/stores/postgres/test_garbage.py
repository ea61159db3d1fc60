"""Collection against the rule in Python, beside writers that hold rows, and after a `kill -9` between any two of its steps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from psycopg import sql

from changeover import failpoints
from changeover.jobs.apply.floors import caught_up_floor, collectable, collection_bound
from changeover.position import Version, format_lsn, image_version
from changeover.session import Connection, connect
from changeover.stores.postgres import garbage, gate
from changeover.stores.postgres.garbage import collect
from changeover.stores.postgres.truncate import truncate
from tests.model.gate import collected

V0 = image_version(100)
TABLE = gate.GatedTable("public", "kept", ("id",), ("id", "note"))
BOUND = collection_bound(0, 1000)

Kept = dict[int, tuple[Version, bool]]


@pytest.fixture
def kept(new_dsn: str) -> Iterator[Connection]:
    with connect(new_dsn, "test") as connection:
        connection.execute("CREATE TABLE kept (id integer PRIMARY KEY, note text)")
        gate.install(connection, TABLE, V0)
        yield connection


def offer(connection: Connection, key: int, version: Version, note: str | None = "new") -> bool:
    """Offer one change as an application does; no note is a delete."""
    row = connection.execute(
        'SELECT changeover."gate_public.kept"(%s, %s, %s, %s, ROW(%s, %s)::kept)',
        [version.epoch, format_lsn(version.lsn), version.ordinal, note is None, key, note],
    ).fetchone()
    assert row is not None
    return bool(row[0])


def row_versions(connection: Connection) -> Kept:
    """Return the versions that are kept."""
    rows = connection.execute(
        "SELECT id, _changeover_epoch, (_changeover_lsn - '0/0')::bigint, _changeover_ordinal, _changeover_deleted"
        ' FROM changeover."versions_public.kept"'
    ).fetchall()
    return {row[0]: (Version(row[1], row[2], row[3]), row[4]) for row in rows}


def fill(connection: Connection, rows: int, lsn: int = 200) -> None:
    """Touch many keys at one version, every third of them a tombstone."""
    connection.execute(
        'INSERT INTO changeover."versions_public.kept" SELECT i, 0, %s, i, i %% 3 = 0 FROM generate_series(1, %s) i',
        [format_lsn(lsn), rows],
    )
    connection.execute("INSERT INTO kept SELECT i, 'note' FROM generate_series(1, %s) i WHERE i %% 3 > 0", [rows])


def test_exactly_what_the_rule_says_goes(kept: Connection) -> None:
    versions = [
        Version(0, 200, 0),
        BOUND._replace(ordinal=-5),
        BOUND,
        caught_up_floor(0, 1000),
        Version(0, 1000, 0),
        Version(1, 5, 0),
    ]
    for key, version in enumerate(versions):
        assert offer(kept, key, version, None if key % 2 else "new")
    before = row_versions(kept)
    done = collect(kept, TABLE, BOUND, "server")
    assert done.following is None
    assert row_versions(kept) == {key: cell for key, cell in before.items() if not collected(cell[0], BOUND)}
    assert done.rows == 3
    assert kept.execute("SELECT id FROM kept ORDER BY id").fetchall() == [(0,), (2,), (4,)], "the user's rows are as they were"


def test_the_bound_is_the_highest_that_the_rule_allows() -> None:
    assert collectable(True, 1000, BOUND)
    assert not collectable(True, 1000, BOUND._replace(ordinal=BOUND.ordinal + 1))


def test_a_late_write_below_the_floor_is_refused_where_its_tombstone_is_gone(kept: Connection) -> None:
    assert offer(kept, 1, Version(0, 300, 0))
    assert offer(kept, 1, Version(0, 400, 0), None)
    collect(kept, TABLE, BOUND, "server")
    assert row_versions(kept) == {}
    for late in (Version(0, 300, 0), Version(0, 400, 0), Version(0, 399, -1), BOUND):
        assert not offer(kept, 1, late)
        assert not offer(kept, 2, late), "a key that nobody ever touched has the floor's version too"
    assert kept.execute("SELECT FROM kept").fetchall() == []
    assert offer(kept, 1, Version(0, 1000, 0)), "and what the stream brings next is taken"
    assert row_versions(kept) == {1: (Version(0, 1000, 0), False)}


def test_it_goes_on_in_turns_and_in_batches(kept: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "BLOCKS_PER_BATCH", 4)
    fill(kept, 10_000)
    assert offer(kept, 3, Version(0, 2000, 0))
    place: int | None = 0
    turns = []
    while place is not None:
        done = collect(kept, TABLE, BOUND, "server", block=place, batches=3)
        turns.append(done.rows)
        place = done.following
    assert sum(turns) == 9_999
    assert len(turns) > 3
    assert row_versions(kept) == {3: (Version(0, 2000, 0), False)}


def test_it_waits_for_no_row_and_leaves_what_a_writer_holds(kept: Connection, new_dsn: str) -> None:
    fill(kept, 10)
    with connect(new_dsn, "test-holder", autocommit=False) as holder:
        holder.execute('SELECT FROM changeover."versions_public.kept" WHERE id IN (4, 6) FOR UPDATE')
        assert collect(kept, TABLE, BOUND, "server").rows == 8
        holder.rollback()
    assert set(row_versions(kept)) == {4, 6}
    assert collect(kept, TABLE, BOUND, "server").rows == 2


def test_a_gated_write_under_the_old_floor_has_ended_before_the_first_row_goes(kept: Connection, new_dsn: str) -> None:
    fill(kept, 10)
    with connect(new_dsn, "test-writer", autocommit=False) as writer, ThreadPoolExecutor(1) as pool:
        assert offer(writer, 3, Version(0, 1500, 0))
        collecting = pool.submit(collect, kept, TABLE, BOUND, "server")
        assert not wait([collecting], timeout=0.7).done, "the barrier waits for it"
        assert len(row_versions(writer)) == 10
        writer.commit()
        assert collecting.result().rows == 9
    assert row_versions(kept) == {3: (Version(0, 1500, 0), False)}


def test_a_truncate_waits_for_the_turn(kept: Connection, new_dsn: str) -> None:
    fill(kept, 10)
    with connect(new_dsn, "test-other") as other:
        other.execute("SET lock_timeout = '200ms'")
        kept.execute("SELECT pg_advisory_lock(hashtext('changeover.alone'), hashtext('public.kept'))")
        for work in (lambda: collect(other, TABLE, BOUND, "server"), lambda: truncate(other, TABLE, Version(0, 900, 0), "server")):
            with pytest.raises(Exception, match="lock timeout"):
                work()
    assert len(row_versions(kept)) == 10


CHILD = """
import sys
from changeover.jobs.apply.floors import collection_bound
from changeover.session import connect
from changeover.stores.postgres import garbage
from changeover.stores.postgres import gate
garbage.BLOCKS_PER_BATCH = 4
table = gate.GatedTable("public", "kept", ("id",), ("id", "note"))
with connect(sys.argv[1], "test-child") as connection:
    garbage.collect(connection, table, collection_bound(0, 1000), "server")
"""


@pytest.mark.parametrize("point", ["collect-floor", "collect-barrier", "collect-between", "collect-batch"])
def test_a_killed_collection_is_done_by_the_next(kept: Connection, new_dsn: str, tmp_path: Path, point: str) -> None:
    fill(kept, 3_000)
    file = tmp_path / "reached"
    child = subprocess.Popen([sys.executable, "-c", CHILD, new_dsn], env={**os.environ, failpoints.VARIABLE: f"{point}:{file}"})
    deadline = time.monotonic() + 120
    while not file.exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    left = set(row_versions(kept))
    expected = {"collect-floor": 3_000, "collect-barrier": 3_000, "collect-between": range(1, 3_000), "collect-batch": 0}[point]
    assert len(left) in expected if isinstance(expected, range) else len(left) == expected
    assert not offer(kept, 3, Version(0, 150, 0)), "no older row comes back, whatever is left"
    assert offer(kept, 2_999, Version(0, 1200, 0))
    while kept.execute("SELECT FROM pg_stat_activity WHERE application_name LIKE 'test-child%'").fetchall():
        time.sleep(0.02)
    assert collect(kept, TABLE, BOUND, "server").rows == len(left - {2_999})
    assert row_versions(kept) == {2_999: (Version(0, 1200, 0), False)}
    assert kept.execute("SELECT count(*) FROM kept").fetchone() == (2_000,)


def test_a_batch_reads_its_own_blocks_alone(any_dsn: str) -> None:
    with connect(any_dsn, "test") as connection:
        connection.execute("CREATE TABLE kept (id integer PRIMARY KEY, note text)")
        gate.install(connection, TABLE, V0)
        fill(connection, 20_000)
        for _ in range(2):  # without statistics and with
            plan = [row[0] for row in connection.execute(sql.SQL("EXPLAIN ") + garbage.purge(TABLE, BOUND, 0)).fetchall()]
            assert any("Tid Range Scan" in line for line in plan), plan
            assert not any("Seq Scan" in line for line in plan), plan
            connection.execute('ANALYZE changeover."versions_public.kept"')
        assert collect(connection, TABLE, BOUND, "server").rows == 20_000
