"""The comparison of two frames: every key of either side gets exactly one class, by its typed values and no digest.

Both sides are read once, in one Spark job: one shuffle and one sort bring their rows together by
key. A window over each key's rows pairs what is on both sides and counts what is there twice. An
outer join would multiply or hide that. The result is proved before it is given (`coverage`); what
can't be proved raises `CouldNotCheck`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING

from changeover.errors import CouldNotCheck
from changeover.jobs.transform.transform import CUT
from changeover.names import RESERVED, nth, placed
from changeover.spark.failures import from_spark
from changeover.stores.base.pgtypes import postgres_type
from changeover.verifiers.compare.coverage import (
    EQUAL,
    REAL,
    SIDES,
    SOURCE,
    TARGET,
    Tally,
    coverage,
    keys_of,
    require_complete,
    require_partition,
    rows_by_range,
    rows_found,
    tally_rows,
)
from changeover.verifiers.compare.differences import column_counts, ensure_table, keep, sample
from changeover.verifiers.compare.values import has_form, really_different, same, text
from changeover.verifiers.compare.verdict import (
    CANONICALISATION,
    CLASSES,
    DUPLICATE,
    EXTRA,
    MISMATCHED,
    MISSING,
    Difference,
    Range,
    RangeCount,
    TableDiff,
)

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql.types import DataType

RANGE = f"{RESERVED}range"
"""Column of both frames: the number of the range that a row was read in."""

NO_RANGE = -1
WHILE_COMPARING = {"spark.sql.inMemoryColumnarStorage.batchSize": "500", "spark.sql.constraintPropagation.enabled": "false"}
"""Settings of Spark for the length of a comparison."""


@dataclass(frozen=True)
class Field:
    """A compared column: its name, the type that Spark compares, and PostgreSQL's type for its notation."""

    name: str
    spark_type: str
    pg_type: str
    key: bool


def compare(
    source: DataFrame,
    target: DataFrame,
    *,
    table: str,
    store: str,
    key: Sequence[str],
    pg_types: Mapping[str, str],
    ranges: Sequence[Range],
    differences: Path,
    run: str,
    target_ranges: Sequence[Range] | None = None,
    limit: int = 1_000_000,
    sensitive: Collection[str] = (),
) -> TableDiff:
    """Compare two frames of the same columns and types, each with `RANGE`; reads each side once (driver).

    Two empty sides are equal, which says no more than that both frames gave no row
    (`coverage.require_read`).

    Args:
        source: The source's frame.
        target: The target's frame.
        table: The table, for messages.
        store: The target's name.
        key: The key's columns.
        pg_types: PostgreSQL's type of a column, for those that travel as text.
        ranges: The ranges in which the source was read.
        differences: The folder of a Delta table for the rows that differ; made where it is not
            there.
        run: The run's name, under which they are kept.
        target_ranges: The target's own ranges; None where it was read in the source's. A store
            without an order of keys has one infinite range.
        limit: How many rows that differ are kept at most.
        sensitive: The columns whose values nobody is shown; their names are kept beside the rows.

    Returns:
        Counts by class, by column and by range, and a sample.

    Raises:
        CouldNotCheck: The sides have not the same columns, or the counts do not add up.
    """
    started = time.monotonic()
    fields = shared_fields(source, target, table, key, pg_types)
    sides = (ranges, ranges if target_ranges is None else target_ranges)
    for side, its_ranges in zip(SIDES, sides, strict=True):
        require_partition(its_ranges, table=table, side=side)
    ensure_table(differences)
    labels = {"run": run, "table": table, "store": store}
    with from_spark(table, f"comparison with {store}"):
        compared = _found(
            source,
            target,
            fields,
            max(map(len, sides)),
            lambda rows, count: keep(rows, count, limit, differences, labels, sensitive),
        )
    tallies = compared.tallies
    require_complete(tallies, compared.rows_read, table=table)
    counts = _covered(compared.tallies, sides, table)
    return TableDiff(
        table=table,
        store=store,
        key=tuple(key),
        source_rows=sum(count.rows for count in counts[SOURCE]),
        target_rows=sum(count.rows for count in counts[TARGET]),
        equal_rows=keys_of(tallies, EQUAL),
        counts={kind: keys_of(tallies, kind) for kind in CLASSES},
        columns=compared.columns,
        duplicates={side: keys for side in (*SIDES, "both") if (keys := keys_of(tallies, DUPLICATE, side))},
        sample=compared.sample,
        source_ranges=counts[SOURCE],
        target_ranges=counts[TARGET],
        difference_rows=rows_found(tallies),
        kept=compared.kept,
        seconds=time.monotonic() - started,
    )


