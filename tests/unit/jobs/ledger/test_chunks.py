"""Chunks: the ledger's claims and marks in SQL against the rule in Python, for any attempts in any order."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from changeover.jobs.ledger.chunks import acknowledged, mergeable
from changeover.jobs.ledger.ledger import Ledger, mark_loaded
from changeover.session import Connection, connect
from tests.model.gate import Chunk, claimed, closable, markable

PLACE = ("moved", "public.kept", "new")


@pytest.fixture
def connection(new_dsn: str) -> Iterator[Connection]:
    with connect(new_dsn, "test") as session:
        Ledger(session, PLACE[0], new_dsn).create()
        session.execute("INSERT INTO changeover.migration (name, format, spec_digest, spec) VALUES (%s, 1, '', '{}')", PLACE[:1])
        yield session


def kept(connection: Connection) -> tuple[Chunk, ...]:
    """Return the chunks as the ledger has them."""
    rows = connection.execute("SELECT token, loaded IS NOT NULL FROM changeover.chunk ORDER BY chunk").fetchall()
    return tuple(Chunk(*row) for row in rows)


@pytest.mark.parametrize("seed", range(8))
def test_the_ledger_claims_and_marks_by_the_rule(connection: Connection, new_dsn: str, seed: int) -> None:
    random, ledger = Random(seed), Ledger(connection, PLACE[0], new_dsn)
    ledger.record_load(*PLACE[1:], 0, True)
    ledger.record_chunks(*PLACE[1:], [(None, ("5",)), (("5",), ("9",)), (("9",), None)])
    chunks: tuple[Chunk, ...] = (Chunk(), Chunk(), Chunk())
    for _ in range(20):
        if random.random() < 0.3:
            token, chunks = claimed(chunks)
            assert ledger.claim(*PLACE[1:]) == token
        number, token = random.randrange(3), random.randint(1, 1 + max(chunk.token for chunk in chunks))
        marks = markable(chunks[number], token)
        with connection.cursor() as cursor:
            assert mark_loaded(cursor, *PLACE, number, token, (0, 0), 0.0) is marks
        if marks:
            chunks = (*chunks[:number], chunks[number]._replace(loaded=True), *chunks[number + 1 :])
        assert kept(connection) == chunks


def test_a_table_is_closed_when_all_is_in_and_was_read_from_its_file() -> None:
    loaded, pending = (Chunk(1, True),), (Chunk(1, True), Chunk(2))
    assert closable(loaded, 7, 7, False)
    assert not closable(pending, 7, 7, False)
    assert not closable(loaded, 7, 8, False)
    assert closable(loaded, 7, 8, True)
    assert not closable(loaded, 7, None, True)


def test_a_blind_append_comes_before_all_changes() -> None:
    assert mergeable(True, False)
    assert mergeable(False, True)
    assert not mergeable(False, False)


def test_only_what_is_durable_is_acknowledged() -> None:
    assert acknowledged(100, 200) == 100
