"""The lake as its readers see it: Spark, delta-rs with pyarrow and DuckDB, after an append and after a MERGE, with filters.

An append writes its files by pyarrow and a MERGE by Spark; both must be one physical form, and no statistics may make a reader pass
over a file that holds what it asks for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession

from changeover.position import image_version
from changeover.stores.base.interface import DELETED, EPOCH, LSN, ORDINAL, TargetTable
from changeover.stores.base.pgtypes import EXACT, Column
from changeover.stores.delta.appends import AppendTask
from changeover.stores.delta.store import DeltaStore, live_rows
from tests.unit.stores.delta.test_store import Marks

MOMENTS = ["0001-01-01 00:00:00", "1582-10-10 12:00:00.000001", "1816-03-30 05:56:08.066277", "1969-12-31 23:59:59.999999",
           "2024-02-29 12:34:56.123456", "9999-12-31 23:59:59.999999", "+294246-12-31 23:59:59.999999"]  # fmt: skip
FLOATS = ["NaN", "Infinity", "-Infinity", "-0.0", "0.0", "0.1"]

VALUES: dict[str, list[str]] = {
    "boolean": ["true", "false"],
    "smallint": ["-32768", "32767"],
    "int": ["-2147483648", "2147483647"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "float": [*FLOATS, "1e-45", "3.4028235e38"],
    "double": [*FLOATS, "5e-324", "1.7976931348623157e308"],
    "string": ["", "NULL", "é☂\U0001f6de", "x" * 40 + "z", "\U0010ffff" * 40, "\x7f" * 40],
    "binary": ["", "a\x00b"],
    "date": [text.split(" ")[0] for text in MOMENTS] + ["+5874897-12-31"],
    "timestamp": MOMENTS,
    "timestamp_ntz": MOMENTS,
    "decimal(5,2)": ["-999.99", "999.99"],
    "decimal(9,0)": ["999999999"],
    "decimal(12,4)": ["-99999999.9999", "0.0001"],
    "decimal(18,18)": ["-0.999999999999999999"],
    "decimal(38,10)": ["1234567890123456789012345678.0123456789", "-0.0000000001"],
}
NESTED = ["boolean", "int", "double", "string", "date", "timestamp", "timestamp_ntz", "decimal(12,4)"]
TYPES = [*VALUES, *(f"array<{element}>" for element in NESTED)]
COLUMNS = {f"c{place}": kind for place, kind in enumerate(TYPES)}
ROWS = max(map(len, VALUES.values())) + 1
TABLE = TargetTable(
    "public", "odd", (Column("id", "integer", "int", True), *(Column(n, "text", kind) for n, kind in COLUMNS.items())), ("id",)
)
V0 = image_version(100)


def values(spark: SparkSession, first: int) -> DataFrame:
    """Return each type's values, the n-th of all types in one row, and a row of NULLs."""

    def literal(kind: str, number: int) -> str:
        element = kind.removeprefix("array<").removesuffix(">") if kind.startswith("array<") else kind
        chosen = VALUES[element][number : number + 1]
        text = f"cast('{chosen[0]}' as {element})" if chosen else f"cast(NULL as {element})"
        if kind == element:
            return text
        return f"array({text}, cast(NULL as {element}))" if chosen else f"cast({'array()' if number % 2 else 'NULL'} as {kind})"

    rows = [
        ", ".join([f"{first + number} AS id", *(f"{literal(kind, number)} AS {name}" for name, kind in COLUMNS.items())])
        for number in range(ROWS)
    ]
    return spark.sql(" UNION ALL ".join(f"SELECT {row}" for row in rows))


def exact(table: pa.Table) -> dict[int, list[str]]:
    """Return rows by id in a form that no reader's notation touches: moments as numbers, and every float by its bits."""
    columns = [table.column("id").to_pylist()]
    columns += [[repr(_plain(value)) for value in _numbers(table.column(name)).to_pylist()] for name in COLUMNS]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    element = kind.value_type if pa.types.is_list(kind) else kind
    if pa.types.is_timestamp(element):
        assert element.unit == "us", "one unit, microseconds, whoever wrote it"
    whole = pa.int64() if pa.types.is_timestamp(element) else pa.int32() if pa.types.is_date32(element) else None
    if whole is None:
        return column
    return column.cast(pa.list_(whole) if element is not kind else whole)


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list) else value.hex() if isinstance(value, float) else value


@pytest.fixture(scope="module")
def lake(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[str]]]:
    """Append rows, MERGE as many new ones and change one of the old; return the folder and what the rows must be."""
    folder = tmp_path_factory.mktemp("lake")
    store = DeltaStore("lake", folder, "test")
    store.create(TABLE)
    store.install(TABLE, V0)
    appended, merged = values(spark, 0), values(spark, 1000)
    task = AppendTask(str(store.path("odd")), ("id",), ("id",), (0,), V0, Marks())
    task.append(0, iter(appended.toArrow().to_batches()))
    _require_equal(exact(DeltaTable(str(store.path("odd"))).to_pyarrow_table()), exact(appended.toArrow()))
    changed = appended.where("id = 1").selectExpr("2 AS id", *COLUMNS)
    both = (
        merged.union(changed)
        .selectExpr(f"0 AS {EPOCH}", f"200L AS {LSN}", f"0L AS {ORDINAL}", f"false AS {DELETED}", "*")
        .coalesce(1)
    )
    store.merge(TABLE, both)
    before = exact(appended.toArrow())
    return folder / "odd", {**before, 2: before[1], **exact(merged.toArrow())}


