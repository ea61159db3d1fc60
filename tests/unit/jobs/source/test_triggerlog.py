"""Capture by a trigger log on real servers that don't decode: every change once and in order, whatever is killed or altered."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin
from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.demo.schema import DDL
from changeover.embedded.server import EmbeddedServer
from changeover.errors import SourceChanged, SpoolGap
from changeover.flags.mirror.written import _ticked
from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.shadow.positions import LedgerPositions
from changeover.jobs.capture import trigger
from changeover.jobs.capture.service import capture
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Stream
from changeover.jobs.preflight.rules import preflight
from changeover.jobs.source import ticks, triggerlog
from changeover.jobs.source.catalog import source_table
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.source.triggerlog import Log
from changeover.jobs.spool import writer
from changeover.jobs.spool.table import Spool
from changeover.jobs.spool.writer import CaptureResult
from changeover.jobs.status import status
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres.gate import MARK, OURS
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import NASTY_ROWS
from tests.support.fix_postgres import binaries_by_major, default_binaries, fresh_database, passing_server

Row = dict[str, Any]

SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
capture = "{capture}"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
{tables}
[work]
path = "{work}"
"""
TABLE = '[[table]]\nsource = "public.{0}"\ntarget = "{0}"\nkey = {1}\n'

COUNTERS = """
CREATE TABLE counters (id integer PRIMARY KEY, n integer NOT NULL, stamp text NOT NULL);
CREATE TABLE other (a integer, b text, PRIMARY KEY (a, b));
"""
COUNTERS_TABLES = TABLE.format("counters", '["id"]') + TABLE.format("other", '["a", "b"]')


@pytest.fixture(scope="module", params=sorted(binaries_by_major()), ids=lambda major: f"pg{major}")
def replica_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    with passing_server(binaries_by_major()[request.param], wal_level="replica") as running:
        yield running


@dataclass
class Logged:
    """A migration as prepare leaves it, made without Spark, and the state of its first snapshot."""

    spec: Spec
    old: Connection
    stream: Stream
    first: dict[str, list[tuple[Any, ...]]]
    markers: int = 0
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        """Name the log."""
        self.log = Log(self.spec.name)

    @property
    def spool(self) -> Spool:
        """Open the spool anew."""
        return Spool(self.spec.work / "spool")

    def sql(self, *statements: str) -> None:
        """Run statements in one transaction."""
        with self.old.transaction():
            for statement in statements:
                self.old.execute(sql.SQL(statement))

    def catch_up(self, **options: Any) -> CaptureResult:
        """Capture up to a marker of its own."""
        self.markers += 1
        note = f"end {self.markers}"
        emit_marker(self.old, note)
        return capture(self.spec, until=lambda: note in self.spool.events().column("note").to_pylist(), **options)

    def events(self) -> list[Row]:
        """Return all events but the markers of `catch_up`."""
        rows: list[Row] = self.spool.events().to_pylist(maps_as_pydicts="strict")
        return [row for row in rows if not (row["note"] or "").startswith("end ")]

    def brief(self) -> list[tuple[Any, ...]]:
        """Return the events without their places."""
        return [(e["relation"], e["op"], e["row"], e["key"], e["missing"], e["note"]) for e in self.events()]


@contextmanager
def logged(dsn: str, folder: Path, ddl: str, tables: str, *, kind: str = "trigger", before: str = "") -> Iterator[Logged]:
    """Make tables and a migration of them in its first state; `before` puts rows there."""
    name = f"t{secrets.token_hex(5)}"
    work = folder / name
    work.mkdir()
    path = work / "spec.toml"
    path.write_text(SPEC.format(name=name, capture=kind, tables=tables, work=work))
    spec = load(path)
    with connect(dsn, "test") as old, Ledger.open(spec, "test") as ledger:
        for statement in (*ddl.split(";\n"), before):
            if statement.strip():
                old.execute(sql.SQL(statement))
        found = {table.source: source_table(old, table) for table in spec.tables}
        ledger.create()
        first: dict[str, list[tuple[Any, ...]]] = {}
        if kind == "trigger":
            triggerlog.install(old, spec, [one.identity for one in found.values() if one])
            identity = ticks.identify(old)
            with ticks.aligned(dsn, "test", Log(name), [t.source_name for t in spec.tables]) as tick:
                for table in spec.tables:
                    query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(*table.source_name))
                    first[table.source] = tick.holder.execute(query).fetchall()
            stream = Stream(tick.end, *identity, spec.slot, str(Log(name)), "none", tick.snapshot.visible)
        else:
            names = sql.SQL(", ").join(sql.Identifier(*t.source_name) for t in spec.tables)
            old.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE {}").format(sql.Identifier(spec.slot), names))
            row = old.execute("SELECT lsn::text FROM pg_create_logical_replication_slot(%s, 'pgoutput')", [spec.slot]).fetchone()
            assert row is not None
            stream = Stream(parse_lsn(row[0]), *ticks.identify(old), spec.slot, spec.slot, "none", "none")
        ledger.record_migration(spec, stream)
        definition.record(ledger, OLD, assumptions.present(spec, old, spec.slot))
        for table in spec.tables:
            seen = found[table.source]
            assert seen is not None
            ledger.record_table(table.source, seen.filenode, seen.columns)
            ledger.record_load(table.source, "store", stream.l0, True)
        Spool(spec.work / "spool").create()
        yield Logged(spec, old, stream, first)


