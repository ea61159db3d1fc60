"""Two ways for one value: by the snapshot before prepare, by the stream after it. Both carry it exactly, or both refuse it."""

from __future__ import annotations

import pytest
from psycopg import sql
from pyspark.sql import DataFrame

from changeover import settings
from changeover.errors import CouldNotFinish, RowRefused
from changeover.jobs.apply.batch import last_of_each_key
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.load.prepared import require_prepared
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform.transform import Transform
from changeover.spark.failures import from_spark
from changeover.stores.base.pgtypes import passable
from changeover.stores.base.reader import EVERYTHING, ExportedSnapshot, ReadTable, read_table
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration

TABLE = '[[table]]\nsource = "odd"\ntarget = "odd_too"\nkey = ["id"]\n'
SECOND = 1000
"""What the ids of the rows that come by the stream are ahead of their twins from the snapshot."""

CARRIED: dict[str, list[str]] = {
    "date": ["10000-01-01", "5874897-12-31"],
    "timestamp with time zone": ["10000-01-01 00:00:00.000001+00", "294246-12-31 23:59:59.999999+00"],
    "timestamp without time zone": ["99999-12-31 23:59:59.999999", "294246-12-31 23:59:59.999999"],
    "date[]": ["{10000-01-01,NULL,0001-01-01}"],
    "timestamp with time zone[]": ['{"294246-12-31 23:59:59.999999+00",NULL}'],
    "double precision[]": ["{NaN,NULL,-0,Infinity}"],
    "real[]": ["{NaN,-Infinity,1e-45}"],
    "numeric[]": ["{NaN,Infinity,0.10,1234567890123456789012345678901234567890.5}"],
    "bytea": ["\\x00ff5c", "\\x"],
    "interval": ["infinity", "1 year -2 days +03:04:05.000006"],
    "text[]": ['{"[0:1]={a}","{{","[[",NULL,"NULL",""}'],
}

REFUSED: list[tuple[str, str]] = [
    ("date", "infinity"),
    ("date", "0044-03-15 BC"),
    ("timestamp with time zone", "-infinity"),
    ("timestamp with time zone", "0001-12-31 23:59:59+00 BC"),
    ("timestamp with time zone", "294247-01-01 00:00:00+00"),
    ("timestamp without time zone", "294276-12-31 23:59:59"),
    ("timestamp with time zone[]", "{infinity}"),
    ("timestamp without time zone[]", '{"294247-01-01 00:00:00"}'),
    ("date[]", "{NULL,-infinity}"),
    ("numeric(12,4)", "NaN"),
    ("numeric(12,4)[]", "{1.5,NaN}"),
    ("text[]", "[0:1]={a,b}"),
    ("text[]", "[2:2]={NULL}"),
    ("integer[]", "[-1:1]={1,NULL,3}"),
    ("integer[]", "{{1,2},{3,4}}"),
    ("text[]", '{{"a"},{NULL}}'),
    ("numeric[]", "[0:0]={NaN}"),
]


def migration_of(make: MakeMigration, types: list[str]) -> Migration:
    columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate(types))
    return make(TABLE, f"CREATE TABLE odd (id integer PRIMARY KEY, {columns})")


def insert(migration: Migration, row: int, column: int, value: str) -> None:
    statement = sql.SQL("INSERT INTO odd (id, {}) VALUES (%s, %s)").format(sql.Identifier(f"c{column}"))
    migration.old.execute(statement, [row, value])


def test_what_one_way_carries_the_other_does_too(make_migration: MakeMigration) -> None:
    made = migration_of(make_migration, list(CARRIED))
    # a server's own settings are its own
    for setting, value in {"bytea_output": "escape", "DateStyle": "SQL, DMY", "IntervalStyle": "iso_8601"}.items():
        assert setting in settings.output()
        name = sql.Identifier(made.old.info.dbname)
        made.old.execute(sql.SQL("ALTER DATABASE {} SET {} = {}").format(name, sql.Identifier(setting), sql.Literal(value)))
    values = [(column, value) for column, values in enumerate(CARRIED.values()) for value in values]
    for row, (column, value) in enumerate(values):
        insert(made, row, column, value)
    made.prepare()
    for row, (column, value) in enumerate(values):
        insert(made, SECOND + row, column, value)
    made.backfill()
    made.catch_up()

    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(f"c{number}")) for number in range(len(CARRIED)))
    image = sql.SQL("SELECT id, {} FROM {} ORDER BY id")
    source = made.old.execute(image.format(texts, sql.Identifier("odd"))).fetchall()
    assert made.new.execute(image.format(texts, sql.Identifier("odd_too"))).fetchall() == source
    assert len(source) == 2 * len(values)
    lake = made.lake("odd_too")
    rows = {row.id: row[1:] for row in lake.select("id", *(lake[f"c{n}"].cast("string") for n in range(len(CARRIED)))).collect()}
    for row, (column, value) in enumerate(values):
        assert rows[row] == rows[SECOND + row], value
        assert rows[row][column] is not None, value
    verdicts = made.verify()
    assert {target: (verdict.word, verdict.equal_rows) for target, verdict in verdicts.items()} == {
        STORE: ("equal", len(source)), LAKE: ("equal", len(source)),
    }  # fmt: skip