def _covered(tallies: Sequence[Tally], sides: tuple[Sequence[Range], Sequence[Range]], table: str) -> list[tuple[RangeCount, ...]]:
    """Prove for each side that its ranges account for every row, and return their counts."""
    return [
        coverage(its, rows_by_range(tallies, n), table=table, side=SIDES[n], different=rows_by_range(tallies, n, REAL))
        for n, its in enumerate(sides)
    ]


@dataclass(frozen=True)
class Found:
    """What the Spark jobs of one comparison brought back."""

    rows_read: tuple[int, ...]
    tallies: tuple[Tally, ...]
    kept: int = 0
    columns: Mapping[str, int] = field(default_factory=dict)
    sample: tuple[Difference, ...] = ()


def _found(
    source: DataFrame,
    target: DataFrame,
    fields: Sequence[Field],
    partitions: int,
    store: Callable[[DataFrame, int], int],
) -> Found:
    """Run the jobs: one that reads the stores; and over what it left on disk, if rows differ, those that look closer.

    An equal row leaves its class and ranges alone on disk, a few bytes; so the stores are read once whatever comes out.
    """
    with ExitStack() as held:
        held.enter_context(_settings(source.sparkSession))
        frames, rows_read = _counting(source, target)
        rows = held.enter_context(_on_disk(classified(*frames, fields, partitions)))
        tallies = tally_rows(rows)
        if not rows_found(tallies):
            return Found(rows_read(), tuple(tallies))
        differing = held.enter_context(_on_disk(judged(rows.where(f"kind <> '{EQUAL}'"), fields)))
        tallies = [tally for tally in tallies if tally.kind == EQUAL] + tally_rows(differing)
        kept = store(differing, rows_found(tallies))
        kinds = [kind for kind in CLASSES if keys_of(tallies, kind)]
        some = sample(differing, kinds, [column.name for column in fields])
        return Found(rows_read(), tuple(tallies), kept, column_counts(differing), some)


def shared_fields(
    source: DataFrame, target: DataFrame, table: str, key: Sequence[str], pg_types: Mapping[str, str]
) -> tuple[Field, ...]:
    """Return the columns of both frames (driver).

    Args:
        source: The source's frame.
        target: The target's frame.
        table: The table, for messages.
        key: The key's columns.
        pg_types: PostgreSQL's type of a column, for those that travel as text.

    Returns:
        The columns, without `RANGE` and `CUT`, in the source's order.

    Raises:
        CouldNotCheck: The two have not the same columns and types, or there is no key.
    """
    left, right = dict(source.dtypes), dict(target.dtypes)
    for name in [*left, *right]:
        if name != CUT and left.get(name) != right.get(name):
            types = f"{left.get(name, 'absent')} in the source and {right.get(name, 'absent')} in the target"
            raise CouldNotCheck(table, f"column {name} is {types}")
    for name in (*key, RANGE):
        if name not in left or not key:
            raise CouldNotCheck(table, f"there is no column {name}" if key else "it has no key")
    return tuple(
        Field(name, kind, pg_types.get(name) or postgres_type(kind) or "text", name in key)
        for name, kind in left.items()
        if name not in (RANGE, CUT)
    )


