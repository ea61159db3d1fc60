"""Catch-up in rounds: the stream's events, a hand-over to it under writers, kills, refusals, bounds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from changeover import failpoints
from changeover.jobs.capture import catchup
from changeover.jobs.capture.feed import Feed
from changeover.jobs.capture.service import capture
from changeover.jobs.capture.slot import SlotRun
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.source.replication import CATCHUP
from changeover.jobs.spool import writer as spool_writer
from changeover.jobs.spool.table import Spool
from changeover.jobs.spool.writer import CaptureResult
from changeover.jobs.status import status
from changeover.position import parse_lsn
from changeover.session import Connection, application_name, connect
from tests.support.fix_capture import Prepared, Writer, child, peak_megabytes, require_all_of, wait_for

ALWAYS = {"FAR_BYTES": 1, "NEAR_BYTES": 1}


@pytest.fixture
def small_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read whatever there is in rounds of a few transactions."""
    for name, value in {**ALWAYS, "ROUND_BYTES": 20_000, "TAKE_BYTES": 2_000}.items():
        monkeypatch.setattr(catchup, name, value)


@contextmanager
def writing(prepared: Prepared, count: int = 2) -> Iterator[list[Writer]]:
    """Have writers write while the block lasts."""
    writers = [Writer(prepared.spec.source.dsn.resolve(), seed) for seed in range(count)]
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.stop.set()
        for writer in writers:
            writer.join()


def move_on(connection: Connection, segments: int) -> None:
    """Have the server's position move on by 16 MB at a time, with next to no WAL."""
    for _ in range(segments):
        connection.execute("SELECT pg_logical_emit_message(false, 'noise', 'x'), pg_switch_wal()")


def position(connection: Connection) -> int:
    """Return the server's position, durable there."""
    connection.execute("SELECT pg_logical_emit_message(true, 'noise', 'x')")
    row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
    assert row is not None
    return parse_lsn(row[0])


def by_stream(prepared: Prepared, slot: str, path: Path, until: int) -> list[dict[str, Any]]:
    """Return what another slot brings by the stream alone."""
    spool = Spool(path)
    spool.create()
    tables = {t.source_relation: prepared.ledger.source_table(t.source)[1] for t in prepared.spec.tables}
    feed = Feed(prepared.spec.source.dsn.resolve(), replace(prepared.stream, slot=slot), tables, spool)
    run = SlotRun(prepared.spec, feed, threading.Event(), lambda: spool.end() >= until, 0, CaptureResult())
    run.in_rounds = False
    run.run()
    return [event for event in spool.events(until=until).to_pylist() if event["op"] != "A"]


def test_turns_bring_what_the_stream_brings(prepared: Prepared, small_turns: None, tmp_path: Path) -> None:
    other = f"{prepared.spec.slot}_2"
    prepared.old.execute("SELECT pg_copy_logical_replication_slot(%s, %s)", [prepared.spec.slot, other])
    with writing(prepared), connect(prepared.spec.source.dsn.resolve(), "open", autocommit=False) as long:
        long.execute("INSERT INTO other SELECT i, 'long' FROM generate_series(1, 3000) i")
        prepared.sql(f"INSERT INTO follows VALUES (100, 'größe', '{{a,NULL}}', '{'x' * 5000}')")
        prepared.sql("INSERT INTO other VALUES (0, 'b')")
        prepared.sql("UPDATE follows SET name = 'n' WHERE id = 100", "UPDATE follows SET id = 101 WHERE id = 100")
        prepared.sql("SAVEPOINT a", "INSERT INTO other VALUES (9, 'gone')", "ROLLBACK TO a", "DELETE FROM other WHERE a = 0")
        prepared.old.execute("BEGIN; INSERT INTO other VALUES (-1, 'prepared')")
        prepared.old.execute(f"PREPARE TRANSACTION '{prepared.spec.name}'".encode())
        prepared.old.execute("SELECT pg_logical_emit_message(false, 'changeover', 'of no transaction')")
        prepared.sql("ALTER TABLE follows ADD extra integer", "UPDATE follows SET extra = 1 WHERE id = 101")
        time.sleep(0.5)
        long.commit()
        prepared.old.execute(f"COMMIT PREPARED '{prepared.spec.name}'".encode())
        prepared.sql("TRUNCATE other")
        emit_marker(prepared.old, "marked")
        time.sleep(0.2)
    end = position(prepared.old)
    result = capture(prepared.spec, until=lambda: prepared.spool.end() >= end)
    assert result.connections == 0, "nothing was streamed"
    streamed = by_stream(prepared, other, tmp_path / "streamed", end)
    read = [event for event in prepared.spool.events(until=end).to_pylist() if event["op"] != "A"]
    assert len(read) > 3000
    assert read == streamed, "which says in each round that a column was added, and else the same"
    assert parse_lsn(prepared.slot("confirmed_flush_lsn::text")) == prepared.spool.end()


