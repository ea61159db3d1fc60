"""The work folder full, gone or not writable: one sentence that names it; capture waits, and goes on when it takes what comes.

A limit on the size of files stands for a full disk: a process may be given more of it while it runs, on every machine and by any
user. What a full disk itself says is asked of `/dev/full`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from changeover.cli.main import main
from changeover.errors import FolderFailed
from changeover.files.folders import sync
from changeover.files.trouble import trouble, trouble_in, working
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.spool import table as spooling
from changeover.jobs.spool.events import INSERT, Event
from changeover.jobs.spool.table import Spool
from changeover.spark.failures import translated
from tests.support.fix_migration import STORE, MakeMigration, Migration

T = '[[table]]\nsource = "public.t"\ntarget = "t2"\nkey = ["id"]\n'
DDL = "CREATE TABLE t (id int PRIMARY KEY, v text)"
FILL = "INSERT INTO t SELECT i, md5(i::text) || md5((i * 7)::text) FROM generate_series({0}, {0} + 20000) i"
PATIENCE = 120.0


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Capture:
    """The command `capture` in a process of its own, with what it says on standard error, one JSON object a line."""

    def __init__(self, migration: Migration, *, limit: int | None = None) -> None:
        def small_files() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        self.said = migration.spec.work.parent / "said"
        program = [sys.executable, "-m", "changeover.cli.main", "capture", "--log-format", "json", migration.spec.path]
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=said, preexec_fn=small_files)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said.read_text().splitlines()]

    def troubles(self) -> list[str]:
        return [line["message"] for line in self.lines() if line["level"] in ("warning", "error")]

    def room(self) -> None:
        """Take the limit away."""
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def end(self) -> int:
        self.process.terminate()
        self.process.wait(PATIENCE)
        return self.process.returncode or 0


@pytest.fixture(params=["slot", "trigger"])
def prepared(make_migration: MakeMigration, request: pytest.FixtureRequest) -> Migration:
    made = make_migration(T, DDL, targets=(STORE,), kind=request.param)
    made.prepare()
    return made


def events(migration: Migration) -> int:
    return len(migration.spool().events())


def waiting(migration: Migration) -> list[str]:
    """Return what is on record of capture, newest first."""
    with Ledger.open(migration.spec, "test") as ledger:
        return [outcome for _, _, outcome, _ in ledger.audits("capture")]


def test_capture_waits_for_room_and_goes_on(prepared: Migration) -> None:
    prepared.old.execute("INSERT INTO t VALUES (0, 'small')")
    spool = prepared.spec.work / "spool"
    capture = Capture(prepared, limit=100_000)
    try:
        until(lambda: events(prepared) == 1)
        prepared.old.execute(FILL.format(1).encode())
        until(lambda: "waiting" in waiting(prepared))
        full = f"{spool} can't be written or read (File too large): make room there"
        assert [said.startswith(full) for said in capture.troubles()] == [True]
        told = CliRunner().invoke(main, ["status", "--check", prepared.spec.path])
        assert told.exit_code == 1
        assert f"(waiting since {datetime.now(UTC):%Y-%m-%d}" in told.stdout
        assert full in told.stdout
        assert events(prepared) == 1
        assert not [path for path in spool.glob("*.parquet") if path.stat().st_size == 100_000], "what did not fit is removed"
        capture.room()
        until(lambda: events(prepared) == 20_002)
        until(lambda: waiting(prepared)[0] == "started")
        # gone, as a disk is that was taken away, and back again
        elsewhere = prepared.spec.work.with_name("elsewhere")
        spool.rename(elsewhere)
        prepared.old.execute("INSERT INTO t VALUES (-1, 'while it was away')")
        until(lambda: waiting(prepared)[0] == "waiting")
        assert f"{spool} can't be written or read (" in capture.troubles()[-1]
        elsewhere.rename(spool)
        until(lambda: events(prepared) == 20_003)
    finally:
        code = capture.end()
    assert code == 130
    assert len(capture.troubles()) == 2, "each trouble once"
    assert {(line["migration"], line["step"]) for line in capture.lines()} == {(prepared.spec.name, "capture")}


def write_to_a_full_disk(rows: pa.Table) -> None:
    with open("/dev/full", "wb") as device:  # by its name Arrow would remove it
        pq.write_table(rows, device)


def test_a_folder_that_takes_nothing_is_one_sentence(tmp_path: Path) -> None:
    rows = pa.table({"v": ["x" * 100_000]})
    with pytest.raises(FolderFailed, match=r"/the/lake can't be written or read \(No space left on device\)"), working("/the/lake"):
        write_to_a_full_disk(rows)
    with pytest.raises(FolderFailed, match=r"No space left on device"), working("/the/lake"):
        raise DeltaError("Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FolderFailed, match=r"Not a directory"), working("/the/lake"):
        (tmp_path / "file" / "table").mkdir()
    write_deltalake(tmp_path / "table", rows)
    table = DeltaTable(tmp_path / "table")
    shutil.rmtree(tmp_path / "table")
    with pytest.raises(FolderFailed, match=r"No such file or directory"), working(tmp_path / "table"):
        table.create_write_transaction([], mode="append", schema=table.schema())
    with pytest.raises(DeltaError), working(tmp_path):
        raise DeltaError("another writer was there (version 28)")
    assert trouble(ValueError("No space left on device (os error 28)")) is None
    assert trouble_in("java.io.IOException: No space left on device\n\tat sun.nio.ch") == "No space left on device"
    assert trouble_in("java.io.EOFException") is None
    scratch = translated("Job aborted: java.io.IOException: No space left on device", "t", "the comparison")
    assert str(scratch).startswith(
        "table t, the comparison: Spark's scratch folder (spark.local.dir) can't be written or read (No space"
    )
    failed = translated("[TASK_WRITE_FAILED] Task failed while writing rows to file:/the/lake/t2. SQLSTATE: 58030", "t", "changes")
    assert (type(failed), str(failed).partition(" can't")[0]) == (FolderFailed, "/the/lake/t2")


def test_a_commit_whose_log_entry_was_not_synced_is_made_durable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool")
    spool.create()
    failing = iter([errno.EIO])

    def broken(path: Path) -> None:
        if path.suffix == ".json" and (number := next(failing, None)) is not None:
            raise OSError(number, os.strerror(number))
        sync(path)

    monkeypatch.setattr(spooling, "sync", broken)
    event = Event("public.t", 100, 0, INSERT, (("id",), ("1",)), None, (), 1, 0, None)
    with pytest.raises(FolderFailed, match="Input/output error"):
        spool.append([event], 200)
    entry = tmp_path / "spool" / "_delta_log" / f"{1:020d}.json"
    before = (entry.read_bytes(), entry.stat().st_ino)
    spool.settle()
    assert (entry.read_bytes(), entry.stat().st_ino != before[1]) == (before[0], True), "a new file, and no page that failed once"
    spool.append([event], 200)
    assert (len(spool.events()), spool.end()) == (1, 200)


def test_what_can_not_even_begin_says_so(make_migration: MakeMigration) -> None:
    made = make_migration(T, DDL, targets=(STORE,))
    made.spec.work.rename(made.spec.work.with_name("aside"))
    made.spec.work.write_text("a file where the folder should be")
    path = made.spec.work.with_name("aside") / "spec.toml"
    said = CliRunner().invoke(main, ["prepare", str(path)])
    assert (said.exit_code, said.stdout) == (3, "")
    assert said.stderr.startswith(f"changeover: {made.spec.work}/logs can't be written or read (Not a directory): make room there")
    assert len(said.stderr.splitlines()) == 1
