"""Kill: `kill -9` of a backfill at its named points, then the same step again: nothing lost, nothing twice, nothing repeated.

The child is a process group of its own with its own JVM. It runs two migrations of the same table side by side, one into each
kind of target, so that both are killed at the point by one signal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from changeover import failpoints
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, LAKE, NASTY_ROWS, ROWS, STORE, MakeMigration, Migration

CHILD = """
import sys, threading
from changeover.jobs.load import copier as job
from changeover.spark.launch import spark_session
from changeover.spec import load
job.FEWEST_CHUNKS = int(sys.argv[1])
spark = spark_session("killed", cores=6, memory="1g", shuffle_partitions=1)
runs = [threading.Thread(target=job.backfill, args=(load(path), spark)) for path in sys.argv[2:]]
[run.start() for run in runs]
[run.join() for run in runs]
"""
CHUNKS = 3
START_SECONDS = 300
SOURCE_LOST_SECONDS = 120


@contextmanager
def stopped_at(point: str, file: Path, migrations: dict[str, Migration]) -> Iterator[None]:
    """Run the backfills in a child up to a point that both have reached; kill the whole group when the block ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(CHUNKS), *(m.spec.path for m in migrations.values())],
        env={**os.environ, failpoints.VARIABLE: f"{point}:{file}"}, start_new_session=True, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not reached_by_both(file):
            assert child.poll() is None, child.stderr and child.stderr.read()
            assert time.monotonic() < deadline, f"{point} was not reached: {file.exists() and file.read_text()}"
            time.sleep(0.05)
        yield
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


def reached_by_both(file: Path) -> bool:
    places = {line.split()[1].startswith("/") for line in file.read_text().splitlines()} if file.exists() else set()
    return places == {True, False}  # a folder's path, and a table's name


def sessions_end(migration: Migration) -> None:
    """Wait until the server has seen that the killed run's sessions are gone; its keeper stays."""
    deadline = time.monotonic() + SOURCE_LOST_SECONDS
    while migration.old.execute("SELECT FROM pg_stat_activity WHERE application_name LIKE 'changeover:%:backfill%'").fetchall():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def appends(migration: Migration) -> Counter[str]:
    """Return how often each chunk stands in the lake's log."""
    log = (migration.spec.targets[LAKE].folder / "associations" / "_delta_log").glob("*.json")
    actions = [json.loads(line) for commit in log for line in commit.read_text().splitlines()]
    return Counter(action["txn"]["appId"] for action in actions if "txn" in action)


@pytest.mark.parametrize("point", ["chunk-read", "target-committed", "between-chunks"])
def test_a_killed_backfill_goes_on_where_it_was(point: str, make_migration: MakeMigration, tmp_path: Path) -> None:
    one = make_migration(FOLLOWS_TABLE, FOLLOWS, targets=[STORE])
    one.old.execute(NASTY_ROWS, {"rows": ROWS})
    both = {STORE: one, LAKE: make_migration(FOLLOWS_TABLE, targets=[LAKE])}
    for migration in both.values():
        migration.prepare()
    with stopped_at(point, tmp_path / "reached", both):
        one.old.execute("UPDATE follows SET note = 'written meanwhile' WHERE to_channel = 3")
        one.old.execute("DELETE FROM follows WHERE to_channel = 4")
    sessions_end(one)
    done = {target: {row.chunk: row.loaded for row in migration.chunks(target) if row.loaded} for target, migration in both.items()}
    expected = {"chunk-read": (False, False), "target-committed": (True, False), "between-chunks": (True, True)}
    assert (bool(done[STORE]), bool(done[LAKE])) == expected[point]
    assert bool(appends(both[LAKE])) == (point != "chunk-read"), "on Delta the data comes before the ledger"

    for target, migration in both.items():
        [loaded] = migration.backfill()
        after = {row.chunk: row for row in migration.chunks(target)}
        assert loaded.rows == ROWS == sum(row.rows or 0 for row in after.values())
        assert {chunk: after[chunk].loaded for chunk in done[target]} == done[target], "finished chunks are not repeated"
        migration.catch_up()
        migration.assert_equal()
    assert set(appends(both[LAKE]).values()) == {1}
    assert len(appends(both[LAKE])) == len(both[LAKE].chunks(LAKE)) == CHUNKS