def test_turns_and_stream_hand_over_under_writers(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FAR_BYTES": 100_000, "NEAR_BYTES": 50_000, "ROUND_BYTES": 50_000}.items():
        monkeypatch.setattr(catchup, name, value)
    rounds: list[int] = []
    taken = SlotRun._round

    def counted(self: SlotRun, *arguments: Any) -> None:
        rounds.append(self.intake.durable)
        taken(self, *arguments)

    monkeypatch.setattr(SlotRun, "_round", counted)
    stop, results = threading.Event(), []
    with writing(prepared, 3) as writers:
        thread = threading.Thread(target=lambda: results.append(capture(prepared.spec, stop=stop)))
        time.sleep(0.5)
        thread.start()
        for tries in range(20):
            time.sleep(0.4 * 1.2**tries)  # long enough in the end, on whatever machine, for a connection to get to a round
            assert thread.is_alive(), "capture has ended by itself"
            acknowledged = parse_lsn(prepared.slot("confirmed_flush_lsn::text"))
            assert acknowledged <= max(prepared.spool.end(), prepared.stream.l0)
            if len(set(rounds)) > 3 and tries > 6:  # with rounds so small and writers so fast, some machine never gets near
                break
            prepared.old.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 300000))")
            prepared.old.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s", [prepared.spec.slot]
            )
    stop.set()
    thread.join()
    prepared.catch_up()
    assert len(set(rounds)) > 3
    require_all_of(prepared, writers)


@pytest.mark.parametrize("point", ["catchup-read", "catchup-durable", "catchup-acknowledged"])
def test_a_kill_in_a_turn_loses_nothing_and_repeats_nothing(prepared: Prepared, tmp_path: Path, point: str) -> None:
    with writing(prepared) as writers:
        for number in range(3):
            time.sleep(0.2)
            move_on(prepared.old, 2)
            reached = tmp_path / f"reached {number}"
            process = child(prepared.spec, CHANGEOVER_WAIT_AT=f"{point}:{reached}")
            wait_for(process, reached.is_file)
            state = status(prepared.spec).stream
            process.kill()
            process.communicate()
            acknowledged = parse_lsn(prepared.slot("confirmed_flush_lsn::text"))
            assert acknowledged <= max(prepared.spool.end(), prepared.stream.l0)
            assert (acknowledged == prepared.spool.end()) == (point == "catchup-acknowledged")
            assert state["slot"] == "active", "also where the slot is at rest"
    prepared.catch_up()
    require_all_of(prepared, writers)


