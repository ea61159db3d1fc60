"""COPY lines: PostgreSQL reads back what Spark formatted, whatever the text holds."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from changeover.position import format_lsn
from changeover.session import connect
from changeover.stores.postgres import gate
from changeover.stores.postgres.batches import prepare_batch
from changeover.stores.postgres.copytext import copy_lines
from changeover.stores.postgres.tasks import copy_in, line_blocks

TEXTS = [
    None,
    "",
    "NULL",
    "null",
    "\\N",
    "\\.",
    "\\",
    "a\\nb",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "a\n\\.\nb",
    '"',
    '""',
    "'",
    ",",
    "a,b",
    " ",
    "{}",
    "Zoë ☂ 🛞",
    "\x01\x7f",
    "x" * 70_000,
]
WHEN = datetime(1582, 10, 10, 1, 2, 3, 456789, UTC)
SCHEMA = (
    "id int, words string, parts array<string>, numbers array<int>, raw binary, yes boolean, score double,"
    " sum decimal(38,10), at timestamp"
)
TABLE = gate.GatedTable("public", "copied", ("id",), ("id", "words", "parts", "numbers", "raw", "yes", "score", "sum", "at"))


Lines = tuple[list[tuple[Any, ...]], list[pa.RecordBatch]]


@pytest.fixture(scope="module")
def lines(spark: SparkSession) -> Lines:
    """Format the rows once; two servers read them."""
    rows = [
        (
            number,
            text,
            None if number % 5 == 0 else [text, None, text],
            [number, None] if number % 2 else [],
            text.encode() if text else None,
            [True, False, None][number % 3],
            [float("nan"), float("-inf"), -0.0, 5e-324][number % 4],
            Decimal("-0.0000000001") if number % 2 else None,
            WHEN if number % 3 else None,
        )
        for number, text in enumerate(TEXTS)
    ]
    return rows, copy_lines(spark.createDataFrame(rows, SCHEMA).coalesce(1)).toArrow().to_batches()


def test_a_server_reads_back_what_was_formatted(any_dsn: str, lines: Lines) -> None:
    rows, batches = lines
    with connect(any_dsn, "test") as connection, connection.transaction(), connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE copied (id integer PRIMARY KEY, words text, parts text[], numbers integer[], raw bytea, yes boolean,"
            " score double precision, sum numeric(38,10), at timestamptz)"
        )
        prepare_batch(cursor, TABLE, versions=False)
        copy_in(cursor, TABLE.columns, line_blocks(batches))
        found = cursor.execute("SELECT * FROM pg_temp.changeover_batch ORDER BY id").fetchall()
    for expected, read in zip(rows, found, strict=True):
        assert repr(read) == repr(expected), f"row {expected[0]}: {expected[1]!r}"


def test_a_column_of_texts_alone(any_dsn: str, spark: SparkSession) -> None:
    texts = ["\\.", "", "\\N", "a\n\\.\n", None]
    batches = copy_lines(spark.createDataFrame([(t,) for t in texts], "words string").coalesce(1)).toArrow().to_batches()
    with connect(any_dsn, "test") as connection, connection.transaction(), connection.cursor() as cursor:
        cursor.execute("CREATE TEMPORARY TABLE changeover_batch (place serial, words text)")
        copy_in(cursor, ["words"], line_blocks(batches))
        assert [row[0] for row in cursor.execute("SELECT words FROM pg_temp.changeover_batch ORDER BY place")] == texts


def test_positions_are_lsns(spark: SparkSession) -> None:
    lsns = [0, 1, 0xFFFFFFFF, 0x100000000, 0x16B374D848, 2**63 - 1]
    frame = spark.createDataFrame([(lsn,) for lsn in lsns], "_changeover_lsn bigint").coalesce(1)
    written = [row.line.strip() for row in copy_lines(frame, lsn_columns=("_changeover_lsn",)).collect()]
    assert written == [format_lsn(lsn) for lsn in lsns]
