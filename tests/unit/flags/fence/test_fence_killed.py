"""The rollback killed between each two of its moves: authority is what the ledger says, its store takes writes, nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest
from ldclient.migrations.types import Origin

from changeover import failpoints
from changeover.errors import LeaseHeld
from changeover.flags.fence.fence import fence, settle
from changeover.jobs.ledger.ledger import Ledger
from changeover.stores.postgres.gate import FENCED
from tests.support.fix_accounts import MAX_PAUSE, assert_nothing_lost, following, unmirrored
from tests.support.fix_migration import Migration

CHILD = """
import sys
from ldclient.migrations.types import Origin
from changeover.flags.fence.fence import fence
from changeover.spec import load
fence(load(sys.argv[1]), Origin.OLD, max_pause=float(sys.argv[2]))
"""

BEFORE = ("fence-freeze", "fence-position", "fence-compare", "fence-await", "fence-final")
AFTER = ("fence-record", "fence-raise-floor")
"""Where it is killed: behind each move, and between the last two before the record; the record is what parts them."""

Done = TypeVar("Done")

WRITE = {"old": b"UPDATE accounts SET note = %s WHERE id = 1", "new": b"UPDATE ledgers SET note = %s WHERE id = 1"}


def killed_at(migration: Migration, point: str, file: Path) -> None:
    """Begin the rollback in a process of its own, and kill -9 it at a point."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, migration.spec.path, str(MAX_PAUSE)],
        env={**os.environ, failpoints.VARIABLE: f"{point}:{file}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + MAX_PAUSE
    while not file.exists():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline, f"{point} was never reached"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()


def again(act: Callable[[], Done]) -> Done:
    """Act when the killed command's lease is free; the server may end its session a little later."""
    deadline = time.monotonic() + MAX_PAUSE
    while True:
        try:
            return act()
        except LeaseHeld:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def authority(migration: Migration) -> str:
    with Ledger.open(migration.spec, "test") as ledger:
        return ledger.authority().store


def assert_one_takes_writes(migration: Migration, store: str, note: str) -> None:
    """Assert that a store takes a write now, and that the other one refuses it."""
    sessions = {"old": migration.old, "new": migration.new}
    sessions.pop(store).execute(WRITE[store], [note])
    for other, session in sessions.items():
        with pytest.raises(psycopg.Error) as refused:
            session.execute(WRITE[other], ["stale"])
        assert refused.value.sqlstate == FENCED


def test_a_rollback_that_is_killed_between_any_two_moves_is_settled(moved: Migration, tmp_path: Path) -> None:
    with following(moved):
        with unmirrored(moved) as taken:
            for number, point in enumerate(BEFORE + AFTER):
                if authority(moved) == "old":
                    fence(moved.spec, Origin.NEW)
                killed_at(moved, point, tmp_path / f"{number}")
                assert authority(moved) == ("new" if point in BEFORE else "old"), point
                again(lambda: settle(moved.spec))
                assert_one_takes_writes(moved, authority(moved), point)
        assert min(taken["accounts"], taken["ledgers"]) > 20, taken
        assert_nothing_lost(moved, taken)


def test_the_same_command_again_brings_a_killed_rollback_to_its_end(moved: Migration, tmp_path: Path) -> None:
    with following(moved):
        with unmirrored(moved) as taken:
            for number, point in enumerate(("fence-await", "fence-final", "fence-record")):
                fence(moved.spec, Origin.NEW)
                killed_at(moved, point, tmp_path / f"{number}")
                done = again(lambda: fence(moved.spec, Origin.OLD))
                assert (done.store, done.epoch, done.lacking) == ("old", 2 * (number + 1), None)
                assert_one_takes_writes(moved, "old", point)
        assert min(taken["accounts"], taken["ledgers"]) > 20, taken
        assert_nothing_lost(moved, taken)