@pytest.fixture
def source_dsn(replica_server: EmbeddedServer, new_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with fresh_database(replica_server, "log") as dsn:
        monkeypatch.setenv("OLD_DSN", dsn)
        monkeypatch.setenv("NEW_DSN", new_dsn)
        yield dsn


@pytest.fixture
def counters(source_dsn: str, tmp_path: Path) -> Iterator[Logged]:
    with logged(source_dsn, tmp_path, COUNTERS, COUNTERS_TABLES, before="INSERT INTO counters VALUES (1, 0, 'first')") as made:
        yield made


# -- what an event says


def test_every_kind_of_change_in_order(counters: Logged) -> None:
    c, o = "public.counters", "public.other"
    counters.sql("INSERT INTO counters VALUES (2, 0, ''), (3, 0, 'q\"u\\o,te')", "UPDATE counters SET id = 4 WHERE id = 2")
    counters.sql("UPDATE counters SET stamp = 'x' WHERE id = 3", "DELETE FROM counters WHERE id = 1")
    counters.sql("INSERT INTO other VALUES (1, 'b')", "TRUNCATE counters, other", "INSERT INTO other VALUES (2, 'größe')")
    with suppress(psycopg.Rollback), counters.old.transaction():
        counters.old.execute("INSERT INTO counters VALUES (9, 0, 'rolled back')")
        raise psycopg.Rollback
    counters.catch_up()
    found = counters.brief()
    assert found[:6] == [
        (c, "I", {"id": "2", "n": "0", "stamp": ""}, None, [], None),
        (c, "I", {"id": "3", "n": "0", "stamp": 'q"u\\o,te'}, None, [], None),
        (c, "U", {"id": "4", "n": "0", "stamp": ""}, {"id": "2"}, [], None),
        (c, "U", {"id": "3", "n": "0", "stamp": "x"}, None, [], None),
        (c, "D", None, {"id": "1"}, [], None),
        (o, "I", {"a": "1", "b": "b"}, None, [], None),
    ]
    assert sorted(found[6:8]) == [(c, "T", None, None, [], None), (o, "T", None, None, [], None)]
    assert found[8:] == [(o, "I", {"a": "2", "b": "größe"}, None, [], None)]


def test_the_log_says_what_the_slot_says(old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of capture on one table, written under another notation: rows, keys and kinds are the same texts."""
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    ddl = f"{DDL}; ALTER TABLE follows ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now()"
    more = (
        "ADD raw bytea DEFAULT '\\x00ff41', ADD span interval DEFAULT '1 day 02:03:04.5', ADD fix char(5) DEFAULT 'ab',"
        " ADD net inet DEFAULT '10.0.0.1', ADD nets inet[] DEFAULT '{10.0.0.1}', ADD day date DEFAULT '2020-02-29',"
        " ADD times timestamptz[] DEFAULT '{2020-02-29 01:02:03+05}', ADD odd int[] DEFAULT '[0:1]={1,2}'"
    )
    tables = TABLE.format("follows", '["from_user", "to_channel"]')
    with (
        logged(old_dsn, tmp_path, f"{ddl};\nALTER TABLE follows REPLICA IDENTITY FULL, {more}", tables) as log,
        logged(old_dsn, tmp_path, "", tables, kind="slot") as slot,
        psycopg.connect(old_dsn, autocommit=True) as application,
    ):
        for name, value in {
            "TimeZone": "Asia/Tokyo", "DateStyle": "German", "IntervalStyle": "iso_8601", "extra_float_digits": "-5",
            "bytea_output": "escape", "search_path": "pg_temp",
        }.items():  # fmt: skip
            application.execute("SELECT set_config(%s, %s, false)", [name, value])
        application.execute(NASTY_ROWS.replace("INTO follows", "INTO public.follows"), {"rows": 300})
        application.execute("UPDATE public.follows SET note = 'n', raw = raw || 'x' WHERE from_user < 20")
        application.execute("UPDATE public.follows SET from_user = from_user + 1000 WHERE from_user > 90")
        application.execute("DELETE FROM public.follows WHERE from_user BETWEEN 40 AND 60")
        log.catch_up()
        slot.catch_up()
        assert len(log.brief()) > 300
        assert log.brief() == slot.brief()


def test_nested_statements_end_with_what_the_table_holds(counters: Logged) -> None:
    """A trigger, and a function inside an update, that write to rows whose own trigger is still to come."""
    counters.sql(
        "INSERT INTO counters SELECT i, 0, 'x' FROM generate_series(2, 9) i",
        "CREATE FUNCTION poke() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF pg_trigger_depth() = 1 THEN"
        " UPDATE counters SET stamp = stamp || '!' WHERE id IN (2, NEW.id); UPDATE counters SET id = 30 WHERE id = 3;"
        " DELETE FROM counters WHERE id = 4; DELETE FROM counters WHERE id = 5; INSERT INTO counters VALUES (5, 50, 'anew');"
        " END IF; RETURN NULL; END $$",
        "CREATE TRIGGER aaa AFTER UPDATE ON counters FOR EACH ROW EXECUTE FUNCTION poke()",
        "CREATE TRIGGER zzz AFTER UPDATE ON counters FOR EACH ROW EXECUTE FUNCTION poke()",
        "CREATE FUNCTION revive() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF pg_trigger_depth() = 1 THEN"
        " INSERT INTO counters VALUES (2, 20, 'again'), (6, 60, 'again') ON CONFLICT DO NOTHING; END IF; RETURN NULL; END $$",
        "CREATE TRIGGER aab AFTER DELETE ON counters FOR EACH ROW EXECUTE FUNCTION revive()",
        "CREATE FUNCTION sly(k integer) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN IF k = 9 THEN"
        " UPDATE counters SET stamp = 'sly' WHERE id = 8; DELETE FROM counters WHERE id = 7; END IF; RETURN 7; END $$",
    )
    counters.sql("UPDATE counters SET n = n + 1")
    counters.sql("ALTER TABLE counters DISABLE TRIGGER aaa, DISABLE TRIGGER zzz")
    counters.sql("UPDATE counters SET n = sly(id)")
    counters.sql("DELETE FROM counters WHERE id IN (2, 6)")
    counters.catch_up()
    held = {row[0]: row for row in counters.old.execute("SELECT * FROM counters").fetchall()}
    assert (held[8][2], held[6][2]) == ("sly", "again")
    assert 7 not in held
    assert replayed(counters, counters.events())["public.counters"] == held


def replayed(made: Logged, events: list[Row], before: int | None = None) -> dict[str, dict[Any, tuple[Any, ...]]]:
    """Apply events to the first snapshot in their order, as a judge of its own."""
    state: dict[str, dict[Any, tuple[Any, ...]]] = {
        "public.counters": {row[0]: row for row in made.first["public.counters"]}, "public.other": {},
    }  # fmt: skip
    for e in events:
        if before is not None and e["lsn"] >= before:
            continue
        table = state.get(e["relation"])
        if table is None or e["op"] not in "IUDT":
            continue
        if e["op"] == "T":
            table.clear()
        if e["key"]:
            table.pop(_key(e["key"]), None)
        if e["row"]:
            table[_key(e["row"])] = _values(e["row"])
    return state


def _key(row: Row) -> Any:
    return int(row["id"]) if "id" in row else (int(row["a"]), row["b"])


def _values(row: Row) -> tuple[Any, ...]:
    return (int(row["id"]), int(row["n"]), row["stamp"]) if "id" in row else (int(row["a"]), row["b"])


# -- the property: each commit once, per key in order, every position exact


@dataclass
class Witness:
    """What writers know for certain: which stamps they committed, and what was committed before a position was read."""

    committed: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    fences: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    below: dict[str, int] = field(default_factory=dict)
    ends: list[tuple[int, int]] = field(default_factory=list)


KEYS = 12
COMMITTED, ALIGNED, RUNS = 600, 6, 5
"""Writes, reads at a moment of both, and runs of capture after which there is enough to judge."""


def write(dsn: str, log: Log, seed: int, stop: threading.Event, witness: Witness) -> None:
    """Write in transactions that last, roll back in part, collide on few keys, and are committed in two phases now and then."""
    chance = random.Random(seed)
    made = 0
    with psycopg.connect(dsn, autocommit=True) as session:
        while not stop.is_set():
            stamps: list[str] = []
            dual = None
            try:
                with session.transaction():
                    for _ in range(chance.randint(1, 4)):
                        made += 1
                        stamp = f"{seed}-{made}"
                        undone = chance.random() < 0.2
                        with session.transaction(force_rollback=undone):
                            session.execute("SELECT pg_sleep(%s)", [chance.choice((0, 0, 0.003))])
                            _write_one(session, chance, stamp)
                        if not undone:
                            stamps.append(stamp)
                    if chance.random() < 0.3:
                        dual = _ticked(session.cursor(), "0/0", log)
                    session.execute("SELECT pg_sleep(%s)", [chance.choice((0, 0, 0.01, 0.3 if chance.random() < 0.1 else 0))])
            except (psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
                continue
            with witness.lock:
                witness.committed.update(stamps)
                if dual is not None:
                    witness.below.update(dict.fromkeys(stamps, dual))


def _write_one(session: psycopg.Connection[Any], chance: random.Random, stamp: str) -> None:
    key = chance.randint(1, KEYS)
    what = chance.random()
    # every write leaves its stamp: a delete and a move beside the row, in the other table
    session.execute("INSERT INTO other VALUES (%s, %s)", [key, stamp])
    if what < 0.6:
        session.execute(
            "INSERT INTO counters VALUES (%s, 1, %s) ON CONFLICT (id) DO UPDATE SET n = counters.n + 1, stamp = excluded.stamp",
            [key, stamp],
        )
    elif what < 0.8:
        session.execute("DELETE FROM counters WHERE id = %s", [key])
    elif what < 0.98:
        session.execute("UPDATE counters SET id = id + 100, n = n + 1, stamp = %s WHERE id = %s", [stamp, key])
        session.execute("DELETE FROM counters WHERE id = %s", [key + 100])
    else:
        session.execute("TRUNCATE counters")


def observe(made: Logged, dsn: str, stop: threading.Event, witness: Witness, aligned: list[tuple[int, dict[Any, Any]]]) -> None:
    """Read positions as a fence and a verification do, and how many events stand below the spool's end at some moments."""
    with connect(dsn, "observer") as session:
        spool = made.spool
        while not stop.wait(0.05):
            with witness.lock:
                known = frozenset(witness.committed)
            row = session.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            assert row is not None
            witness.fences.append((parse_lsn(row[0]), known))
            end = spool.end()
            witness.ends.append((end, spool.outline(0, end).num_rows))
            if len(witness.ends) % 9 == 0:
                file = session.execute("SELECT pg_relation_filenode('counters')").fetchone()
                with ticks.aligned(dsn, "verifier", made.log) as tick:
                    rows = tick.holder.execute("SELECT * FROM counters").fetchall()
                    # a table truncated meanwhile reads as empty under an older snapshot, which the product's readers look for
                    if session.execute("SELECT pg_relation_filenode('counters')").fetchone() == file:
                        aligned.append((tick.end, {row[0]: row for row in rows}))


@contextmanager
def beside(*works: Callable[[], object]) -> Iterator[None]:
    """Run work in threads while the block lasts; a failure in one is the test's."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()
    assert not failed, failed


def test_each_commit_once_in_order_and_every_position_exact(
    counters: Logged, source_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trigger, "BATCH_EVENTS", 5)  # most windows go in by parts
    monkeypatch.setattr(writer, "COMPACT_EVERY", 40)
    stop, stopped_capture = threading.Event(), threading.Event()
    witness = Witness()
    aligned: list[tuple[int, dict[Any, Any]]] = []

    runs = 0

    def follow() -> None:
        nonlocal runs
        while not stopped_capture.is_set():  # one run after the other, each ended anywhere
            capture(counters.spec, until=stopped_capture.is_set, stop=_later())
            runs += 1

    works = [lambda seed=seed: write(source_dsn, counters.log, seed, stop, witness) for seed in range(6)]
    with beside(follow):
        try:
            with beside(*works, lambda: observe(counters, source_dsn, stop, witness, aligned)):
                try:
                    deadline = time.monotonic() + 120
                    while len(witness.committed) < COMMITTED or len(aligned) < ALIGNED or runs < RUNS:
                        assert time.monotonic() < deadline, (len(witness.committed), len(aligned), runs)
                        time.sleep(0.05)
                finally:
                    stop.set()
        finally:
            stopped_capture.set()
    counters.catch_up()
    judge(counters, witness, aligned)


def _later() -> threading.Event:
    """Return an event that is set after a second or so."""
    stop = threading.Event()
    timer = threading.Timer(random.uniform(0.3, 1.5), stop.set)
    timer.daemon = True
    timer.start()
    return stop


def judge(made: Logged, witness: Witness, aligned: list[tuple[int, dict[Any, Any]]]) -> None:
    """Hold the spool against what the writers know."""
    events = made.events()
    places = [(e["lsn"], e["ordinal"]) for e in events]
    assert len(places) == len(set(places))
    assert places == sorted(places)
    stamps = {e["row"]["b"]: e["lsn"] for e in events if e["relation"] == "public.other"}
    assert sum(e["relation"] == "public.other" for e in events) == len(stamps)
    assert stamps.keys() == witness.committed
    late = [(x, s) for x, known in witness.fences for s in known if stamps[s] >= x]
    assert not late, late[:3]
    for end, count in witness.ends:  # nothing came below an end afterwards
        assert sum(lsn < end for lsn, _ in places) + markers_below(made, end) == count
    assert witness.below
    for stamp, dual in witness.below.items():
        assert dual <= stamps[stamp]
    held = {row[0]: row for row in made.old.execute("SELECT * FROM counters").fetchall()}
    assert replayed(made, events)["public.counters"] == held
    for end, rows in aligned:
        assert replayed(made, events, end)["public.counters"] == rows
    counts: dict[str, int] = defaultdict(int)
    for e in events:
        if e["relation"] == "public.counters" and e["op"] == "U" and e["row"] and not e["key"]:
            counts[e["row"]["stamp"]] += 1
    assert max(counts.values()) == 1


def markers_below(made: Logged, end: int) -> int:
    rows: list[Row] = made.spool.outline(0, end).to_pylist()
    return sum((row["note"] or "").startswith("end ") for row in rows)


def test_an_end_that_is_published_holds_everything_before_it(counters: Logged, source_dsn: str) -> None:
    """What `fence` asks: X is read after a commit, and once the spool ends at X or beyond, the commit is in it, below X."""
    stop = threading.Event()

    def noise() -> None:
        with psycopg.connect(source_dsn, autocommit=True) as session:
            number = 0
            while not stop.is_set():
                number += 1
                session.execute("INSERT INTO other VALUES (%s, 'noise')", [number])

    with beside(noise, lambda: capture(counters.spec, stop=stop)):
        try:
            for number in range(40):
                counters.sql(f"INSERT INTO counters VALUES ({1000 + number}, 0, 'fence')")
                row = counters.old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
                assert row is not None
                x = parse_lsn(row[0])
                while counters.spool.end() < x:
                    time.sleep(0.002)
                rows = counters.spool.events(max(0, x - (1 << 20)), x).column("row").to_pylist()
                assert any(row and ("id", str(1000 + number)) in row for row in rows)
        finally:
            stop.set()


def test_a_prepared_transaction_comes_when_it_is_committed(counters: Logged) -> None:
    counters.old.execute("BEGIN")
    counters.old.execute("INSERT INTO counters VALUES (50, 0, 'two phases')")
    gid = f"gid{secrets.token_hex(4)}"
    counters.old.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(gid)))
    counters.sql("INSERT INTO counters VALUES (51, 0, 'meanwhile')")
    counters.catch_up()
    assert [e["row"]["id"] for e in counters.events()] == ["51"]
    counters.old.execute(sql.SQL("COMMIT PREPARED {}").format(sql.Literal(gid)))
    counters.catch_up()
    assert [e["row"]["id"] for e in counters.events()] == ["51", "50"]
    left = counters.old.execute(sql.SQL("SELECT count(*) FROM {}").format(counters.log.rows)).fetchone()
    assert left == (0,)  # what is durable is taken out


# -- kills, restarts, gaps


@pytest.mark.parametrize("moment", ["part", "last", "prune"])
def test_a_window_that_was_cut_off_is_read_again(counters: Logged, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """A kill between two parts, before the last part, and before what is durable is taken out of the log."""
    counters.sql("INSERT INTO counters SELECT i, 0, 'w' FROM generate_series(100, 149) i")
    with monkeypatch.context() as patched:
        patched.setattr(trigger, "BATCH_EVENTS", 7)
        appends = 0
        append, prune = Spool.append, ticks.prune

        def breaking(spool: Spool, batch: Any, end: int) -> None:
            nonlocal appends
            appends += 1
            if (moment == "part" and appends == 4) or (moment == "last" and appends == 8):
                raise KeyboardInterrupt
            append(spool, batch, end)

        def unpruned(*given: Any) -> None:
            if moment == "prune" and appends:
                raise KeyboardInterrupt
            prune(*given)

        patched.setattr(Spool, "append", breaking)
        patched.setattr(ticks, "prune", unpruned)
        with pytest.raises(KeyboardInterrupt):
            counters.catch_up()
    # written meanwhile, with sequence numbers above and, for an older transaction, a commit that comes late
    counters.sql("UPDATE counters SET n = 1 WHERE id < 110")
    monkeypatch.setattr(trigger, "BATCH_EVENTS", 9)
    counters.catch_up()
    ids = [e["row"]["id"] for e in counters.events() if e["op"] == "I"]
    assert ids == [str(i) for i in range(100, 150)]
    assert sum(e["op"] == "U" for e in counters.events()) == 11
    held = {row[0]: row for row in counters.old.execute("SELECT * FROM counters").fetchall()}
    assert replayed(counters, counters.events())["public.counters"] == held


def test_kill_9_at_any_moment(counters: Logged, source_dsn: str) -> None:
    stop = threading.Event()
    witness = Witness()
    works = [lambda seed=seed: write(source_dsn, counters.log, seed, stop, witness) for seed in range(3)]
    with beside(*works):
        for _ in range(4):
            child = subprocess.Popen(
                [sys.executable, "-m", "changeover.jobs.capture.service", counters.spec.path], env=dict(os.environ)
            )
            before = counters.spool.end()
            deadline = time.monotonic() + 120
            while counters.spool.end() == before and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(random.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            child.wait()
        stop.set()
    counters.catch_up()
    events = counters.events()
    stamps = [e["row"]["b"] for e in events if e["relation"] == "public.other"]
    assert sorted(stamps) == sorted(witness.committed)
    held = {row[0]: row for row in counters.old.execute("SELECT * FROM counters").fetchall()}
    assert replayed(counters, events)["public.counters"] == held


def test_a_source_that_is_restarted_is_followed_on(new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEW_DSN", new_dsn)
    with passing_server(default_binaries(), wal_level="replica") as server:
        dsn = server.create_database("restarted")
        monkeypatch.setenv("OLD_DSN", dsn)
        with logged(dsn, tmp_path, COUNTERS, COUNTERS_TABLES) as made:
            stop = threading.Event()
            with beside(lambda: capture(made.spec, stop=stop)):
                try:
                    made.sql("INSERT INTO counters VALUES (1, 0, 'before')")
                    server.restart()
                    with connect(dsn, "test") as old:
                        old.execute("INSERT INTO counters VALUES (2, 0, 'after')")
                    deadline = time.monotonic() + 120
                    while len(made.events()) < 2 and time.monotonic() < deadline:
                        time.sleep(0.05)
                finally:
                    stop.set()
            assert [e["row"]["stamp"] for e in made.events()] == ["before", "after"]


def test_windows_come_in_the_order_of_their_ends(counters: Logged) -> None:
    ends = ["FF/FFFFFFF", "FF/10000000", "100/0", "100/FF"]
    for end in reversed(ends):
        counters.old.execute(sql.SQL("INSERT INTO {} VALUES (%s::pg_lsn, '1:1:', '[]')").format(counters.log.ticks), [end])
    found = ticks.ticks(counters.old, counters.log, parse_lsn(ends[0]))
    assert [format_lsn(tick.end) for tick in found] == ends, "whose texts have another order"


def test_a_log_with_a_gap_is_refused(counters: Logged) -> None:
    counters.sql("INSERT INTO counters VALUES (5, 0, 'x')")
    counters.catch_up()
    counters.old.execute(sql.SQL("DELETE FROM {}").format(counters.log.ticks))
    with pytest.raises(SpoolGap):
        counters.catch_up()
    triggerlog.remove(counters.old, counters.spec.name)
    with pytest.raises(SourceChanged, match="trigger log is missing"):
        capture(counters.spec, until=lambda: True)


# -- tables that are altered


def test_an_added_column_is_told_and_the_table_goes_on(counters: Logged) -> None:
    counters.sql("INSERT INTO counters VALUES (2, 0, 'before')", "ALTER TABLE counters ADD more text DEFAULT 'm'")
    counters.sql("INSERT INTO counters VALUES (3, 0, 'after')", "UPDATE counters SET n = 1 WHERE id = 2")
    counters.catch_up()
    assert [(e["op"], (e["row"] or {}).get("stamp"), e["note"]) for e in counters.events()] == [
        ("A", None, "column more was added (type oid 25)"), ("I", "before", None), ("I", "after", None), ("U", "before", None),
    ]  # fmt: skip
    assert status(counters.spec).stream["notes"][0].startswith("public.counters: column more was added")


@pytest.mark.parametrize(
    ("ddl", "told"),
    [
        ("DROP COLUMN stamp", "column stamp was dropped"),
        ("ALTER n TYPE bigint", "column n has another type"),
        ("RENAME id TO number", "column id was dropped; column number was added"),
        ("ALTER id TYPE bigint", "column id has another type"),
        ("DROP COLUMN n, ADD COLUMN n integer DEFAULT 0", "a column was dropped and added anew"),
        ("DROP COLUMN stamp, ADD COLUMN stamp text", "a column was dropped and added anew"),
        ("DROP CONSTRAINT counters_pkey", "column id is no longer part of the replica identity"),
        ("RENAME TO counted", "the table was renamed to public.counted"),
        ("DISABLE TRIGGER ALL", "its trigger of the log was disabled or dropped"),
    ],
)
def test_an_altered_table_stops_while_writes_and_the_others_go_on(counters: Logged, ddl: str, told: str) -> None:
    counters.sql("INSERT INTO counters VALUES (2, 0, 'before')")
    counters.catch_up()
    counters.old.execute("UPDATE counters SET n = n")  # the session's plan of the trigger is from before
    counters.catch_up()
    counters.sql(f"ALTER TABLE counters {ddl}")
    name = "counted" if "counted" in ddl else "counters"
    counters.sql(
        f"UPDATE {name} SET {'number' if 'number' in ddl else 'id'} = 77 WHERE {'number' if 'number' in ddl else 'id'} = 2"
    )
    counters.sql(f"DELETE FROM {name}", "INSERT INTO other VALUES (1, 'goes on')")
    counters.catch_up()
    after = [e for e in counters.events() if e["note"] or e["relation"] == "public.other"]
    assert [(e["relation"], e["op"]) for e in after] == [("public.counters", "R"), ("public.other", "I")]
    assert told in after[0]["note"]
    places = [e["op"] for e in counters.events() if e["relation"] == "public.counters"]
    assert places.index("R") == len(places) - 1  # nothing of the table comes after it


def test_a_dropped_table_stops_while_the_other_goes_on(counters: Logged) -> None:
    counters.sql("INSERT INTO counters VALUES (2, 0, 'x')", "DROP TABLE counters", "INSERT INTO other VALUES (1, 'b')")
    counters.catch_up()
    assert [(e["op"], e["note"]) for e in counters.events()] == [("R", "the table was dropped"), ("I", None)]


# -- rights, leavings, what is said


def test_plain_roles_write_and_every_trace_goes(counters: Logged, source_dsn: str) -> None:
    role = f"plain_{secrets.token_hex(4)}"
    counters.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'p'", f"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON counters TO {role}")
    with connect(make_conninfo(source_dsn, user=role, password="p"), "application") as application:
        application.execute("INSERT INTO counters VALUES (2, 0, 'x')")
        application.execute("UPDATE counters SET id = 3 WHERE id = 2")
        with application.transaction():
            assert _ticked(application.cursor(), "0/0", counters.log) >= counters.stream.l0
        application.execute("TRUNCATE counters")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            application.execute(sql.SQL("SELECT FROM {}").format(counters.log.rows))
    counters.sql("SET LOCAL session_replication_role = 'replica'", "INSERT INTO counters VALUES (4, 0, 'by replication')")
    counters.catch_up()
    assert [e["op"] for e in counters.events()] == ["I", "U", "T", "I"]
    counters.sql(f"DROP OWNED BY {role}", f"DROP ROLE {role}")
    assert len(leftovers(counters.spec)) > 5
    removed = triggerlog.remove(counters.old, counters.spec.name)
    assert len(removed) == 5
    counters.sql("INSERT INTO counters VALUES (5, 0, 'free')", "DROP SCHEMA changeover")
    assert leftovers(counters.spec) == []
    assert _ticked(counters.old.cursor(), "0/0", counters.log) == 0  # a router that has not heard of it yet goes on


def test_check_says_rights_and_cost_and_status_speaks_of_the_log(counters: Logged) -> None:
    found = preflight(counters.spec)
    assert not [reason for reason in found.reasons if "wal_level" in reason or "replicat" in reason]
    assert not any("REPLICATION" in grant for grant in found.grants)
    assert "once more" in found.notes[0]
    stream = status(counters.spec).stream
    assert (stream["slot"], stream["kept_wal_bytes"]) == ("inactive", None)
    assert stream["log_bytes"] > 0
    stop = threading.Event()
    with beside(lambda: capture(counters.spec, stop=stop)):
        deadline = time.monotonic() + 120
        while status(counters.spec).stream["slot"] != "active" and time.monotonic() < deadline:
            time.sleep(0.05)
        told = list(status(counters.spec).lines())
        stop.set()
    assert any("the trigger log has" in line for line in told)
    assert any(line.strip().startswith("capture   running") for line in told)
    triggerlog.remove(counters.old, counters.spec.name)
    assert any("the trigger log is missing" in line for line in status(counters.spec).lines())


def test_an_idle_log_writes_nothing_and_other_wal_moves_the_end(counters: Logged) -> None:
    counters.catch_up()
    appends = capture(counters.spec, stop=_later()).appends
    assert appends == 0
    before = counters.spool.end()
    counters.sql("CREATE TABLE elsewhere AS SELECT repeat('x', 1000) AS x FROM generate_series(1, 3000)")
    row = counters.old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    near = parse_lsn(row[0]) - writer.IDLE_STEP
    capture(counters.spec, until=lambda: counters.spool.end() >= near)
    assert counters.spool.end() > before


def test_a_position_of_a_log_at_rest_is_passed_for_a_reader_who_may_write_nothing_and_parts_what_was_visible(
    counters: Logged, source_dsn: str, new_dsn: str
) -> None:
    role, stop = f"reader_{secrets.token_hex(4)}", threading.Event()
    counters.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'p'")
    old = PgEndpoint(make_conninfo(source_dsn, user=role, password="p"), log=counters.log)
    counters.catch_up()
    positions = LedgerPositions({Origin.OLD: old}, new_dsn, counters.spec.name, "store", "test")
    marks = []

    def passed(position: int) -> bool:
        with Ledger.open(counters.spec, "test") as ledger:  # what replay does at rest
            for table in counters.spec.tables:
                ledger.advance(table.source, "store", counters.spool.end(), 0, 0)
        reached = positions.reached(Origin.NEW)
        return reached is not None and reached.applied >= position

    with beside(lambda: capture(counters.spec, stop=stop)):
        try:
            for change in range(4):
                position, doubtful = positions.mark(Origin.OLD)
                assert not doubtful
                wait_until(lambda position=position: passed(position))  # type: ignore[misc]
                # here the other store is read; what comes now is in no tick that it has
                counters.sql(f"UPDATE counters SET n = {change}")
                marks.append(position)
        finally:
            stop.set()
            positions.close()
    counters.catch_up()
    places = [event["lsn"] for event in counters.events() if event["op"] == "U"]
    assert len(places) == len(marks) == 4
    assert all(mark <= place for mark, place in zip(marks, places, strict=True)), "told passes the mark before the change"
    assert all(place < mark for mark, place in zip(marks[1:], places, strict=False)), "applied has it at the mark behind it"
    counters.sql(f"DROP ROLE {role}")


def test_a_tick_is_asked_for_as_long_as_somebody_waits_and_no_longer(counters: Logged, new_dsn: str, source_dsn: str) -> None:
    old = PgEndpoint(source_dsn, log=counters.log)
    positions = LedgerPositions({Origin.OLD: old}, new_dsn, counters.spec.name, "store", "test")
    with connect(source_dsn, "test") as heard:
        notices: list[psycopg.Notify] = []
        heard.add_notify_handler(notices.append)
        heard.execute(sql.SQL("LISTEN {}").format(sql.Identifier(counters.log.channel)))
        position, _ = positions.mark(Origin.OLD)

        def asked(times: int) -> bool:
            positions.reached(Origin.NEW)
            heard.execute("SELECT 1")
            return len(notices) >= times

        wait_until(lambda: asked(3))  # the first may have met no capture
        with Ledger.open(counters.spec, "test") as ledger:
            for table in counters.spec.tables:
                ledger.advance(table.source, "store", position, 0, 0)
        wait_until(lambda: (reached := positions.reached(Origin.NEW)) is not None and reached.applied >= position)
        heard.execute("SELECT 1")
        before = len(notices)
        for _ in range(30):
            assert not asked(before + 1)
            time.sleep(0.05)
    positions.close()


def test_our_own_writes_bear_their_mark_and_nobody_elses(counters: Logged) -> None:
    counters.sql("INSERT INTO counters VALUES (7001, 0, 'theirs')")
    with counters.old.transaction():
        counters.old.execute(MARK, [OURS, "changes"])
        counters.old.execute("UPDATE counters SET n = 1 WHERE id = 7001")
    counters.sql("UPDATE counters SET n = 2 WHERE id = 7001")
    counters.catch_up()
    assert [(event["op"], event["note"]) for event in counters.events()] == [("I", None), ("U", "changes"), ("U", None)]


@pytest.mark.parametrize(
    ("ddl", "reason"),
    [
        (
            "CREATE TABLE odd (id integer PRIMARY KEY, n integer, twice integer GENERATED ALWAYS AS (n) STORED)",
            "generated column twice",
        ),
        ("CREATE TABLE odd (id integer PRIMARY KEY, n integer) PARTITION BY RANGE (id)", "is partitioned"),
    ],
)
def test_what_a_row_image_does_not_fit_is_refused(counters: Logged, ddl: str, reason: str, tmp_path: Path) -> None:
    """A row's composite text has every column in the catalogue's order, and a partition's trigger is not the table's."""
    counters.old.execute(sql.SQL(ddl))
    path = tmp_path / "odd.toml"
    table = TABLE.format("odd", '["id"]')
    path.write_text(SPEC.format(name=f"odd{secrets.token_hex(4)}", capture="trigger", tables=table, work=tmp_path))
    try:
        assert any(reason in one and 'capture = "slot"' in one for one in preflight(load(path)).reasons)
    finally:
        counters.old.execute("DROP TABLE odd")


# -- what the log rests on

PUT_BACK = {
    "a trigger off and on": [
        "ALTER TABLE counters DISABLE TRIGGER {trigger}", "ALTER TABLE counters ENABLE ALWAYS TRIGGER {trigger}",
    ],
    "a trigger that fires for origins": ["ALTER TABLE counters ENABLE TRIGGER {trigger}"],
    "a trigger dropped": ["DROP TRIGGER {trigger} ON counters"],
    "a setting of its function": [
        "ALTER FUNCTION {function}() SET DateStyle TO 'SQL'", "ALTER FUNCTION {function}() SET DateStyle TO 'ISO', 'YMD'",
    ],
    "the key": ["ALTER TABLE counters DROP CONSTRAINT counters_pkey", "ALTER TABLE counters ADD PRIMARY KEY (id)"],
}  # fmt: skip
HARMLESS = [
    "VACUUM FULL {rows}", "ANALYZE counters", "VACUUM FULL pg_trigger", "VACUUM FULL pg_proc", "GRANT SELECT ON {rows} TO PUBLIC",
    "GRANT SELECT ON counters TO PUBLIC", "REINDEX TABLE CONCURRENTLY counters",
    "CREATE TRIGGER own BEFORE UPDATE ON counters FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
]  # fmt: skip


def altered(made: Logged, statement: str) -> list[str]:
    """Run a statement; return what does not hold any more."""
    log = Log(made.spec.name)
    names = {"rows": log.rows, "function": log.function(0), "trigger": sql.Identifier(log.trigger)}
    made.old.execute(sql.SQL(statement).format(**names))
    with Ledger.open(made.spec, "test") as ledger:
        return assumptions.sentences(assumptions.Moment.WATCH, assumptions.Asked(made.spec, made.old, ledger))


@pytest.mark.parametrize("how", PUT_BACK)
def test_what_the_log_rests_on_may_not_be_altered_though_it_is_put_back(counters: Logged, how: str) -> None:
    told = [altered(counters, statement) for statement in PUT_BACK[how]][-1]
    assert told != []
    assert [one for one in told if "counters" not in one or "may be in no event" not in one] == []


def test_what_is_harmless_to_a_log_is_no_change(counters: Logged) -> None:
    for statement in HARMLESS:
        assert altered(counters, statement) == [], statement
