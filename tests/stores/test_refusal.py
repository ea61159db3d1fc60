"""The refusal of one table is its own, whatever other tables of the database are called."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from changeover.session import Connection, connect
from changeover.stores import refusal
from changeover.stores.gate import FENCED, NAME_BYTES, ours

LONG = "n" * NAME_BYTES
ACCENTS = "é" * (NAME_BYTES // 2)


@pytest.fixture
def namesakes(new_dsn: str) -> Iterator[Connection]:
    with connect(new_dsn, "test") as connection:
        for schema in ("one", "two"):
            connection.execute(sql.SQL("CREATE SCHEMA {0}; CREATE TABLE {0}.kept (id integer)").format(sql.Identifier(schema)))
            refusal.install(connection, schema, "kept", refusal.Refusal(begun=refusal.Refused(1)), time.monotonic() + 60)
        yield connection


def refused(connection: Connection, schema: str) -> bool:
    """Return whether a write from outside of the gate is refused."""
    try:
        connection.execute(sql.SQL("INSERT INTO {}.kept VALUES (1)").format(sql.Identifier(schema)))
    except psycopg.Error as error:
        if error.sqlstate != FENCED:
            raise
        return True
    return False


def test_a_refusal_that_ends_leaves_the_namesakes(namesakes: Connection) -> None:
    refusal.install(namesakes, "two", "kept", refusal.Refusal(begun=refusal.Refused(1)), time.monotonic() + 0.05)
    time.sleep(0.1)
    assert (refused(namesakes, "one"), refused(namesakes, "two")) == (True, False)


def test_a_refusal_that_is_removed_leaves_the_namesakes(namesakes: Connection) -> None:
    refusal.remove(namesakes, "two", "kept")
    assert (refused(namesakes, "one"), refused(namesakes, "two")) == (True, False)
    refusal.remove(namesakes, "one", "kept")
    assert not refused(namesakes, "one")
    assert namesakes.execute("SELECT FROM pg_proc WHERE pronamespace = to_regnamespace('changeover')").fetchall() == []


@pytest.mark.parametrize("name", ["kept", LONG, ACCENTS])
def test_our_names_are_whole_and_different(new_dsn: str, name: str) -> None:
    with connect(new_dsn, "test") as connection:
        made = [ours("touched", schema, name).as_string(connection) for schema in ("one", "two", "o" * NAME_BYTES)]
        connection.execute("CREATE SCHEMA IF NOT EXISTS changeover")
        for identifier in made:
            connection.execute(f"CREATE TABLE {identifier} ()".encode())
        found = connection.execute("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('changeover')").fetchall()
    assert {f'"changeover"."{row[0]}"' for row in found} == set(made), "PostgreSQL cut none"
    assert len(set(made)) == 3