PASSED: dict[str, list[str]] = {
    **{kind: values for kind, values in CARRIED.items() if passable(kind)},
    "text": ["", "\\.", "NULL", 'a "quoted", b', "line\r\nbreak\n", "\\N", " é\t"],
    "boolean": ["t", "f"],
    "jsonb": ['{"a": [1, null, "\\\\ \\""]}'],
    "character(4)": ["ab"],
    "numeric(12,4)": ["-0.0001"],
    "uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "character varying(20)[]": ['{"a\\\\b","\\"","{}",NULL,""}'],
}


def test_what_needs_no_transform_is_passed_on_as_it_is(make_migration: MakeMigration) -> None:
    made = migration_of(make_migration, list(PASSED))
    made.prepare()
    made.backfill(STORE)
    with Ledger.open(made.spec, "test") as ledger:
        transform = require_prepared(made.spec, made.spark, ledger, "test").transforms["odd", STORE]
    assert transform.passed_on() == {name: name for name in transform.target.names}
    values = [(column, value) for column, values in enumerate(PASSED.values()) for value in values]
    for row, (column, value) in enumerate(values):
        insert(made, row, column, value)
    made.old.execute("UPDATE odd SET id = id + 5000 WHERE id % 3 = 0")
    made.old.execute("DELETE FROM odd WHERE id % 5 = 1")
    made.catch_up(STORE)
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(f"c{number}")) for number in range(len(PASSED)))
    image = sql.SQL("SELECT id, {} FROM {} ORDER BY id")
    source = made.old.execute(image.format(texts, sql.Identifier("odd"))).fetchall()
    assert len(source) > 20
    assert made.new.execute(image.format(texts, sql.Identifier("odd_too"))).fetchall() == source
    made.old.execute("DELETE FROM odd")
    made.catch_up(STORE)
    assert made.new.execute("SELECT count(*) FROM odd_too").fetchone() == (0,)


def test_what_one_way_refuses_the_other_does_too(make_migration: MakeMigration) -> None:
    made = migration_of(make_migration, [kind for kind, _ in REFUSED])
    for row, (_, value) in enumerate(REFUSED):
        insert(made, row, row, value)
    made.prepare()
    for row, (_, value) in enumerate(REFUSED):
        insert(made, SECOND + row, row, value)
    made.capture()
    with Ledger.open(made.spec, "test") as ledger:
        transforms = require_prepared(made.spec, made.spark, ledger, "test").transforms
    transform = transforms["odd", STORE]
    assert {f"c{n}" for n, (kind, _) in enumerate(REFUSED) if kind in ("integer[]", "date")} < transform.only_moved()
    events = Spool(made.spec.work / "spool").events()
    changes = last_of_each_key(events, ["id"], [column.name for column in transform.source])
    spooled = made.spark.createDataFrame(changes)
    with made.old.transaction():
        made.old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        found = made.old.execute("SELECT pg_export_snapshot(), pg_current_snapshot()::text").fetchone()
        assert found is not None
        for row, (kind, value) in enumerate(REFUSED):
            ways = {
                "moved": snapshot(made, transform, row, ExportedSnapshot(*found), moved=True),
                "decoded": snapshot(made, transform, row, ExportedSnapshot(*found), moved=False),
                "streamed": transform.changes(spooled.where(spooled["id"] == str(SECOND + row)), 0),
                "streamed and moved": transform.changes(
                    spooled.where(spooled["id"] == str(SECOND + row)), 0, transform.moved_in_stream()
                ),
            }
            refusing = {way: refused(frame.select(f"c{row}")) for way, frame in ways.items()}
            assert refusing == dict.fromkeys(ways, True), f"{kind} {value!r}"
    for target in (STORE, LAKE):
        with pytest.raises(CouldNotFinish, match=r"table odd, key \(\d+\), column c\d+: "):
            made.backfill(target)
    with pytest.raises(CouldNotFinish, match=r"table odd, key \(\d+\), column c\d+: "):
        made.replay(STORE)
    assert made.new.execute("SELECT count(*) FROM odd_too").fetchone() == (0,)


def refused(frame: DataFrame) -> bool:
    """Return whether a value is refused, with the table's name."""
    try:
        with from_spark("odd", "the place"):
            frame.collect()
    except RowRefused as error:
        return str(error).startswith("table odd, the place: a row can't be carried over")
    return False


def snapshot(made: Migration, transform: Transform, row: int, exported: ExportedSnapshot, *, moved: bool) -> DataFrame:
    """Return one row of the snapshot as a backfill reads it, moved columns as text or decoded."""
    table = ReadTable("public", "odd", transform.source, transform.identity)
    texts = transform.only_moved() if moved else frozenset()
    dsn = made.spec.source.dsn.resolve()
    frame = read_table(made.spark, dsn, "test", table, EVERYTHING, exported, [(str(row),)], moved=texts)
    return transform.rows(frame, moved=texts)
