"""A partitioned source in the stream: its partitions' changes are the table's, and what comes or goes without an event stops it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from changeover.errors import TableStopped
from changeover.jobs.capture import slot as capture_slot
from changeover.jobs.capture.service import capture
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.guarantee.rewrites import require_same_file
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Partition, Stream
from changeover.jobs.preflight.rules import preflight
from changeover.jobs.source.catalog import source_table
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.source.partitions import difference, look, partitions_of, record, recorded
from changeover.jobs.spool import writer
from changeover.jobs.spool.events import RELATION, TRUNCATE
from changeover.jobs.spool.table import Spool
from changeover.position import parse_lsn
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.base.ranges import estimated_rows
from changeover.stores.postgres import refusal
from changeover.stores.postgres.gate import FENCED

# the partitions have their columns in other orders, and one of them a column that was dropped before
EVENTS = """
CREATE TABLE events (id integer, day date, note text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE january PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE february (junk integer, note text, day date NOT NULL, id integer NOT NULL, PRIMARY KEY (id, day));
ALTER TABLE february DROP junk;
ALTER TABLE events ATTACH PARTITION february FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE TABLE spring PARTITION OF events FOR VALUES FROM ('2026-03-01') TO ('2026-06-01') PARTITION BY RANGE (day);
CREATE TABLE march PARTITION OF spring FOR VALUES FROM ('2026-03-01') TO ('2026-04-01');
CREATE TABLE plain (id integer PRIMARY KEY);
"""

SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.events"
target = "moved"
key = ["id", "day"]
[[table]]
source = "public.plain"
target = "plain"
key = ["id"]
[work]
path = "{work}"
"""


@dataclass
class Prepared:
    """A migration as prepare leaves it, made by plain SQL."""

    spec: Spec
    old: Connection
    ledger: Ledger
    markers: int = 0

    @property
    def spool(self) -> Spool:
        return Spool(self.spec.work / "spool")

    def run(self, *statements: str) -> None:
        """Run statements in one transaction."""
        with self.old.transaction():
            for statement in statements:
                self.old.execute(statement.encode())

    def catch_up(self) -> list[tuple[Any, ...]]:
        """Capture up to a marker of its own; return what the spool then holds of the tables since the last time."""
        before, note = self.spool.end(), f"end {self.markers}"
        self.markers += 1
        emit_marker(self.old, note)
        capture(self.spec, until=lambda: note in self.spool.events(before).column("note").to_pylist())
        rows = self.spool.events(before).to_pylist(maps_as_pydicts="strict")
        return [(e["relation"], e["op"], e["row"], e["key"], e["note"]) for e in rows if e["relation"]]

    def stopped(self) -> str | None:
        """Return why the partitioned table is stopped."""
        return self.ledger.stopped().get("public.events")

    def same_file(self) -> None:
        """Ask as the end of a load and the fence do, beside a running capture."""
        stop = threading.Event()
        service = threading.Thread(target=capture, args=(self.spec,), kwargs={"stop": stop})
        service.start()
        try:
            require_same_file(self.ledger, self.spool, self.old, self.spec.tables[0])
        finally:
            stop.set()
            service.join()


@pytest.fixture
def prepared(any_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepared]:
    monkeypatch.setenv("OLD_DSN", any_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    path = tmp_path / "spec.toml"
    path.write_text(SPEC.format(name=f"p{secrets.token_hex(5)}", work=tmp_path / "work"))
    spec = load(path)
    with connect(any_dsn, "test") as old, Ledger.open(spec, "test") as ledger:
        old.execute(EVENTS)
        assert preflight(spec).reasons == []
        slot = sql.Identifier(spec.slot)
        old.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY events, ONLY plain").format(slot))
        seen = [found for table in spec.tables if (found := source_table(old, table)) is not None]
        made = old.execute(
            "SELECT lsn::text, (SELECT system_identifier::text FROM pg_control_system()),"
            " (SELECT timeline_id FROM pg_control_checkpoint()) FROM pg_create_logical_replication_slot(%s, 'pgoutput')",
            [spec.slot],
        ).fetchone()
        assert made is not None
        ledger.create()
        ledger.record_migration(spec, Stream(parse_lsn(made[0]), made[1], made[2], spec.slot, spec.slot, "none", "none"))
        for table in seen:
            ledger.record_table(table.source, table.filenode, table.columns, table.partitions is not None)
            record(ledger, table.source, table.partitions or ())
            for target in spec.targets:
                ledger.record_load(table.source, target, 0, True)
        definition.record(ledger, OLD, assumptions.present(spec, old, spec.slot))
        spec.work.mkdir()
        Spool(spec.work / "spool").create()
        yield Prepared(spec, old, ledger)


def row(key: int, day: str, note: str | None = None) -> dict[str, str | None]:
    return {"id": str(key), "day": f"2026-{day}", "note": note}


def key(number: int, day: str) -> dict[str, str]:
    return {"id": str(number), "day": f"2026-{day}"}


def test_changes_of_partitions_are_the_tables(prepared: Prepared) -> None:
    assert [p.name for p in recorded(prepared.ledger, "public.events") or ()] == [
        "public.february", "public.january", "public.march", "public.spring",
    ]  # fmt: skip
    assert recorded(prepared.ledger, "public.plain") is None
    prepared.run(
        "INSERT INTO events VALUES (1, '2026-01-05', 'a'), (2, '2026-02-05', 'b'), (3, '2026-03-05', 'c')",
        "UPDATE events SET day = '2026-02-07' WHERE id = 1",  # from one partition to another, whose columns are in other order
        "UPDATE events SET id = 4, note = NULL WHERE id = 2",
        "DELETE FROM march",
    )
    assert prepared.catch_up() == [
        ("public.events", "I", row(1, "01-05", "a"), None, None),
        ("public.events", "I", row(2, "02-05", "b"), None, None),
        ("public.events", "I", row(3, "03-05", "c"), None, None),
        ("public.events", "D", None, key(1, "01-05"), None),
        ("public.events", "I", row(1, "02-07", "a"), None, None),
        ("public.events", "U", row(4, "02-05"), key(2, "02-05"), None),
        ("public.events", "D", None, key(3, "03-05"), None),
    ]
    assert prepared.stopped() is None


def test_a_partition_that_is_created_midway_is_part_of_it(prepared: Prepared) -> None:
    prepared.run("CREATE TABLE april PARTITION OF spring FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')")
    prepared.run("INSERT INTO events VALUES (1, '2026-04-01', 'later')")
    assert prepared.catch_up() == [("public.events", "I", row(1, "04-01", "later"), None, None)]
    # while capture is running, in the transaction of its first row, and never written to by its own name
    stop, failed = threading.Event(), []

    def run() -> None:
        try:
            capture(prepared.spec, stop=stop)
        except BaseException as error:
            failed.append(error)

    service = threading.Thread(target=run)
    service.start()
    emit_marker(prepared.old, "running")
    deadline = time.monotonic() + 120
    while "running" not in prepared.spool.events()["note"].to_pylist():
        assert not failed, failed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    prepared.run(
        "CREATE TABLE may PARTITION OF spring FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')",
        "INSERT INTO events VALUES (2, '2026-05-01', 'at once')",
    )
    deadline = time.monotonic() + 120
    while not any("at once" in str(e) for e in prepared.spool.events()["row"].to_pylist()):
        assert not failed, failed
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stop.set()
    service.join()
    prepared.same_file()
    assert not failed
    assert {"public.april", "public.may"} < {p.name for p in recorded(prepared.ledger, "public.events") or ()}
    prepared.run("TRUNCATE events")
    assert prepared.catch_up() == [("public.events", TRUNCATE, None, None, None)]
    assert prepared.stopped() is None
    prepared.same_file()
    prepared.same_file()


@pytest.mark.parametrize(
    "truncated", ["january", "spring", "january, february", "ONLY march"], ids=["one", "a part's parts", "two", "only"]
)
def test_a_truncate_of_some_partitions_stops_the_table_at_its_place(prepared: Prepared, truncated: str) -> None:
    prepared.run("INSERT INTO events VALUES (1, '2026-01-05', 'a')")
    prepared.run("TRUNCATE events, plain")
    prepared.run(f"TRUNCATE {truncated}", "INSERT INTO plain VALUES (1)")
    found = prepared.catch_up()
    assert [(relation, op) for relation, op, *_ in found] == [
        ("public.events", "I"), ("public.events", TRUNCATE), ("public.plain", TRUNCATE), ("public.events", RELATION),
        ("public.plain", "I"),
    ]  # fmt: skip
    assert "alone were truncated: none can tell which" in found[3][4]


WITHOUT_AN_EVENT: list[tuple[str, list[str], str]] = [
    ("detached", ["ALTER TABLE events DETACH PARTITION january"], "its partition public.january was detached or dropped"),
    ("dropped", ["DROP TABLE march"], "its partition public.march was detached or dropped"),
    ("a part's parts", ["ALTER TABLE events DETACH PARTITION spring"], "was detached or dropped since prepare"),
    (
        "there and back",
        [
            "ALTER TABLE events DETACH PARTITION january",
            "INSERT INTO january VALUES (8, '2026-01-08', 'meanwhile')",
            "ALTER TABLE events ATTACH PARTITION january FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')",
        ],
        "its partition public.january was detached and attached again",
    ),
    (
        "attached",
        [
            "CREATE TABLE june (LIKE events INCLUDING ALL)",
            "INSERT INTO june VALUES (7, '2026-06-07', 'before')",
            "ALTER TABLE events ATTACH PARTITION june FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')",
        ],
        "the partition public.june was attached to it",
    ),
]


@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one transaction"])
@pytest.mark.parametrize(("name", "statements", "reason"), WITHOUT_AN_EVENT, ids=[name for name, *_ in WITHOUT_AN_EVENT])
def test_what_comes_or_goes_without_an_event_stops_the_table(
    prepared: Prepared, name: str, statements: list[str], reason: str, together: bool
) -> None:
    prepared.run("INSERT INTO events VALUES (1, '2026-01-05', 'a')")
    prepared.catch_up()
    if together:
        prepared.run(*statements)
    else:
        for statement in statements:
            prepared.run(statement)
    with pytest.raises(TableStopped, match=reason):
        prepared.same_file()
    assert reason in (prepared.stopped() or "")
    prepared.run("INSERT INTO plain VALUES (1)")
    assert ("public.plain", "I", {"id": "1"}, None, None) in prepared.catch_up(), "the others go on"


def test_capture_notices_by_itself(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(capture_slot, "answer_interval", lambda _: 0.1)
    begun = time.monotonic()

    def until() -> bool:
        if time.monotonic() > begun + 0.5 and prepared.old.execute("SELECT to_regclass('january')").fetchone() != (None,):
            prepared.run("DROP TABLE january")
        return prepared.stopped() is not None or time.monotonic() > begun + 120

    capture(prepared.spec, until=until)
    assert "public.january was detached or dropped" in (prepared.stopped() or "")


def test_a_partition_that_came_and_went_between_two_looks_stops_the_table_at_its_place(prepared: Prepared) -> None:
    prepared.run("INSERT INTO events VALUES (1, '2026-01-05', 'a')")
    prepared.run("CREATE TABLE june PARTITION OF events FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')")
    prepared.run("INSERT INTO events VALUES (7, '2026-06-07', 'gone with it')")
    prepared.run("DROP TABLE june")
    found = prepared.catch_up()
    assert [op for _, op, *_ in found] == ["I", RELATION, "I"]
    assert found[1][4] == "public.june, a partition that came since prepare, was detached or dropped"


def test_a_partition_that_was_rewritten_stops_the_table(prepared: Prepared) -> None:
    prepared.run("INSERT INTO events VALUES (1, '2026-01-05', 'a')")
    prepared.catch_up()
    prepared.same_file()
    prepared.old.execute("VACUUM FULL january")
    with pytest.raises(TableStopped, match=r"its partition public\.january was rewritten since prepare"):
        prepared.same_file()


def test_a_new_columns_type_and_a_partitions_identity_are_told(prepared: Prepared) -> None:
    prepared.run("ALTER TABLE events ADD more integer", "INSERT INTO events VALUES (1, '2026-01-05', 'a', 5)")
    prepared.run("ALTER TABLE february REPLICA IDENTITY FULL", "INSERT INTO events VALUES (2, '2026-02-05', 'b', 5)")
    prepared.run("UPDATE events SET day = '2026-02-06' WHERE id = 2")
    found = prepared.catch_up()
    assert [op for _, op, *_ in found] == ["A", "I", "A", "I", "A", "U"]
    assert found[-1][3] == key(2, "02-05")


UNFIT = [
    ("ALTER TABLE january REPLICA IDENTITY NOTHING", "january, a partition of public.events, has the replica identity (none)"),
    (
        "CREATE UNIQUE INDEX by_day ON january (day); ALTER TABLE january REPLICA IDENTITY USING INDEX by_day",
        "january, a partition of public.events, has the replica identity (day) and not (day, id)",
    ),
    (
        "CREATE UNLOGGED TABLE june PARTITION OF events FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')",
        "june, a partition of public.events, is not a permanent table",
    ),
]


@pytest.mark.parametrize(("statement", "reason"), UNFIT, ids=[statement[:40] for statement, _ in UNFIT])
def test_an_unfit_partition_is_refused_beforehand(prepared: Prepared, statement: str, reason: str) -> None:
    prepared.run(*statement.split("; "))
    assert [found for found in preflight(prepared.spec).reasons if reason in found] != []


def test_a_partition_alone_is_refused(prepared: Prepared) -> None:
    text = Path(prepared.spec.path).read_text().replace("public.events", "public.january")
    Path(prepared.spec.path).write_text(text)
    assert "public.january is a partition of events: name the whole table" in preflight(load(prepared.spec.path)).reasons


def test_the_refusal_of_a_partitioned_table_is_all_its_partitions(prepared: Prepared) -> None:
    assert refusal.install(prepared.old, "public", "events", refusal.Refusal(begun=refusal.TenantEpoch(1)), time.monotonic() + 120)
    prepared.run("CREATE TABLE june PARTITION OF events FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')")
    for statement in (
        "INSERT INTO events VALUES (1, '2026-01-05', 'a')", "INSERT INTO january VALUES (1, '2026-01-05', 'a')", "TRUNCATE events",
        "TRUNCATE march", "INSERT INTO june VALUES (1, '2026-06-05', 'a')",
    ):  # fmt: skip
        with pytest.raises(psycopg.Error) as caught:
            prepared.run("SET LOCAL session_replication_role = replica", statement)
        assert caught.value.sqlstate == FENCED
    refusal.remove(prepared.old, "public", "events")
    prepared.run("INSERT INTO january VALUES (1, '2026-01-05', 'a')", "TRUNCATE march", "TRUNCATE events")
    assert prepared.old.execute("SELECT FROM pg_trigger WHERE tgname LIKE 'changeover%'").fetchall() == []


def test_the_rows_of_all_partitions_are_estimated(prepared: Prepared) -> None:
    prepared.run("INSERT INTO events SELECT i, date '2026-01-01' + i % 80, 'n' FROM generate_series(1, 5000) i")
    prepared.old.execute("ANALYZE")
    assert 4500 < estimated_rows(prepared.old, "public", "events") < 5500
    assert partitions_of(prepared.old, "public", "plain") is None


PART = Partition("public.p", 7, 70, "700")
DIFFERENT: list[tuple[list[Partition], list[Partition], list[int], str | None]] = [
    ([PART], [PART], [], None),
    ([PART], [Partition("public.q", 7, 71, "700")], [], None),
    ([], [PART], [7], None),
    ([], [PART], [], "attached to it"),
    ([PART], [], [], "detached or dropped"),
    ([PART], [Partition("public.p", 8, 70, "700")], [8], "detached or dropped"),
    ([PART], [Partition("public.p", 7, 70, "701")], [], "attached again"),
]


@pytest.mark.parametrize(("before", "present", "born", "reason"), DIFFERENT)
def test_the_rule(before: list[Partition], present: list[Partition], born: list[int], reason: str | None) -> None:
    found = difference(before, present, born)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_a_partition_that_was_filled_before_it_was_attached_in_its_own_transaction(prepared: Prepared) -> None:
    attach = "ALTER TABLE events ATTACH PARTITION june FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')"
    prepared.run("CREATE TABLE june (LIKE events INCLUDING ALL)", attach, "INSERT INTO june VALUES (7, '2026-06-07', 'after')")
    assert look(prepared.ledger, prepared.old, prepared.spec.tables[0]) is None
    assert prepared.catch_up() == [("public.events", "I", row(7, "06-07", "after"), None, None)]
