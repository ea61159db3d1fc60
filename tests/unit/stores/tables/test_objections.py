"""What can't be a target in PostgreSQL is said in one sentence each, and what only looks like it is carried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from changeover.position import Version, format_lsn
from changeover.session import Connection, connect
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres import batches, gate
from changeover.stores.tables.objections import objections, remarks

BEHIND = "per-key order breaks value swaps, so build it after the catch-up"
REFUSED: dict[str, tuple[str, ...]] = {
    # a second rule by which one row stands in another's way
    "CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE)": (f"public.t has the unique index t_v_key beside its key: {BEHIND}",),
    "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE UNIQUE INDEX low ON t (lower(v))": (
        f"public.t has the unique index over an expression low beside its key: {BEHIND}",
    ),
    "CREATE TABLE t (id int PRIMARY KEY, v int4range, EXCLUDE USING gist (v WITH &&))": (
        f"public.t has the exclusion constraint t_v_excl beside its key: {BEHIND}",
    ),
    "CREATE TABLE t (id int PRIMARY KEY, v text, EXCLUDE (v WITH =))": ("the exclusion constraint t_v_excl beside",),
    "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE UNIQUE INDEX few ON t (v) WHERE v <> ''": ("the unique index few beside",),
    "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE UNIQUE INDEX twins ON t (id, lower(v))": ("expression twins beside",),
    "CREATE TABLE t (id int PRIMARY KEY, v text UNIQUE DEFERRABLE)": ("the unique index t_v_key beside",),
    "CREATE TABLE t (id int PRIMARY KEY, v text, UNIQUE (id, v))": ("the unique index t_id_v_key beside",),
    'CREATE TABLE t (id text COLLATE "C" PRIMARY KEY, v text); CREATE UNIQUE INDEX other ON t (id COLLATE "POSIX")': (
        "the unique index other beside",
    ),
    "CREATE TABLE t (id int PRIMARY KEY, v int) PARTITION BY RANGE (id); CREATE TABLE t1 PARTITION OF t DEFAULT;"
    " CREATE UNIQUE INDEX own ON t1 (v)": ("the unique index own beside",),
    # no key of its own
    "CREATE TABLE t (id int, v text)": ("public.t has no primary key or unique constraint on (id) that is checked at once",),
    "CREATE TABLE t (id int, v text, PRIMARY KEY (id, v))": ("no primary key or unique constraint on (id)", "t_pkey beside"),
    "CREATE TABLE t (id int, v text, PRIMARY KEY (v) INCLUDE (id))": (
        "no primary key or unique constraint on (id)",
        "t_pkey beside",
    ),
    "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE, v text)": ("no primary key or unique constraint", "t_pkey beside"),
    "CREATE TABLE t (id int, v text); CREATE UNIQUE INDEX part ON t (id) WHERE id > 0": ("no primary key or unique", "part beside"),
    "CREATE TABLE t (id int, v text); CREATE UNIQUE INDEX calc ON t ((id + 0))": ("no primary key or unique", "calc beside"),
    'CREATE TABLE t (id text, v text); CREATE UNIQUE INDEX sole ON t (id COLLATE "C")': ("no primary key or", "sole beside"),
    # a key that is none for a NULL
    "CREATE TABLE t (id int UNIQUE, v text)": (
        "public.t.id is of the key and may be NULL, and two rows of a NULL key would both stay: ALTER TABLE public.t ALTER id",
    ),
    "CREATE TABLE t (id int, v text) PARTITION BY HASH (id); CREATE UNIQUE INDEX ON t (id);"
    " CREATE TABLE t1 PARTITION OF t FOR VALUES WITH (MODULUS 1, REMAINDER 0)": ("public.t.id is of the key and may be NULL",),
    # what is no table
    "CREATE VIEW t AS SELECT 1 AS id": ("public.t is a view, and rows are written to tables alone: name another target",),
    "CREATE MATERIALIZED VIEW t AS SELECT 1 AS id": ("public.t is a materialized view",),
    "CREATE SEQUENCE t": ("public.t is a sequence",),
    "CREATE TYPE t AS ENUM ('a')": ("public.t is the name of a type",),
    "CREATE TYPE t AS (id int)": ("public.t is a composite type",),
    "CREATE FOREIGN DATA WRAPPER f; CREATE SERVER s FOREIGN DATA WRAPPER f; CREATE FOREIGN TABLE t (id int) SERVER s": (
        "public.t is a foreign table",
    ),
    # what acts by itself
    "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE RULE loud AS ON INSERT TO t DO ALSO NOTIFY t": (
        "t has the rule loud, by which writes do something else: ALTER TABLE t DISABLE RULE loud until after the catch-up",
    ),
    "CREATE TABLE t (id int PRIMARY KEY, v int REFERENCES t)": ("t has the foreign key t_v_fkey",),
    "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE c (id int CONSTRAINT back REFERENCES t ON DELETE CASCADE)": (
        "t is referenced by the foreign key back of c: add it after the catch-up",
    ),
    "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
    " CREATE TRIGGER g BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()": (
        "t has the trigger g: enable it after the catch-up",
    ),
    "CREATE TABLE t (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY)": ("public.t.n is GENERATED ALWAYS AS IDENTITY",),
    # what is not a whole table
    "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY LIST (id); CREATE TABLE t PARTITION OF p FOR VALUES IN (1)": (
        "public.t is a partition of p, which takes no other rows than its own: name the whole table",
    ),
    "CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE c () INHERITS (t)": ("public.t takes part in inheritance",),
}
CARRIED = (
    "CREATE TABLE t (id int, v text, PRIMARY KEY (id) INCLUDE (v))",
    "CREATE TABLE t (id int NOT NULL, v text, UNIQUE (id))",
    "CREATE TABLE t (id int PRIMARY KEY, v text); CREATE INDEX ON t (lower(v)); CREATE UNIQUE INDEX again ON t (id)",
    "CREATE TABLE t (id int, v text, PRIMARY KEY (id)) PARTITION BY HASH (id);"
    " CREATE TABLE t1 PARTITION OF t FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
)
CARRIED_SINCE_15 = (
    "CREATE TABLE t (id int NOT NULL, v text, UNIQUE NULLS NOT DISTINCT (id))",
    "CREATE TABLE t (id int, v text, UNIQUE NULLS NOT DISTINCT (id))",
)


@pytest.fixture
def session(any_dsn: str) -> Iterator[Connection]:
    with connect(any_dsn, "test") as connection:
        yield connection


def test_each_thing_in_the_way_is_named(session: Connection) -> None:
    for statements, expected in REFUSED.items():
        with session.transaction(force_rollback=True):
            session.execute(statements.encode())
            found = objections(session, "public", "t", ["id"])
            assert len(found) == len(expected), (statements, found)
            for reason, begin in zip(found, expected, strict=True):
                assert begin in reason, statements


def test_a_key_with_columns_beside_it_is_carried(session: Connection) -> None:
    for statements in (*CARRIED, *(CARRIED_SINCE_15 if session.info.server_version >= 150000 else ())):
        with session.transaction(force_rollback=True), session.cursor() as cursor:
            session.execute(statements.encode())
            assert objections(session, "public", "t", ["id"]) == [], statements
            gate.install_gate(session, "public", "t", ["id"], Version(0, 100, -1))
            table = gate.gated(session, "public", "t", ["id"])
            batches.prepare_batch(cursor, table, versions=True)
            cursor.execute(
                "INSERT INTO pg_temp.changeover_batch VALUES (0, %s, 0, false, 7, 'a'), (0, %s, 2, false, 8, 'b')",
                [format_lsn(200), format_lsn(200)],
            )
            assert batches.apply_batch(cursor, table).taken == 2, statements
            cursor.execute("UPDATE pg_temp.changeover_batch SET _changeover_lsn = '0/999', v = 'c'")
            assert batches.apply_batch(cursor, table).taken == 2, statements
            assert cursor.execute("SELECT id, v FROM t ORDER BY 1").fetchall() == [(7, "c"), (8, "c")]


def test_a_place_without_schema_is_named(session: Connection) -> None:
    assert objections(session, "attic", "t", ["id"]) == ["there is no schema attic: CREATE SCHEMA attic"]
    assert objections(session, "public", "t", ["id"]) == []


def test_an_unlogged_table_can_be_a_target_and_a_crash_empties_it(session: Connection) -> None:
    session.execute("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)")
    assert objections(session, "public", "t", ["id"]) == []
    assert remarks(session, "public", "t") == [
        "public.t is unlogged: a crash of its server empties it, and verification alone would tell"
    ]


def test_a_folder_that_can_hold_no_lake_table_is_named(tmp_path: Path) -> None:
    store = DeltaStore("lake", tmp_path / "lake", "m")
    assert store.objections("public", "t", ["id"]) == []
    (tmp_path / "lake" / "t").mkdir(parents=True)
    assert store.objections("public", "t", ["id"]) == []
    (tmp_path / "lake" / "t" / "notes.txt").write_text("mine")
    told = "is a folder with files and no Delta table: empty it or name another one"
    assert store.objections("public", "t", ["id"]) == [f"target lake: {tmp_path}/lake/t {told}"]
    (tmp_path / "lake" / "u").write_text("mine")
    assert store.objections("public", "u", ["id"]) == [f"target lake: {tmp_path}/lake/u is a file: name another one"]
    beneath = DeltaStore("lake", tmp_path / "lake" / "u" / "deep", "m")
    assert "is a file" in beneath.objections("public", "t", ["id"])[0]