def test_a_turn_without_a_change_ends_a_failing_spell(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ALWAYS.items():
        monkeypatch.setattr(catchup, name, value)
    for _ in range(8):
        prepared.old.execute("SELECT pg_create_restore_point('nothing to decode'), pg_switch_wal()")
    cut: list[str] = []

    def cut_off(name: str, *said: object) -> None:
        if name == "catchup-durable" and len(cut) < 2:
            cut.append(name)
            session = application_name(prepared.spec.name, CATCHUP)
            prepared.old.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", [session])

    monkeypatch.setattr(failpoints, "reach", cut_off)
    end = position(prepared.old)
    capture(prepared.spec, until=lambda: prepared.spool.end() >= end, patience=0)
    assert len(cut) == 2, "with no patience the second one would have been the end"


def test_what_the_server_refuses_is_streamed(prepared: Prepared, small_turns: None, caplog: pytest.LogCaptureFixture) -> None:
    database = psycopg.sql.Identifier(prepared.old.info.dbname)
    prepared.old.execute(psycopg.sql.SQL("ALTER DATABASE {} SET temp_file_limit = '64kB'").format(database))
    prepared.sql("INSERT INTO other SELECT i, 'refused' FROM generate_series(1, 100000) i")
    assert prepared.catch_up().connections == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    refusal = "the slot can't be caught up with in rounds, the stream brings it: temporary file size exceeds"
    assert [line for line in said if line.startswith(refusal)]
    assert [int(event["row"]["a"]) for event in prepared.events()] == list(range(1, 100_001))


def test_a_turn_is_bounded_and_what_may_outgrow_it_is_streamed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = 16 << 20
    with connect(prepared.spec.source.dsn.resolve(), "open", autocommit=False) as open_transaction:
        open_transaction.execute("INSERT INTO other VALUES (1, 'open')")
        move_on(prepared.old, 3)
        begin = prepared.stream.l0
        far = catchup.round_end(prepared.old, prepared.spec.slot, begin, catchup.FAR_BYTES)
        assert far is not None
        assert catchup.ROUND_BYTES <= far - begin < 2 * segment, "not all of the three segments"
        assert catchup.round_end(prepared.old, prepared.spec.slot, begin + 2 * segment, 2 * segment) is None, "near"
        later = catchup.round_end(prepared.old, prepared.spec.slot, begin + 2 * segment, 1)
        assert later is not None
        assert later <= position(prepared.old)
        monkeypatch.setattr(catchup, "REACH_BYTES", 2 * segment)
        assert catchup.round_end(prepared.old, prepared.spec.slot, begin + 2 * segment, 1) is None, (
            "it reads from the transaction on"
        )
        open_transaction.commit()
    assert prepared.catch_up().connections == 1
    assert [event["row"]["b"] for event in prepared.events()] == ["open"]


def test_a_role_that_may_replicate_may_read_the_backlog(prepared: Prepared) -> None:
    role = psycopg.sql.Identifier(prepared.spec.name)
    prepared.old.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD 'x'").format(role))
    prepared.sql("INSERT INTO other VALUES (1, 'a')")
    dsn = psycopg.conninfo.make_conninfo(prepared.spec.source.dsn.resolve(), user=prepared.spec.name, password="x")
    end = position(prepared.old)
    with catchup.reading(dsn, prepared.spec.name, prepared.stream) as reader:
        assert catchup.round_end(reader.connection, prepared.spec.slot, prepared.stream.l0, 1) is not None
        for _ in range(2):  # to read consumes nothing
            kinds = b"".join(bytes(wire.kind) for wire in reader.read(end) if wire is not None)
            assert kinds.count(b"I") == 1
        reader.acknowledge(end)
        assert parse_lsn(prepared.slot("confirmed_flush_lsn::text")) == end
        reader.acknowledge(prepared.stream.l0)  # which lies behind: no error, no effect
        assert not [wire for wire in reader.read(end) if wire is not None]
    prepared.old.execute(psycopg.sql.SQL("DROP ROLE {}").format(role))


def test_a_run_that_is_stopped_in_a_turn_lets_the_slot_go(
    prepared: Prepared, small_turns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_writer, "BATCH_EVENTS", 5_000)
    monkeypatch.setattr(catchup, "TAKE_BYTES", 100_000)
    prepared.sql("INSERT INTO other SELECT i, 'x' FROM generate_series(1, 80000) i")
    stop = threading.Event()
    monkeypatch.setattr(failpoints, "reach", lambda *said: stop.set() if prepared.spool.held()[1] > 0 else None)
    capture(prepared.spec, stop=stop)
    assert prepared.spool.held()[1] > 0
    assert prepared.events() == [], "none of it is whole"
    deadline = time.monotonic() + 5
    while prepared.slot("active"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    prepared.catch_up()
    assert [int(event["row"]["a"]) for event in prepared.events()] == list(range(1, 80_001))


def test_a_run_that_has_what_it_is_for_ends_its_turn_and_reads_none_of_it_again(
    prepared: Prepared, small_turns: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_writer, "BATCH_EVENTS", 100)
    monkeypatch.setattr(catchup, "ROUND_BYTES", 16 << 20)
    loop = "FOR i IN 1..2000 LOOP INSERT INTO other VALUES (i, 'x'); COMMIT; END LOOP"
    prepared.old.execute(f"DO $$ BEGIN {loop}; END $$".encode())
    capture(prepared.spec, until=lambda: prepared.spool.end() > prepared.stream.l0)
    assert len(prepared.events()) == 2000, "though it ended after the first hundred"
    assert parse_lsn(prepared.slot("confirmed_flush_lsn::text")) == prepared.spool.end()


def test_memory_does_not_grow_with_a_transaction_of_the_backlog(prepared: Prepared, tmp_path: Path) -> None:
    peaks, ends = [], []
    for rows in (1_000, 200_000):
        wide = f"SELECT i, repeat(md5(i::text), 4), ARRAY['a', 'b'] FROM generate_series(1, {rows}) i"
        prepared.sql("DELETE FROM follows", f"INSERT INTO follows {wide}")
        move_on(prepared.old, 2)
        reached = tmp_path / f"reached {rows}"
        process = child(prepared.spec, CHANGEOVER_WAIT_AT=f"catchup-durable:{reached}")
        wait_for(process, reached.is_file)
        peaks.append(peak_megabytes(process))
        process.kill()
        process.communicate()
        ends.append(prepared.spool.end())
        prepared.catch_up()
    assert len(prepared.events()) == 202_000
    assert peaks[1] - peaks[0] < 160, f"{peaks} MB: held whole, it takes twice that"
