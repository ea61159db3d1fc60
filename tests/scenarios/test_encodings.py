"""Encodings: what has no place in the other store is named by check, by table or by key, and capture goes on with the rest."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.embedded.server import EmbeddedServer
from changeover.errors import TableStopped, TextRefused
from changeover.jobs.preflight.rules import preflight
from changeover.session import connect
from changeover.spark.failures import from_spark
from changeover.stores.base.pgtypes import Column
from changeover.stores.base.reader import EVERYTHING, ReadTable, read_table
from changeover.stores.postgres.store import exporting
from tests.support.fix_migration import STORE, MakeMigration, Migration
from tests.support.fix_postgres import drop_database

TABLES = "".join(f'[[table]]\nsource = "public.{name}"\ntarget = "{name}"\nkey = ["id"]\n' for name in ("kept", "odd"))
DDL = """
CREATE TABLE kept (id integer PRIMARY KEY, note text);
CREATE TABLE odd (id integer PRIMARY KEY, note text, tags text[]);
INSERT INTO kept VALUES (1, 'é'); INSERT INTO odd VALUES (1, 'é', '{é}')
"""
BAD = "convert_from('\\x636166e9', 'SQL_ASCII')"
"""`café` in LATIN1, as a client wrote it that nobody asked for its encoding."""


@pytest.fixture
def in_encoding(server: EmbeddedServer) -> Iterator[dict[str, str]]:
    """Yield the DSNs of databases that have another encoding than UTF8."""
    names = {encoding: f"enc_{uuid.uuid4().hex[:10]}" for encoding in ("SQL_ASCII", "LATIN1", "WIN1252")}
    with connect(server.dsn(), "test") as admin:
        for encoding, name in names.items():
            statement = "CREATE DATABASE {} ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
            admin.execute(sql.SQL(statement).format(sql.Identifier(name), sql.Literal(encoding)))
    yield {encoding: server.dsn(name) for encoding, name in names.items()}
    for name in names.values():
        drop_database(server, name)


@pytest.mark.parametrize("kind", ["slot", "trigger"])
def test_a_row_of_no_encoding_is_named_by_key_and_stops_its_table_alone(
    make_migration: MakeMigration, in_encoding: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = make_migration(TABLES, targets=[STORE], kind=kind)
    monkeypatch.setenv("OLD_DSN", in_encoding["SQL_ASCII"])
    with connect(in_encoding["SQL_ASCII"], "test") as old:
        made.old = old
        old.execute(sql.SQL(DDL))
        old.execute(f"INSERT INTO odd VALUES (7, {BAD}), (8, 'good')".encode())
        told = preflight(made.spec).reasons
        assert told == [
            "public.odd holds bytes that are no UTF-8, and no target takes them: note of the row with id = 7: correct them"
        ]
        old.execute("DELETE FROM odd WHERE id = 7")
        assert preflight(made.spec).reasons == []
        made.prepare()
        made.backfill()
        old.execute("INSERT INTO odd VALUES (2, 'ü', '{ü}'); UPDATE kept SET note = 'ü'")
        made.catch_up()
        old.execute(f"INSERT INTO odd VALUES (3, 'x', ARRAY[{BAD}]); INSERT INTO kept VALUES (2, 'later')".encode())
        with pytest.raises(TableStopped, match=r"public\.odd is stopped: .*held bytes that are no UTF-8"):
            made.catch_up()
        assert sorted(made.new.execute("SELECT id, note FROM kept").fetchall()) == [(1, "ü"), (2, "later")]
        assert sorted(made.new.execute("SELECT id, note FROM odd").fetchall())[:3] == [(1, "é"), (2, "ü"), (8, "good")]


def test_a_read_that_meets_such_a_row_says_so(spark: SparkSession, in_encoding: dict[str, str]) -> None:
    dsn, key = in_encoding["SQL_ASCII"], Column("id", "integer", "int", True)
    read = ReadTable("public", "odd", (key, Column("note", "text", "string", False)), (key,))
    with connect(dsn, "test") as old:
        old.execute(sql.SQL(DDL))
        old.execute(f"UPDATE odd SET note = {BAD}".encode())
    told = r"table public\.odd: .*met while reading a chunk of the backfill \(.*0xe9"
    with exporting(dsn, "test") as (_, snapshot):
        frame = read_table(spark, dsn, "test", read, EVERYTHING, snapshot)
        with pytest.raises(TextRefused, match=told), from_spark("public.odd", "a chunk of the backfill"):
            frame.collect()


def test_a_stream_that_can_t_be_converted_ends_with_its_place(
    make_migration: MakeMigration, in_encoding: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_migration(TABLES, targets=[STORE])
    monkeypatch.setenv("OLD_DSN", in_encoding["WIN1252"])
    with connect(in_encoding["WIN1252"], "test") as old:
        old.execute(sql.SQL(DDL))
        made.prepare()
        old.execute("UPDATE odd SET note = convert_from('\\x81', 'WIN1252')")  # a byte for which the encoding has no character
        made.old = old
        with pytest.raises(TextRefused, match=r"reading the change stream \(.*associated LSN \S+\)"):
            made.capture()


def test_a_target_that_can_t_hold_every_text_is_refused(
    migration: Migration, in_encoding: dict[str, str], monkeypatch: pytest.MonkeyPatch, spark: SparkSession
) -> None:
    assert preflight(migration.spec).reasons == []
    monkeypatch.setenv("NEW_DSN", in_encoding["LATIN1"])
    told = [reason for reason in preflight(migration.spec).reasons if "encoding" in reason]
    assert told == [
        "target store has the encoding LATIN1, which has no place for every text of the old store's UTF8: name a database that was"
        " made with ENCODING 'UTF8'"
    ]