def _require_equal(found: dict[int, list[str]], expected: dict[int, list[str]]) -> None:
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        for kind, value, other in zip(TYPES, row, found[key], strict=True):
            assert other == value, f"{kind}, row {key}"


def files(folder: Path) -> list[str]:
    return list(DeltaTable(str(folder)).file_uris())


def test_every_reader_has_every_value(spark: SparkSession, lake: tuple[Path, dict[int, list[str]]]) -> None:
    folder, expected = lake
    assert {kind for kind, _ in EXACT.values()} <= set(VALUES)
    _require_equal(exact(live_rows(spark, folder).toArrow()), expected)
    _require_equal(exact(DeltaTable(str(folder)).to_pyarrow_table()), expected)
    with duckdb.connect() as session:
        session.execute("SET TimeZone = 'UTC'")
        read = session.sql("SELECT * FROM read_parquet(?)", params=[files(folder)]).to_arrow_table()
    _require_equal(exact(read), expected)


def test_all_files_have_one_physical_form(lake: tuple[Path, dict[int, list[str]]]) -> None:
    folder, _ = lake
    forms = {}
    for file in folder.glob("*.parquet"):  # those too that a MERGE replaced: the append's form and the MERGE's
        schema = pq.ParquetFile(file).schema
        described = [schema.column(place) for place in range(len(schema))]
        forms[file] = {
            one.path: (one.physical_type, str(one.logical_type), one.length) for one in described if "_version" not in one.path
        }
    assert len(forms) > 1
    first, *others = forms.values()
    assert all(other == first for other in others)
    assert {form[0] for form in first.values()}.isdisjoint({"INT96"})


FILTERS = [
    ("timestamp", "TIMESTAMP '2024-02-29 12:34:56.123'", pa.scalar(1709210096123000, pa.int64()).cast(pa.timestamp("us", "UTC"))),
    (
        "timestamp_ntz",
        "TIMESTAMP_NTZ '9999-12-31 23:59:59.999'",
        pa.scalar(253402300799999000, pa.int64()).cast(pa.timestamp("us")),
    ),
    ("string", "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxy'", pa.scalar("x" * 40 + "y")),
    ("double", "CAST('1e308' AS DOUBLE)", pa.scalar(1e308)),
    ("double", "CAST(0 AS DOUBLE)", pa.scalar(0.0)),
    ("float", "CAST('3e38' AS FLOAT)", pa.scalar(3e38, pa.float32())),
    ("date", "DATE '9999-12-30'", pa.scalar(2932895, pa.int32()).cast(pa.date32())),
    ("decimal(12,4)", "CAST('0.0000' AS DECIMAL(12,4))", pa.scalar("0.0000").cast(pa.decimal128(12, 4))),
]
"""Type, and a bound as SQL and as Arrow has it, above which there are values within a millisecond, 32 characters or a hair."""


def test_no_statistics_hide_a_row_from_a_reader(spark: SparkSession, lake: tuple[Path, dict[int, list[str]]]) -> None:
    folder, _ = lake
    everything = DeltaTable(str(folder)).to_pyarrow_table()
    names = {kind: name for name, kind in COLUMNS.items()}
    for kind, literal, bound in FILTERS:
        name = names[kind]
        for sign, compare in ((">", pc.greater), (">=", pc.greater_equal), ("<", pc.less), ("=", pc.equal)):
            wanted = everything.filter(pc.fill_null(compare(everything[name], bound), False))
            ids = set(wanted["id"].to_pylist()) | _nan_above(everything, name, kind, sign)
            condition = f"{name} {sign} {literal}"
            assert {row.id for row in live_rows(spark, folder).where(condition).select("id").collect()} == ids, condition
            expression = {
                ">": ds.field(name) > bound,
                ">=": ds.field(name) >= bound,
                "<": ds.field(name) < bound,
                "=": ds.field(name) == bound,
            }
            found = DeltaTable(str(folder)).to_pyarrow_dataset().to_table(columns=["id"], filter=expression[sign])
            assert set(found["id"].to_pylist()) == set(wanted["id"].to_pylist()), f"delta-rs: {condition}"
            if kind != "timestamp_ntz":
                with duckdb.connect() as session:
                    session.execute("SET TimeZone = 'UTC'")
                    asked = condition.replace("TIMESTAMP '", "TIMESTAMPTZ '")
                    rows = session.execute(f"SELECT id FROM read_parquet(?) WHERE {asked}", [files(folder)]).fetchall()
                assert {row[0] for row in rows} == ids, f"DuckDB: {asked}"


def _nan_above(table: pa.Table, name: str, kind: str, sign: str) -> set[int]:
    """Return the rows whose NaN is above everything to Spark and DuckDB, as it is to PostgreSQL."""
    if kind not in ("float", "double") or sign not in (">", ">="):
        return set()
    return set(table.filter(pc.fill_null(pc.is_nan(table[name]), False))["id"].to_pylist())
