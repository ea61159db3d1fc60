"""The stream's definition by value and by identity: what alters it is found, taken back or not, and what is harmless is none."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence

import psycopg
import pytest
from psycopg import sql

from changeover.errors import SourceChanged
from changeover.jobs.capture.service import capture
from changeover.jobs.guarantee import definition
from changeover.jobs.guarantee.assumptions import Asked, Moment, sentences, stop
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.source import stream
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool import writer
from tests.support.fix_capture import Prepared

ALTERED = {
    "dropped": ["DROP PUBLICATION {p}"],
    "made anew": ["DROP PUBLICATION {p}", "CREATE PUBLICATION {p} FOR TABLE follows, other"],
    "renamed and back": ["ALTER PUBLICATION {p} RENAME TO elsewhere", "ALTER PUBLICATION elsewhere RENAME TO {p}"],
    "fewer operations": ["ALTER PUBLICATION {p} SET (publish = 'insert')"],
    "fewer operations and back": [
        "ALTER PUBLICATION {p} SET (publish = 'insert')",
        "ALTER PUBLICATION {p} SET (publish = 'insert, update, delete, truncate')",
    ],
    "a schema more": ["ALTER PUBLICATION {p} ADD TABLES IN SCHEMA public"],
    "a table more": ["CREATE TABLE more (id int PRIMARY KEY)", "ALTER PUBLICATION {p} ADD TABLE more"],
}
"""What concerns all tables."""

ONE = {
    "left": ["ALTER PUBLICATION {p} DROP TABLE follows"],
    "left and back": ["ALTER PUBLICATION {p} DROP TABLE follows", "ALTER PUBLICATION {p} ADD TABLE follows"],
    "row filter": ["ALTER PUBLICATION {p} SET TABLE follows WHERE (id > 10), other"],
    "row filter and back": [
        "ALTER PUBLICATION {p} SET TABLE follows WHERE (id > 10), other", "ALTER PUBLICATION {p} SET TABLE follows, other",
    ],
    "column list": ["ALTER PUBLICATION {p} SET TABLE follows (id), other"],
    "column list and back": [
        "ALTER PUBLICATION {p} SET TABLE follows (id), other", "ALTER PUBLICATION {p} SET TABLE follows, other",
    ],
    "no identity": ["ALTER TABLE follows REPLICA IDENTITY NOTHING"],
    "key dropped and back": ["ALTER TABLE follows DROP CONSTRAINT follows_pkey", "ALTER TABLE follows ADD PRIMARY KEY (id)"],
    "another key": ["CREATE UNIQUE INDEX again ON follows (id)", "ALTER TABLE follows REPLICA IDENTITY USING INDEX again"],
}  # fmt: skip
"""What concerns one table, `follows`."""

HARMLESS = [
    "ANALYZE follows", "VACUUM (FREEZE) follows", "VACUUM FULL pg_publication", "VACUUM FULL pg_publication_rel",
    "GRANT SELECT ON follows TO PUBLIC", "CREATE INDEX ON follows (name)", "REINDEX INDEX follows_pkey",
    "REINDEX TABLE CONCURRENTLY follows", "ALTER TABLE follows REPLICA IDENTITY FULL",
    "ALTER TABLE follows REPLICA IDENTITY DEFAULT", "ALTER TABLE follows ADD more int",
    "ALTER TABLE follows RENAME TO elsewhere; ALTER TABLE elsewhere RENAME TO follows", "COMMENT ON PUBLICATION {p} IS 'x'",
    "ALTER PUBLICATION {p} SET TABLE follows, other",
]  # fmt: skip
"""What changes neither what is published nor how a row is told, in this order."""


SINCE_15 = re.compile(r"TABLES IN SCHEMA|follows WHERE|follows \(id\), other")
"""Forms of a publication that an older release refuses, so that nobody can alter one so."""


def alter(prepared: Prepared, statements: Sequence[str]) -> bool:
    """Run statements; False where the release has not the first one's form, which it is seen to refuse."""
    name = sql.Identifier(prepared.spec.slot).as_string(prepared.old)
    if prepared.old.info.server_version < 150000 and SINCE_15.search(statements[0]):
        with pytest.raises(psycopg.errors.SyntaxError):
            prepared.old.execute(statements[0].format(p=name).encode())
        return False
    for statement in statements:
        prepared.old.execute(statement.format(p=name).encode())
    return True


