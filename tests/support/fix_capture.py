"""Fixtures of capture: a migration as prepare leaves it, made by plain SQL, and writers whose every transaction is known.

What the spool must hold is told by the writers and by the table, so the judge is not the judged.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from changeover.jobs.capture.service import capture
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import SourceColumn, Stream
from changeover.jobs.source import partitions
from changeover.jobs.source.catalog import source_table
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import Spool
from changeover.jobs.spool.writer import CaptureResult
from changeover.position import parse_lsn
from changeover.session import Connection, connect
from changeover.spec import Spec, load

TABLES = """
CREATE TABLE follows (id integer PRIMARY KEY, name text, tags text[], big text);
CREATE TABLE other (a integer, b text, c text GENERATED ALWAYS AS (upper(b)) STORED, PRIMARY KEY (a, b));
ALTER TABLE follows ALTER big SET STORAGE EXTERNAL;
"""

SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "follows"
target = "follows"
key = ["id"]
[[table]]
source = "public.other"
target = "other"
key = ["a", "b"]
[work]
path = "{work}"
"""

Row = dict[str, Any]


@dataclass
class Prepared:
    """A migration as prepare leaves it, made by plain SQL."""

    spec: Spec
    old: Connection
    ledger: Ledger
    stream: Stream
    markers: int = 0

    @property
    def spool(self) -> Spool:
        """Open the spool anew."""
        return Spool(self.spec.work / "spool")

    def sql(self, *statements: str) -> None:
        """Run statements in one transaction."""
        with self.old.transaction():
            for statement in statements:
                self.old.execute(statement)

    def seen(self, note: str) -> Callable[[], bool]:
        """Return whether a marker has come to stand in the spool."""
        seen = 0

        def look() -> bool:
            nonlocal seen
            before, seen = seen, self.spool.end()
            return seen > before and note in self.spool.events(before).column("note").to_pylist()

        return look

    def catch_up(self, **options: Any) -> CaptureResult:
        """Capture up to a marker of its own."""
        self.markers += 1
        note = f"end {self.markers}"
        emit_marker(self.old, note)
        return capture(self.spec, until=self.seen(note), **options)

    def events(self) -> list[Row]:
        """Return all events but the markers of `catch_up`."""
        rows: list[Row] = self.spool.events().to_pylist(maps_as_pydicts="strict")
        return [row for row in rows if not (row["note"] or "").startswith("end ")]

    def brief(self) -> list[tuple[Any, ...]]:
        """Return the events without their places."""
        return [(e["relation"], e["op"], e["row"], e["key"], e["missing"], e["note"]) for e in self.events()]

    def slot(self, column: str) -> Any:
        """Return what the server says of the slot."""
        query = psycopg.sql.SQL("SELECT {} FROM pg_replication_slots WHERE slot_name = %s")
        row = self.old.execute(query.format(psycopg.sql.SQL(column)), [self.spec.slot]).fetchone()
        return None if row is None else row[0]


def columns_of(connection: Connection, table: str) -> list[SourceColumn]:
    rows = connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.atttypid::bigint, t.typcategory = 'A',"
        " coalesce(a.attnum = ANY (i.indkey), false), a.attnotnull, NULL::integer, a.attnum"
        " FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid"
        " LEFT JOIN pg_index i ON i.indrelid = a.attrelid AND i.indisprimary"
        " WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
        [table],
    )
    return [SourceColumn(*row) for row in rows.fetchall()]


@pytest.fixture
def prepared(any_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepared]:
    with by_hand(any_dsn, new_dsn, tmp_path, monkeypatch, TABLES) as made:
        yield made