def classified(source: DataFrame, target: DataFrame, fields: Sequence[Field], partitions: int) -> DataFrame:
    """Return one row for each pair and each unpaired row: its class, its ranges, and if it differs its values (lazy).

    Keys meet as Spark groups them, null-safe, so that a NULL in a key or a zero's sign is compared
    like any value.

    Args:
        source: The source's frame.
        target: The target's frame.
        fields: The columns that are compared.
        partitions: Into how many partitions the rows go at least.

    Returns:
        The frame; nothing is read yet.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F
    from pyspark.sql.types import StructType

    cast = source.schema[CUT].dataType if CUT in source.columns else None
    both = _side(source, fields, SOURCE, cast).unionByName(_side(target, fields, TARGET, cast))
    keys = [f"c{number}" for number, column in enumerate(fields) if column.key]
    partitions = max(partitions, int(both.sparkSession.conf.get("spark.sql.shuffle.partitions") or 1))
    rows_of_key = Window.partitionBy(*keys).orderBy("side")
    whole = rows_of_key.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    partners = [F.lead(f"c{number}").over(rows_of_key).alias(f"p{number}") for number in range(len(fields))]
    brought_together = both.repartition(partitions, *keys).select(
        "*",
        F.lead("range").over(rows_of_key).alias("partner_range"),
        F.row_number().over(rows_of_key).alias("place"),
        F.sum(F.col("side")).over(whole).alias("in_target"),
        F.sum(F.lit(1) - F.col("side")).over(whole).alias("in_source"),
        *partners,
    )
    paired = F.col("in_source").eqNullSafe(1) & F.col("in_target").eqNullSafe(1)
    cut = frozenset(cast.fieldNames()) if isinstance(cast, StructType) else frozenset()
    return brought_together.where(~paired | (F.col("side") == SOURCE)).select(*_class_columns(fields, paired, cut))


def _side(frame: DataFrame, fields: Sequence[Field], side: int, cast: DataType | None) -> DataFrame:
    """Columns by place, because a name of the user's must not meet one of ours."""
    from pyspark.sql import functions as F

    rows = placed(frame, [column.name for column in fields])
    values = [F.col(nth(number)).alias(f"c{number}") for number in range(len(fields))]
    if cast is not None:
        values.append((F.col(CUT) if CUT in frame.columns else F.lit(None).cast(cast)).alias("cut"))
    return rows.select(F.lit(side).alias("side"), F.coalesce(F.col(RANGE).cast("int"), F.lit(NO_RANGE)).alias("range"), *values)


def _class_columns(fields: Sequence[Field], paired: Column, cut: frozenset[str]) -> list[Column]:
    from pyspark.sql import functions as F

    # what a cast changed is no longer what the source holds, whatever the target holds
    equal = [
        equal & F.col(f"cut.{nth(number)}").isNull() if nth(number) in cut else equal
        for number, column in enumerate(fields)
        for equal in [same(F.col(f"c{number}"), F.col(f"p{number}"), column.spark_type)]
    ]
    kind = (
        F.when((F.col("in_source") > 1) | (F.col("in_target") > 1), DUPLICATE)
        .when(F.col("in_target") == 0, MISSING)
        .when(F.col("in_source") == 0, EXTRA)
        .when(reduce(and_, equal), EQUAL)
        .otherwise(MISMATCHED)
    )
    twice = F.when(F.col("in_source") <= 1, "target").when(F.col("in_target") <= 1, "source").otherwise("both")
    names = F.array_compact(F.array(*(F.when(~is_equal, column.name) for is_equal, column in zip(equal, fields, strict=True))))
    own = _texts(fields, "c", cut)
    in_source, in_target = F.col("side") == SOURCE, F.col("side") == TARGET
    differs = kind != EQUAL
    return [
        kind.alias("kind"),
        F.when(kind == DUPLICATE, twice).alias("twice"),
        (F.col("place") == 1).alias("first"),
        F.when(in_source, F.col("range")).alias("source_range"),
        F.when(paired, F.col("partner_range")).when(in_target, F.col("range")).alias("target_range"),
        F.when(kind == MISMATCHED, names).alias("columns"),
        F.when(differs, _texts([column if column.key else None for column in fields], "c")).alias("key"),
        F.when(differs & in_source, own).alias("source"),
        F.when(differs & paired, _texts(fields, "p")).when(differs & in_target, own).alias("target"),
    ]


