"""Waiting for a position: one that an idle server would never come to is passed by a marker, and a dead capture is named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from changeover.errors import CouldNotFinish
from changeover.jobs.capture.service import capture
from changeover.jobs.ledger.lease import is_held
from changeover.jobs.source.marker import mark
from changeover.jobs.spool import waiting
from changeover.jobs.spool.waiting import await_spool
from changeover.position import format_lsn
from changeover.session import connect
from tests.support.fix_capture import Prepared
from tests.support.fix_flags import wait_until


@contextmanager
def capturing(prepared: Prepared) -> Iterator[None]:
    stop = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            capture(prepared.spec, stop=stop)
        except BaseException as error:
            failed.append(error)

    service = threading.Thread(target=run)
    service.start()
    try:
        yield
    finally:
        stop.set()
        service.join()
    assert not failed, failed


@pytest.mark.parametrize("commits", ["on", "off"])
def test_a_position_that_an_idle_server_never_comes_to_is_passed_by_its_marker(prepared: Prepared, commits: str) -> None:
    database = psycopg.sql.Identifier(prepared.old.info.dbname)
    prepared.old.execute(psycopg.sql.SQL("ALTER DATABASE {} SET synchronous_commit = {}").format(database, commits))
    with capturing(prepared), connect(prepared.spec.source.dsn.resolve(), "test") as idle:
        for _ in range(2):
            idle.execute("SELECT pg_logical_emit_message(false, 'noise', 'x'), pg_switch_wal()")
            beyond = idle.execute("SELECT pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()").fetchone()
            assert beyond is not None
            place = mark(idle, "waited for")
            flushed = idle.execute("SELECT pg_current_wal_flush_lsn() - %s::pg_lsn > 0", [format_lsn(place)]).fetchone()
            assert flushed == (True,)
            await_spool(prepared.ledger, prepared.spool, place, "the stream")
            assert prepared.spool.end() >= place


def test_a_capture_that_is_not_alive_is_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "DEAD_SECONDS", 0.2)
    place = mark(prepared.old, "nobody comes")
    with pytest.raises(CouldNotFinish, match=r"capture is not running: it has the stream up to .*`changeover capture SPEC`"):
        await_spool(prepared.ledger, prepared.spool, place, "the stream")
    await_spool(prepared.ledger, prepared.spool, place, "the stream", enough=lambda: True)


def test_a_capture_that_is_alive_is_given_time_while_it_brings_something(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "DEAD_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "STILL_SECONDS", 1.0)
    assert not is_held(prepared.ledger.connection, prepared.spec.name, "capture")
    place = mark(prepared.old, "late")
    with prepared.ledger.lease("capture"):  # alive, and brings nothing
        assert is_held(prepared.ledger.connection, prepared.spec.name, "capture")
        with pytest.raises(CouldNotFinish, match="capture runs and has brought nothing for 1 s"):
            await_spool(prepared.ledger, prepared.spool, place, "the stream")
    wait_until(lambda: not is_held(prepared.ledger.connection, prepared.spec.name, "capture"))  # its session ends by itself