@contextmanager
def by_hand(old_dsn: str, new_dsn: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tables: str) -> Iterator[Prepared]:
    """Make a migration of `follows` and `other` as prepare leaves it, with its stream's definition on record."""
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    name = f"t{random.getrandbits(40):x}"
    path = folder / "spec.toml"
    path.write_text(SPEC.format(name=name, work=folder / "work"))
    spec = load(path)
    with connect(old_dsn, "test") as old, Ledger.open(spec, "test") as ledger:
        old.execute(tables.encode())
        old.execute(
            psycopg.sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY follows, ONLY other").format(psycopg.sql.Identifier(spec.slot))
        )
        made = old.execute(
            "SELECT lsn::text, (SELECT system_identifier::text FROM pg_control_system()),"
            " (SELECT timeline_id FROM pg_control_checkpoint())"
            " FROM pg_create_logical_replication_slot(%s, 'pgoutput')",
            [spec.slot],
        ).fetchone()
        assert made is not None
        stream = Stream(parse_lsn(made[0]), made[1], made[2], spec.slot, spec.slot, "none", "none")
        ledger.create()
        ledger.record_migration(spec, stream)
        for table in spec.tables:
            seen = source_table(old, table)
            assert seen is not None
            ledger.record_table(table.source, seen.filenode, columns_of(old, table.source), seen.partitions is not None)
            partitions.record(ledger, table.source, seen.partitions or ())
            for target in spec.targets:
                ledger.record_load(table.source, target, stream.l0, True)
        definition.record(ledger, OLD, assumptions.present(spec, old, spec.slot))
        spec.work.mkdir()
        Spool(spec.work / "spool").create()
        yield Prepared(spec, old, ledger, stream)


def child(spec: Spec, **environment: str) -> subprocess.Popen[str]:
    """Start the entry script as a process of its own."""
    command = [sys.executable, "-m", "changeover.jobs.capture.service", spec.path]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def peak_megabytes(process: subprocess.Popen[str]) -> float:
    """Return the most memory that a process has had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, as long as the process lives."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Writer(threading.Thread):
    """Writes random transactions, and keeps what each that was acknowledged did, by transaction id."""

    def __init__(self, dsn: str, seed: int) -> None:
        super().__init__()
        self.dsn, self.random = dsn, random.Random(seed)
        self.stop = threading.Event()
        self.history: dict[int, list[tuple[str, str, str | None]]] = {}

    def run(self) -> None:
        """Write until told to stop."""
        with connect(self.dsn, "writer") as connection:
            while not self.stop.is_set():
                with connection.transaction(force_rollback=self.random.random() < 0.1) as transaction:
                    row = connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
                    assert row is not None
                    keys = sorted(self.random.choices(range(30), k=self.random.randint(1, 5)))  # sorted: no deadlock
                    done = [change for key in keys for change in self.change(connection, key)]
                if done and not transaction.force_rollback:
                    self.history[row[0]] = done

    def change(self, connection: Connection, key: int) -> list[tuple[str, str, str | None]]:
        """Delete or put one row, and return what that did."""
        name = f"n{self.random.getrandbits(32)}"
        if self.random.random() < 0.3:
            gone = connection.execute("DELETE FROM follows WHERE id = %s RETURNING id", [key]).rowcount
            return [("D", str(key), None)] * gone
        row = connection.execute(
            "INSERT INTO follows VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET name = excluded.name RETURNING xmax = 0",
            [key, name],
        ).fetchone()
        assert row is not None
        return [("I" if row[0] else "U", str(key), name)]


def require_all_of(prepared: Prepared, writers: Sequence[Writer]) -> None:
    """Require that the spool has what the writers did, each transaction once and whole, and that it leads to the table's rows."""
    truth = {xid: done for writer in writers for xid, done in writer.history.items()}
    spooled: dict[int, list[tuple[str, str, str | None]]] = defaultdict(list)
    state: dict[str, str] = {}
    for event in prepared.events():
        image = event["row"] or {}
        key = (event["row"] or event["key"])["id"]
        spooled[event["xid"]].append((event["op"], key, image.get("name")))
        state.pop(key, None) if event["op"] == "D" else state.__setitem__(key, image["name"])
    assert dict(spooled) == truth
    rows = prepared.old.execute("SELECT id::text, name FROM follows").fetchall()
    assert state == {str(key): name for key, name in rows}