def _texts(fields: Sequence[Field | None], prefix: str, cut: frozenset[str] = frozenset()) -> Column:
    """Return a map of column name -> value as text, of the fields that are given.

    Of a column in `cut` it is the value that the source holds, where a cast changed it.
    """
    from pyspark.sql import functions as F

    pairs = []
    for number, column in enumerate(fields):
        if column is not None:
            value = text(F.col(f"{prefix}{number}"), column.spark_type)
            own = F.coalesce(F.col(f"cut.{nth(number)}"), value) if nth(number) in cut else value
            pairs.append((F.lit(column.name), own))
    return F.create_map(*(part for pair in pairs for part in pair))


def judged(differing: DataFrame, fields: Sequence[Field]) -> DataFrame:
    """Return the differing rows with those in another class that differ in notation alone (lazy).

    A mismatched row keeps the columns that differ in more than notation. Python runs in tasks, and only where a column
    that differs has more than one notation.
    """
    from pyspark.sql import functions as F

    pg_types = {column.name: column.pg_type for column in fields}
    notations = [column.name for column in fields if has_form(column.pg_type)]
    if not notations:
        return differing
    judge = F.udf(lambda columns, source, target: columns and really_different(columns, source, target, pg_types), "array<string>")
    in_question = (F.col("kind") == MISMATCHED) & F.arrays_overlap("columns", F.array(*map(F.lit, notations)))

    def differing_values(side: str) -> Column:
        return F.transform("columns", lambda name: F.element_at(side, name))

    asked = [F.when(in_question, values) for values in (F.col("columns"), *map(differing_values, ("source", "target")))]
    real = F.coalesce(F.col("real"), F.col("columns"))
    in_notation = (F.col("kind") == MISMATCHED) & (F.size(real) == 0)
    return (
        differing.withColumn("real", judge(*asked))
        .withColumn("kind", F.when(in_notation, CANONICALISATION).otherwise(F.col("kind")))
        .withColumn("columns", F.when(F.size(real) > 0, real).otherwise(F.col("columns")))
        .drop("real")
    )


def _counting(source: DataFrame, target: DataFrame) -> tuple[tuple[DataFrame, DataFrame], Callable[[], tuple[int, ...]]]:
    """Let each side's read count its own rows on their way into the comparison; the counts are there after it ran."""
    from pyspark.sql import Observation
    from pyspark.sql import functions as F

    counters = (Observation(), Observation())
    rows = F.count(F.lit(1)).alias("rows")
    frames = (source.observe(counters[SOURCE], rows), target.observe(counters[TARGET], rows))
    return frames, lambda: tuple(int(counter.get["rows"]) for counter in counters)


@contextmanager
def _on_disk(frame: DataFrame) -> Iterator[DataFrame]:
    """Keep what a frame holds on disk, compressed, until the block ends: the stores are not read again for it."""
    from pyspark import StorageLevel

    frame.persist(StorageLevel.DISK_ONLY)
    try:
        yield frame
    finally:
        frame.unpersist()


@contextmanager
def _settings(spark: SparkSession) -> Iterator[None]:
    """Put what is kept on disk there in small pieces, and plan without constraints, until the block ends.

    Java's object stream holds on to its last hundred pieces (`spark.serializer.objectStreamReset`),
    a piece being so many rows or 4 MB. At Spark's 10,000 rows that is 400 MB a task for rows that
    differ, whose values are kept. What Spark infers of columns that are equal to casts of others
    grows with the square of their number, and is of no use here.
    """
    before = {name: spark.conf.get(name) for name in WHILE_COMPARING}
    try:
        for name, value in WHILE_COMPARING.items():
            spark.conf.set(name, value)
        yield
    finally:
        for name, own in before.items():
            spark.conf.set(name, str(own))
