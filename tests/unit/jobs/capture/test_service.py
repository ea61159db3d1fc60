"""Capture against a real server: every kind of change, resume, kill -9, lost connections, and another stream."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from changeover.embedded.server import EmbeddedServer
from changeover.errors import LeaseHeld, ServerUnavailable, SourceChanged, SpoolGap, StepOrder
from changeover.jobs.capture import service as capture_module
from changeover.jobs.capture import slot
from changeover.jobs.capture.service import capture, main
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.source.replication import slot_alarm
from changeover.jobs.spool import writer as spool_writer
from changeover.jobs.spool.writer import CaptureResult
from changeover.jobs.status import status
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, connect
from tests.support.fix_capture import Prepared, Writer, child, columns_of, peak_megabytes, require_all_of, wait_for
from tests.support.fix_postgres import SETTINGS


def test_every_kind_of_change_in_order(prepared: Prepared) -> None:
    big = "x" * 5000
    prepared.sql(
        "INSERT INTO follows VALUES (1, NULL, NULL, NULL), (2, '', '{}', 'größe 你好')",
        """UPDATE follows SET tags = '{a,"b c",NULL,"NULL","q\\"uote"}' WHERE id = 1""",
        "UPDATE follows SET tags = '[0:1][1:1]={{x},{y}}' WHERE id = 1",
        f"UPDATE follows SET big = '{big}' WHERE id = 1",
        "UPDATE follows SET name = 'n' WHERE id = 1",
        "UPDATE follows SET id = 3 WHERE id = 1",
        "DELETE FROM follows WHERE id = 2",
        "INSERT INTO other VALUES (1, 'b')",
        "SELECT pg_logical_emit_message(true, 'somebody else', 'x')",
        "SELECT pg_logical_emit_message(false, 'changeover', 'not of the transaction')",
        "SELECT pg_logical_emit_message(true, 'changeover', 'mark')",
        "TRUNCATE follows, other",
    )
    prepared.catch_up()
    f, tags = "public.follows", "[[[0:1][1:1]={{x},{y}}"
    assert prepared.brief() == [
        (f, "I", {"id": "1", "name": None, "tags": None, "big": None}, None, [], None),
        (f, "I", {"id": "2", "name": "", "tags": "[]", "big": "größe 你好"}, None, [], None),
        (
            f,
            "U",
            {"id": "1", "name": None, "tags": json.dumps(["a", "b c", None, "NULL", 'q"uote']), "big": None},
            None,
            [],
            None,
        ),
        (f, "U", {"id": "1", "name": None, "tags": tags, "big": None}, None, [], None),
        (f, "U", {"id": "1", "name": None, "tags": tags, "big": big}, None, [], None),
        (f, "U", {"id": "1", "name": "n", "tags": tags}, None, ["big"], None),
        (f, "U", {"id": "3", "name": "n", "tags": tags}, {"id": "1"}, ["big"], None),
        (f, "D", None, {"id": "2"}, [], None),
        ("public.other", "I", {"a": "1", "b": "b"}, None, [], None),
        ("", "M", None, None, [], "mark"),
        (f, "T", None, None, [], None),
        ("public.other", "T", None, None, [], None),
    ]
    events = prepared.events()
    assert [event["ordinal"] for event in events] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 22]
    assert len({(e["lsn"], e["xid"], e["committed_at"]) for e in events}) == 1
    assert prepared.stream.l0 <= events[0]["lsn"] < prepared.spool.end()
    assert abs(time.time() - events[0]["committed_at"].timestamp()) < 60


def test_a_whole_old_row_supplies_what_was_not_sent(prepared: Prepared) -> None:
    prepared.sql("ALTER TABLE follows REPLICA IDENTITY FULL", f"INSERT INTO follows VALUES (1, 'a', NULL, '{'x' * 5000}')")
    prepared.sql("UPDATE follows SET name = 'b'", "UPDATE follows SET id = 2", "DELETE FROM follows")
    prepared.catch_up()
    row = {"id": "1", "name": "b", "tags": None, "big": "x" * 5000}
    assert prepared.brief()[1:] == [
        ("public.follows", "U", row, None, [], None),
        ("public.follows", "U", {**row, "id": "2"}, {"id": "1"}, [], None),
        ("public.follows", "D", None, {"id": "2"}, [], None),
    ]


def test_arrays_of_any_type_read_as_their_elements_texts(prepared: Prepared) -> None:
    prepared.sql("ALTER TABLE other ADD n numeric[], ADD boxes box[], ADD words int2vector, ADD codes bytea[]")
    prepared.ledger.connection.execute("DELETE FROM changeover.source_table WHERE source = 'public.other'")
    prepared.ledger.record_table("public.other", 1, columns_of(prepared.old, "other"))
    prepared.sql(
        "INSERT INTO other VALUES (1, 'x', DEFAULT, '{1.50,NULL}', '{(1,1),(0,0);(2,2),(1,1)}', '3 4',"
        " ARRAY[decode('00ff', 'hex')])"
    )
    prepared.catch_up()
    (event,) = prepared.events()
    assert {name: json.loads(event["row"][name]) for name in ("n", "boxes", "words", "codes")} == {
        "n": ["1.50", None],
        "boxes": ["(1,1),(0,0)", "(2,2),(1,1)"],
        "words": ["3", "4"],
        "codes": ["\\x00ff"],
    }


def test_a_second_run_goes_on_where_the_first_ended(prepared: Prepared) -> None:
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    first = prepared.catch_up()
    prepared.sql("INSERT INTO other VALUES (2, 'b')")
    second = prepared.catch_up()
    assert [event["row"]["a"] for event in prepared.events()] == ["1", "2"]
    assert (first.events, second.events) == (2, 2)
    assert second.end_lsn == prepared.spool.end()


def test_the_slot_forgets_only_what_is_durable(prepared: Prepared) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=capture, args=[prepared.spec], kwargs={"stop": stop})
    thread.start()
    confirmed, deadline = [prepared.stream.l0], time.monotonic() + 120
    while len(confirmed) <= 60 or confirmed[-1] == prepared.stream.l0:
        assert time.monotonic() < deadline, "the slot forgets nothing at all"
        prepared.sql(f"INSERT INTO other VALUES ({len(confirmed)}, 'x')")
        confirmed.append(parse_lsn(prepared.slot("confirmed_flush_lsn::text")))
        assert confirmed[-1] <= max(prepared.spool.end(), prepared.stream.l0)
        time.sleep(0.02)
    stop.set()
    thread.join()
    prepared.catch_up()
    assert len(prepared.events()) == len(confirmed) - 1
    assert parse_lsn(prepared.slot("confirmed_flush_lsn::text")) <= prepared.spool.end()


def test_a_changed_table_is_told_in_its_place_and_the_others_go_on(prepared: Prepared) -> None:
    prepared.sql("INSERT INTO follows VALUES (1, 'a')")
    prepared.sql(
        "ALTER TABLE follows ADD extra uuid",
        "ALTER TABLE follows DROP tags",
        "INSERT INTO other VALUES (1, 'a')",
        "ALTER TABLE follows ALTER name TYPE varchar(9)",
        "INSERT INTO follows VALUES (2, 'b')",
    )
    prepared.sql("INSERT INTO other VALUES (2, 'b')")
    prepared.catch_up()
    prepared.catch_up()  # by another connection, which is told the same again
    note = "column name has another type (oid 1043, was text); column tags was dropped; column extra was added (type oid 2950)"
    assert [(e["relation"], e["op"], e["ordinal"], e["note"]) for e in prepared.events()] == [
        ("public.follows", "I", 0, None),
        ("public.other", "I", 0, None),
        ("public.follows", "R", 1, note),
        ("public.follows", "I", 2, None),
        ("public.other", "I", 0, None),
    ]
    place = format_lsn(next(event["lsn"] for event in prepared.events() if event["op"] == "R"))
    assert f"    public.follows: {note} (at {place})" in status(prepared.spec).lines()


def test_an_added_column_goes_on_and_status_says_so(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    prepared.sql("ALTER TABLE follows ADD extra uuid", "INSERT INTO follows VALUES (1, 'a')")
    for name in "bc":
        prepared.catch_up()
        prepared.sql(f"UPDATE follows SET name = '{name}'")
    prepared.catch_up()
    note = "public.follows: column extra was added (type oid 2950)"
    assert note in [record.getMessage() for record in caplog.records]
    assert [event["op"] for event in prepared.events()] == ["A", "I", "A", "U", "A", "U"], "each connection is told"
    assert len([line for line in status(prepared.spec).lines() if note in line]) == 1


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (
            "ALTER TABLE other REPLICA IDENTITY NOTHING",
            "column a is no longer part of the replica identity; column b is no",
        ),
        ("ALTER TABLE other RENAME TO elsewhere", "the table was renamed to public.elsewhere"),
        ("ALTER TABLE other RENAME b TO bee", "column b was dropped; column bee was added (type oid 25)"),
    ],
)
def test_other_changes_of_a_table(prepared: Prepared, change: str, note: str) -> None:
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    prepared.sql(change)
    name = "elsewhere" if "elsewhere" in change else "other"
    prepared.sql(f"INSERT INTO {name} VALUES (2, 'b')")
    if name != "other":
        prepared.sql("ALTER TABLE elsewhere RENAME TO other")  # else the publication is another one when capture connects
    prepared.catch_up()
    told = [event["note"] for event in prepared.events() if event["op"] == "R"]
    assert [text[: len(note)] for text in told[:1]] == [note]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ("ALTER TABLE follows ALTER tags TYPE text USING 'a,b'", "column tags has another type (oid 25, was text[])"),
        ("ALTER TABLE follows DROP name, ADD name text DEFAULT 'x'", "a column was dropped and added anew"),
        ("ALTER TABLE follows DROP big, ADD big text", "a column was dropped and added anew"),
    ],
)
def test_a_changed_column_stops_its_table_and_not_the_others(prepared: Prepared, change: str, note: str) -> None:
    prepared.sql(change)
    prepared.sql("INSERT INTO follows (id, tags) VALUES (1, NULL)")
    prepared.sql("UPDATE follows SET tags = '{a}' WHERE id = 1")
    prepared.sql("INSERT INTO other VALUES (1, 'goes on')")
    prepared.catch_up()
    assert [event["note"] for event in prepared.events() if event["op"] == "R"] == [note]
    assert [event["op"] for event in prepared.events() if event["relation"] == "public.other"] == ["I"]


def test_a_broken_connection_is_opened_anew(prepared: Prepared) -> None:
    stop = threading.Event()
    results: list[CaptureResult] = []
    ended = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s AND active_pid IS NOT NULL"
    thread = threading.Thread(target=lambda: results.append(capture(prepared.spec, stop=stop)))
    thread.start()
    for number in range(40):
        prepared.sql(f"INSERT INTO other VALUES ({number}, 'x'), ({number}, 'y')")
        while number % 10 == 5 and not prepared.old.execute(ended, [prepared.spec.slot]).fetchall():
            assert thread.is_alive()
            time.sleep(0.01)
        time.sleep(0.02)
    stop.set()
    thread.join()
    prepared.catch_up()
    assert [(e["row"]["a"], e["row"]["b"]) for e in prepared.events()] == [(str(n), b) for n in range(40) for b in "xy"]
    assert results[0].connections > 1


def test_a_server_that_stays_away_is_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_DSN", "host=127.0.0.1 port=1 dbname=gone user=x")
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"127.0.0.1:1/gone can't be reached"):
        capture(prepared.spec, patience=0.3)
    assert time.monotonic() - started < 60


def test_another_run_is_refused(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "LEASE_SECONDS", 0.1)
    with prepared.ledger.lease("capture"), pytest.raises(LeaseHeld, match="another capture"):
        capture(prepared.spec)


def test_a_slot_in_use_is_waited_for_and_named(prepared: Prepared) -> None:
    with connect(prepared.spec.source.dsn.resolve(), "thief", replication=True) as thief:
        command = f"START_REPLICATION SLOT {prepared.spec.slot} LOGICAL 0/0"
        thief.pgconn.exec_(f"{command} (proto_version '1', publication_names 'x')".encode())
        with pytest.raises(LeaseHeld, match="is active for PID"):
            capture(prepared.spec, patience=0.3)
        thief.pgconn.finish()
    prepared.catch_up()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE changeover.stream SET system_id = '1'", "system identifier is .* but 1 was prepared"),
        ("UPDATE changeover.stream SET timeline = 9", "timeline is 1, but 9 was prepared"),
        ("UPDATE changeover.stream SET slot = 'nowhere'", "replication slot is missing, but nowhere"),
        (
            "UPDATE changeover.stream SET publication = 'nothing'",
            "publication .* missing, but one with public.follows, public.other",
        ),
    ],
)
def test_another_stream_than_prepared_stops_the_run(prepared: Prepared, change: str, message: str) -> None:
    prepared.ledger.connection.execute(change)
    with pytest.raises(SourceChanged, match=message):
        capture(prepared.spec, patience=0)


def test_a_table_that_left_the_publication_stops_and_the_others_go_on(prepared: Prepared) -> None:
    prepared.sql(f"ALTER PUBLICATION {prepared.spec.slot} DROP TABLE follows")
    prepared.sql("INSERT INTO follows VALUES (1, 'lost')", "INSERT INTO other VALUES (1, 'goes on')")
    prepared.catch_up()
    assert [event["relation"] for event in prepared.events()] == ["public.other"]
    stopped = prepared.ledger.stopped().get("follows")
    assert stopped is not None
    assert "publication of public.follows is missing" in stopped
    assert prepared.ledger.stopped().get("public.other") is None


def test_a_slot_ahead_of_the_spool_stops_the_run(prepared: Prepared) -> None:
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    prepared.old.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [prepared.spec.slot])
    with pytest.raises(SpoolGap, match="changes between them are lost"):
        capture(prepared.spec)


@contextmanager
def keeping(connection: Connection, size: str) -> Iterator[None]:
    """Limit the WAL that the server keeps for slots."""
    connection.execute(f"ALTER SYSTEM SET max_slot_wal_keep_size = '{size}'".encode())
    connection.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        connection.execute("ALTER SYSTEM RESET max_slot_wal_keep_size")
        connection.execute("SELECT pg_reload_conf()")


def fill_segments(prepared: Prepared, count: int) -> None:
    """Have the server write WAL of other tables: 16 MB at a time."""
    for _ in range(count):
        prepared.old.execute("SELECT pg_logical_emit_message(false, 'noise', 'x'), pg_switch_wal()")
    prepared.old.execute("CHECKPOINT")


def test_the_alarm_comes_before_the_slot_is_lost(
    prepared: Prepared, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_writer, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(slot, "answer_interval", lambda _: 0.1)
    alarm = re.compile(
        f"slot {prepared.spec.slot} keeps [0-9,]+ bytes of WAL .wal_status [a-z]+.; [0-9,]+ bytes more and it is lost: see that"
        r" capture runs and keeps up and that no transaction stays open .* raise max_slot_wal_keep_size \(now 67,108,864 bytes\)"
    )

    def alarmed() -> bool:
        return any(alarm.fullmatch(record.getMessage()) for record in caplog.records)

    prepared.catch_up()
    assert not alarmed()
    with keeping(prepared.old, "64MB"), connect(prepared.spec.source.dsn.resolve(), "open", autocommit=False) as blocker:
        blocker.execute("INSERT INTO other VALUES (1, 'open')")
        filled = threading.Event()

        def until() -> bool:
            if not filled.is_set():  # while capture runs and keeps up
                assert not alarmed()
                fill_segments(prepared, 4)
                filled.set()
            return alarmed() or time.monotonic() > deadline

        deadline = time.monotonic() + 120
        capture(prepared.spec, until=until)
        assert alarmed()
        assert any(alarm.fullmatch(line.strip()) for line in status(prepared.spec).lines())
        blocker.rollback()
    deadline = time.monotonic() + 120  # a session takes a reloaded setting when it next looks
    while slot_alarm(prepared.old, prepared.spec.slot) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_slot_that_is_lost_under_a_capture_that_hangs_stops_it_with_reverse_replication(prepared: Prepared) -> None:
    process = child(prepared.spec)
    emit_marker(prepared.old, "running")
    wait_for(process, prepared.seen("running"))
    process.send_signal(signal.SIGSTOP)
    with keeping(prepared.old, "16MB"):
        deadline = time.monotonic() + 120
        while prepared.slot("wal_status") != "lost":
            assert time.monotonic() < deadline
            fill_segments(prepared, 3)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 3
    assert errors.strip().splitlines()[-1] == (
        f"the source's replication slot is invalidated, so that the WAL it needs is gone, but {prepared.spec.slot} was prepared:"
        " its change stream has a gap; `changeover prepare --anew SPEC` empties the target tables, and every chunk is copied again"
    )
    assert any("the slot has lost its WAL" in line for line in status(prepared.spec).lines())


def test_a_copy_of_the_source_that_was_promoted_is_another_source(
    prepared: Prepared, any_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    prepared.catch_up()
    database = prepared.old.info.dbname
    with tempfile.TemporaryDirectory(prefix="changeover-pg-") as parent:
        Path(parent).chmod(0o755)
        copy = Path(parent) / "copy"
        any_server.stop()
        subprocess.run(["cp", "-a", any_server.root, copy], check=True)
        any_server.restart()
        signal_file = copy / "data" / "standby.signal"
        signal_file.touch()
        owner = (copy / "data").stat()
        os.chown(signal_file, owner.st_uid, owner.st_gid)
        with EmbeddedServer.start(copy, settings=SETTINGS) as promoted:
            with connect(promoted.dsn(), "test") as session:
                session.execute("SELECT pg_promote()")
            monkeypatch.setenv("OLD_DSN", promoted.dsn(database))
            with pytest.raises(SourceChanged, match=r"the source's timeline is 2, but 1 was prepared: .*prepare --anew SPEC`"):
                capture(prepared.spec, patience=0)


def test_before_prepare(prepared: Prepared) -> None:
    with pytest.raises(StepOrder, match="changeover prepare"):
        capture(replace(prepared.spec, name="unprepared"))


def test_small_files_are_merged_under_a_reader(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_writer, "COMPACT_EVERY", 3)
    monkeypatch.setattr(spool_writer, "BATCH_SECONDS", 0.0)
    stop = threading.Event()
    thread = threading.Thread(target=capture, args=[prepared.spec], kwargs={"stop": stop})
    thread.start()
    spool, seen, number = prepared.spool, 0, 0
    while seen < 60:
        prepared.sql(f"INSERT INTO other VALUES ({number}, 'x')")
        number += 1
        found = [int(event["row"]["a"]) for event in spool.events().to_pylist(maps_as_pydicts="strict")]
        assert found == list(range(len(found)))
        assert len(found) >= seen
        seen = len(found)
    stop.set()
    thread.join()
    prepared.catch_up()
    assert [int(event["row"]["a"]) for event in prepared.events()] == list(range(number))
    assert spool._latest().get_add_actions().num_rows < 15, "of 60 appends and more"


def test_an_idle_stream_lets_other_tables_wal_go(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "FEEDBACK_SECONDS", 0.1)
    monkeypatch.setattr(slot, "answer_interval", lambda _: 0.1)
    prepared.sql("CREATE TABLE noise AS SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
    row = prepared.old.execute("SELECT pg_current_wal_lsn()::text").fetchone()
    assert row is not None
    deadline = time.monotonic() + 120
    target = parse_lsn(row[0]) - spool_writer.IDLE_STEP
    capture(prepared.spec, until=lambda: prepared.spool.end() >= target or time.monotonic() > deadline)
    assert prepared.spool.end() >= target
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    prepared.catch_up()
    assert len(prepared.events()) == 1


def test_ctrl_c_ends_cleanly(prepared: Prepared) -> None:
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    process = child(prepared.spec)
    while prepared.spool.end() == 0:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert parse_lsn(prepared.slot("confirmed_flush_lsn::text")) == prepared.spool.end()


def test_memory_does_not_grow_with_a_transaction(prepared: Prepared) -> None:
    process = child(prepared.spec)
    emit_marker(prepared.old, "running")
    wait_for(process, prepared.seen("running"))
    before = peak_megabytes(process)
    wide = "SELECT i, repeat(md5(i::text), 4), ARRAY['a', 'b'] FROM generate_series(1, 200000) i"
    prepared.sql(f"INSERT INTO follows {wide}", "SELECT pg_logical_emit_message(true, 'changeover', 'done')")
    wait_for(process, prepared.seen("done"))
    grown = peak_megabytes(process) - before
    process.terminate()
    process.communicate()
    assert grown < 160, f"{grown:.0f} MB: held whole, it takes twice that"
    assert [int(event["row"]["id"]) for event in prepared.events() if event["op"] == "I"] == list(range(1, 200_001))


KILLED_MIDWAY = """
import os, signal, sys
from changeover.jobs.capture import catchup
from changeover.jobs.capture.service import main
from changeover.jobs.spool.table import Spool

