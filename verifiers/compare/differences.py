"""The table of differences: every key that a comparison found to differ, whole, for notebooks, recheck and repair.

One Delta table holds the differences of all runs, one row a differing key, and of a duplicate key
one row a copy. All values are text and NULL stays NULL. A run's rows for one table and store are
one commit. The sample that a verdict prints is cut from the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltalake import DeltaTable
from deltalake.schema import Schema

from changeover.files.trouble import working
from changeover.verifiers.compare.verdict import MISMATCHED, SAMPLE_LENGTH, SAMPLE_SIZE, Difference

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row

NAMES = {"type": "array", "elementType": "string", "containsNull": True}
TEXTS = {"type": "map", "keyType": "string", "valueType": "string", "valueContainsNull": True}
STORED = {
    "run": "string",
    "table": "string",
    "store": "string",
    "class": "string",
    "side": "string",
    "key": TEXTS,
    "columns": NAMES,
    "source": TEXTS,
    "target": TEXTS,
    "sensitive": NAMES,
}
"""Columns of the table; `side` is the side of a duplicate, `columns` are those that mismatch, `sensitive` those to mask."""


def ensure_table(differences: Path) -> None:
    """Make the table of differences, empty, where it is not there yet (driver)."""
    fields = [{"name": name, "type": kind, "nullable": True, "metadata": {}} for name, kind in STORED.items()]
    with working(differences):
        differences.mkdir(parents=True, exist_ok=True)
        DeltaTable.create(str(differences), Schema.from_json(json.dumps({"type": "struct", "fields": fields})), mode="ignore")


def keep(
    differing: DataFrame, count: int, limit: int, differences: Path, labels: Mapping[str, str], sensitive: Collection[str] = ()
) -> int:
    """Append the differing rows, at most `limit` of the `count` ones, and return how many (driver)."""
    from pyspark.sql import functions as F

    kept = differing.limit(limit) if count > limit else differing
    kept.select(
        *(F.lit(value).alias(name) for name, value in labels.items()),
        F.array(*map(F.lit, sorted(sensitive))).cast("array<string>").alias("sensitive"),
        F.col("kind").alias("class"), F.col("twice").alias("side"), "key", "columns", "source", "target",
    ).write.format("delta").mode("append").save(str(differences))  # fmt: skip
    return min(count, limit)


def column_counts(differing: DataFrame) -> dict[str, int]:
    """Count the mismatched keys of each column; columns that differ in notation alone are no mismatch."""
    from pyspark.sql import functions as F

    exploded = differing.where(F.col("kind") == MISMATCHED).select(F.explode("columns").alias("column"))
    counts = {str(row["column"]): int(row["count"]) for row in exploded.groupBy("column").count().collect()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def sample(differing: DataFrame, kinds: Sequence[str], names: Sequence[str]) -> tuple[Difference, ...]:
    """Take some keys of each class that was found; their values are cut before they leave the tasks."""
    from pyspark.sql import functions as F

    short = [
        F.transform_values(name, lambda _, value: F.substring(value, 1, SAMPLE_LENGTH + 1)).alias(name)
        for name in ("key", "source", "target")
    ]
    rows = [
        row
        for kind in kinds
        for row in differing.where(F.col("kind") == kind)
        .select("kind", "twice", "columns", *short)
        .limit(SAMPLE_SIZE // len(kinds))
        .collect()
    ]
    return tuple(_difference(row, names) for row in rows)


def _difference(row: Row, names: Sequence[str]) -> Difference:
    """Values in the order of the table's columns, which Spark's maps do not keep."""

    def cut(values: Mapping[str, str | None] | None) -> dict[str, str | None] | None:
        return None if values is None else {name: _short(values[name]) for name in names if name in values}

    key = cut(row["key"]) or {}
    return Difference(row["kind"], key, tuple(row["columns"] or ()), cut(row["source"]), cut(row["target"]), row["twice"])


def _short(value: str | None) -> str | None:
    return f"{value[:SAMPLE_LENGTH]}…" if value is not None and len(value) > SAMPLE_LENGTH else value
