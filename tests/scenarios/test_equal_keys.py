"""Updates that give a row's key another notation: both targets follow, whatever is offered together, or twice as after a kill.

The judge is plain SQL on both stores, and Arrow on the lake, by the texts of the keys.
"""

from __future__ import annotations

from psycopg import sql

from changeover.verifiers.explain import explain
from changeover.verifiers.verification import verify
from tests.support.fix_migration import MakeMigration, Migration, Rows, rows

KINDS = {
    "numbers": ("numeric", "1", "1.0", "1.00"),
    "floats": ("double precision", "0", "-0", "0"),
    "lists": ("numeric[]", "{1,2}", "{1.0,2}", "{1,2.00}"),
}
"""Table -> the type of one of its two key columns, and three notations of one value; `tests/stores` has every type."""

SPEC = '[[table]]\nsource = "{0}"\ntarget = "{0}_too"\nkey = ["id", "part"]\n'
TABLE = """
CREATE TABLE {0} (part integer, id {1}, v text, big text, PRIMARY KEY (id, part));
ALTER TABLE {0} ALTER big SET STORAGE EXTERNAL
"""
ROW = "INSERT INTO {0} SELECT i, {1}, 'v' || i, repeat('big', 2000) FROM generate_series(1, 6) i"


def written(migration: Migration, statement: str) -> None:
    """Run a statement on each table with three notations of its key, all tables in one transaction."""
    with migration.old.transaction():
        for table, (_, *keys) in KINDS.items():
            a, b, c = (sql.Literal(key) for key in keys)
            migration.old.execute(sql.SQL(statement).format(t=sql.Identifier(table), a=a, b=b, c=c))


def source_rows(migration: Migration, table: str, suffix: str = "") -> Rows:
    name = sql.Identifier(table + suffix)
    connection = migration.new if suffix else migration.old
    return rows(connection.execute(sql.SQL("SELECT part, id::text, v, big FROM {}").format(name)).fetchall())


def lake_of(migration: Migration, table: str) -> Rows:
    """Return what the lake holds, keys as PostgreSQL writes them."""
    kind = KINDS[table][0]
    frame = migration.lake(f"{table}_too").select("part", "id", "v", "big").toArrow().to_pylist()
    found = []
    for row in frame:
        key = row["id"] if not isinstance(row["id"], list) else "{" + ",".join(row["id"]) + "}"
        text = migration.old.execute(sql.SQL("SELECT ({}::{})::text").format(sql.Literal(str(key)), sql.SQL(kind))).fetchone()
        assert text is not None
        found.append((row["part"], text[0], row["v"], row["big"]))
    return rows(found)


def assert_followed(migration: Migration) -> None:
    for table in KINDS:
        expected = source_rows(migration, table)
        assert source_rows(migration, table, "_too") == expected, table
        assert lake_of(migration, table) == expected, f"{table} in the lake"


def test_a_key_that_is_written_otherwise_is_the_same_key(make_migration: MakeMigration) -> None:
    tables = [sql.SQL(TABLE).format(sql.SQL(name), sql.SQL(kind)).as_string(None) for name, (kind, *_) in KINDS.items()]
    made = make_migration("".join(SPEC.format(name) for name in KINDS), *tables)
    for name, (_, first, *_) in KINDS.items():
        made.old.execute(sql.SQL(ROW).format(sql.Identifier(name), sql.Literal(first)))
    made.prepare()
    made.backfill()
    begun = made.new.execute("SELECT source, target, applied FROM changeover.load").fetchall()
    # the key alone, without the large value; with another value; there and back at once
    written(made, "UPDATE {t} SET id = {b} WHERE part = 1")
    written(made, "UPDATE {t} SET id = {b}, v = 'a' WHERE part = 2")
    written(made, "UPDATE {t} SET id = {b} WHERE part = 3")
    written(made, "UPDATE {t} SET id = {c}, v = 'there' WHERE part = 3")
    written(made, "UPDATE {t} SET id = {a}, v = 'back' WHERE part = 3")
    written(made, "DELETE FROM {t} WHERE part = 4")
    written(made, "INSERT INTO {t} VALUES (4, {c}, 'anew')")
    written(made, "UPDATE {t} SET id = {b} WHERE part = 5")
    written(made, "DELETE FROM {t} WHERE part = 5")
    made.catch_up()
    assert_followed(made)
    # over several batches, and the first of them once more: as after a kill before its position was written down
    written(made, "UPDATE {t} SET id = {a} WHERE part = 1")
    written(made, "INSERT INTO {t} VALUES (5, {b}, 'again')")
    for source, target, applied in begun:
        made.new.execute("UPDATE changeover.load SET applied = %s WHERE (source, target) = (%s, %s)", [applied, source, target])
    made.catch_up()
    assert_followed(made)
    told = explain(made.spec, ("1.00", "2"), table="numbers").parts
    assert {row["id"] for event in told["spooled events"] if (row := event["row"])} >= {"1.0"}
    assert [row["id"] for row in told["lake row"]] == ["1.0"]
    with made.capturing():
        verdicts = verify(made.spec, made.spark)
    assert {(v.table, v.target, v.word) for v in verdicts} == {
        (name, target, "equal") for name in KINDS for target in made.spec.targets
    }