append, catchup.TAKE_BYTES = Spool.append, 1 << 19

def once_more(spool, batch, end):
    append(spool, batch, end)
    if spool.held()[1] >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    if any(event["op"] == "T" for event in batch.to_pylist()):
        sys.exit("all of it is there")

Spool.append = once_more
main([sys.argv[1]])
"""
"""Capture that is killed after the part with which so much of a transaction is there: from outside it may be too late."""


def test_a_large_transaction_killed_midway_is_there_once_and_seen_only_whole(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared.sql("INSERT INTO other VALUES (1, 'before')")
    prepared.catch_up()
    prepared.sql(
        "INSERT INTO follows SELECT i FROM generate_series(1, 140000) i",
        "ALTER TABLE follows ADD extra integer",
        "INSERT INTO follows SELECT i FROM generate_series(140001, 300000) i",
        "TRUNCATE other",
    )
    for parts in (1, 3, 5):
        wanted = 2 * parts * 38_000
        command = [sys.executable, "-c", KILLED_MIDWAY, prepared.spec.path, str(wanted)]
        killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert prepared.spool.held()[1] >= wanted
        assert prepared.spool.held()[0] >= prepared.spool.end(), "it was killed before the last part"
        assert parse_lsn(prepared.slot("confirmed_flush_lsn::text")) <= prepared.spool.end()
        assert [event["row"]["b"] for event in prepared.events()] == ["before"]
    monkeypatch.setattr(spool_writer, "BATCH_EVENTS", 7001)  # parts that end where none did before
    prepared.catch_up()
    events = prepared.events()[1:]
    assert [int(event["row"]["id"]) for event in events if event["op"] == "I"] == list(range(1, 300_001))
    assert [(e["op"], e["ordinal"]) for e in events if e["op"] != "I"] == [("A", 279_999), ("T", 600_000)]
    assert [event["ordinal"] for event in events if event["op"] != "A"] == list(range(0, 600_002, 2))


def test_a_batch_is_bounded_in_bytes_too(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_writer, "BATCH_BYTES", 100_000)
    prepared.sql("INSERT INTO follows SELECT i, repeat('x', 10000) FROM generate_series(1, 100) i")
    assert prepared.catch_up().appends >= 10
    assert [int(event["row"]["id"]) for event in prepared.events()] == list(range(1, 101))


def test_what_was_rolled_back_to_a_savepoint_never_comes(prepared: Prepared) -> None:
    many = "INSERT INTO follows SELECT i, 'gone' FROM generate_series({}, {}) i"
    prepared.sql(
        "INSERT INTO follows VALUES (1, 'kept')",
        "SAVEPOINT a", many.format(100, 5000), "SAVEPOINT b", "INSERT INTO other VALUES (1, 'gone')", "ROLLBACK TO a",
        "SAVEPOINT c", "INSERT INTO follows VALUES (2, 'kept')", "SAVEPOINT d", "DELETE FROM follows WHERE id = 1", "RELEASE d",
        "SAVEPOINT e", "TRUNCATE follows", "ROLLBACK TO e", "RELEASE c", "UPDATE follows SET name = 'end' WHERE id = 2",
    )  # fmt: skip
    prepared.sql("SAVEPOINT a", "INSERT INTO other VALUES (2, 'gone')", "ROLLBACK TO a")
    with pytest.raises(psycopg.errors.DivisionByZero):
        prepared.sql(many.format(10, 30_000), "SELECT 1 / 0")
    prepared.catch_up()
    told = [(e["op"], (e["row"] or e["key"])["id"], e["ordinal"]) for e in prepared.events()]
    assert told == [("I", "1", 0), ("I", "2", 2), ("D", "1", 4), ("U", "2", 6)]


@pytest.mark.parametrize("running", [True, False], ids=["while it runs", "while it is down"])
def test_a_prepared_transaction_comes_when_it_is_committed_and_at_that_place(prepared: Prepared, running: bool) -> None:
    kept, gone = f"{prepared.spec.name} kept", f"{prepared.spec.name} gone"
    stop = threading.Event()
    thread = threading.Thread(target=capture, args=[prepared.spec], kwargs={"stop": stop})
    if running:
        thread.start()
    for name, values in ((kept, "(1, 'prepared')"), (gone, "(2, 'rolled back')")):
        for statement in ("BEGIN", f"INSERT INTO other VALUES {values}", f"PREPARE TRANSACTION '{name}'"):
            prepared.old.execute(statement.encode())
    prepared.sql("INSERT INTO other VALUES (3, 'between')")
    if running:
        while not prepared.events():
            time.sleep(0.02)
    else:
        prepared.catch_up()
    assert [event["row"]["b"] for event in prepared.events()] == ["between"]
    prepared.old.execute(f"COMMIT PREPARED '{kept}'".encode())
    prepared.old.execute(f"ROLLBACK PREPARED '{gone}'".encode())
    prepared.sql("INSERT INTO other VALUES (4, 'after')")
    if running:
        while len(prepared.events()) < 3:
            time.sleep(0.02)
        stop.set()
        thread.join()
    prepared.catch_up()
    events = prepared.events()
    assert [event["row"]["b"] for event in events] == ["between", "prepared", "after"]
    assert [event["ordinal"] for event in events] == [0, 0, 0]
    assert sorted(event["lsn"] for event in events) == [event["lsn"] for event in events]


def test_errors_are_one_sentence(prepared: Prepared, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "none.toml")]) == 2
    assert "can't be read" in capsys.readouterr().err
    prepared.sql(f"DROP PUBLICATION {prepared.spec.slot}")
    assert main([prepared.spec.path]) == 3
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("the source's publication")


def test_kill_9_loses_nothing_and_repeats_nothing(prepared: Prepared) -> None:
    writers = [Writer(prepared.spec.source.dsn.resolve(), seed) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    rounds = 5
    for _ in range(rounds):
        process = child(prepared.spec)
        before = prepared.spool.end()
        while prepared.spool.end() == before:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        time.sleep(random.random() * 0.3)
        process.kill()
        process.communicate()
    for writer in writers:
        writer.stop.set()
        writer.join()
    prepared.catch_up()
    require_all_of(prepared, writers)