def told(prepared: Prepared) -> list[str]:
    return sentences(Moment.WATCH, Asked(prepared.spec, prepared.old, prepared.ledger))


def test_what_is_harmless_is_no_change(prepared: Prepared) -> None:
    for statement in HARMLESS:
        alter(prepared, [statement])
        changes = told(prepared)
        assert changes == [], statement


@pytest.mark.parametrize("altered", ALTERED)
def test_a_changed_publication_stops_all_tables(prepared: Prepared, altered: str) -> None:
    if not alter(prepared, ALTERED[altered]):
        return
    with pytest.raises(SourceChanged, match="its change stream has a gap; `changeover prepare --anew SPEC`"):
        capture(prepared.spec)
    for table in prepared.spec.tables:
        assert "may be in no event" in (prepared.ledger.stopped().get(table.source) or ""), table.source


@pytest.mark.parametrize("altered", ONE)
def test_what_concerns_a_table_stops_it_alone(prepared: Prepared, altered: str) -> None:
    if not alter(prepared, ONE[altered]):
        return
    assert [one for one in told(prepared) if "follows" not in one] == []
    [stopped] = stop(Moment.WATCH, Asked(prepared.spec, prepared.old, prepared.ledger))
    assert stopped.startswith("follows: ")
    assert prepared.ledger.stopped().get("follows") is not None
    assert prepared.ledger.stopped().get("public.other") is None


def test_a_row_filter_is_told_without_its_values(prepared: Prepared) -> None:
    if not alter(prepared, ["ALTER PUBLICATION {p} SET TABLE follows WHERE (name = 'secret'), other"]):
        return
    [one] = told(prepared)
    assert "row filter: one, was none" in one
    assert "secret" not in one


@pytest.mark.parametrize("altered", ["dropped", "left and back", "fewer operations and back"])
def test_a_capture_that_runs_sees_it_at_its_watch(prepared: Prepared, altered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(stream, "FEEDBACK_SECONDS", 0.2)  # a quiet stream is looked at as often as it is answered
    failed: list[BaseException] = []

    def run() -> None:
        try:
            capture(prepared.spec, stop=ended)
        except SourceChanged as error:
            failed.append(error)

    ended = threading.Event()
    service = threading.Thread(target=run)
    service.start()
    try:
        emit_marker(prepared.old, "running")
        wait(lambda: "running" in prepared.spool.events()["note"].to_pylist())
        alter(prepared, {**ALTERED, **ONE}[altered])
        prepared.sql("INSERT INTO other VALUES (1, 'x')")
        wait(lambda: prepared.ledger.stopped().get("follows") is not None)
        if altered != "left and back":
            wait(lambda: bool(failed))
    finally:
        ended.set()
        service.join()
    assert all("prepare --anew" in str(error) for error in failed)


def wait(condition: object) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_was_never_recorded_is_no_definition(prepared: Prepared) -> None:
    prepared.ledger.connection.execute("UPDATE changeover.stream SET definition = '[]' WHERE migration = %s", [prepared.spec.name])
    assert told(prepared) != []


def test_a_definition_comes_back_as_it_was_recorded(prepared: Prepared) -> None:
    pieces = definition.recorded(prepared.ledger, OLD)
    assert {piece.kind for piece in pieces} == {definition.PUBLICATION, definition.MEMBER, definition.KEY}
    definition.record(prepared.ledger, OLD, pieces)
    assert definition.recorded(prepared.ledger, OLD) == pieces
    assert definition.compared(pieces, pieces) == []
