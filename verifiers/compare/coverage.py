"""Coverage: the proof that a comparison left out no key range and no row.

A comparison counts by class and range on each side. It holds only under three conditions. The ranges partition the key's
order from minus to plus infinity, every row belongs to exactly one of them, and the classes add up
to what was read. A range without a row is accounted for with 0. Where no side had any row, each
range must have been read to its end by a task of its own, which says so after its last row.
Whatever does not hold raises `CouldNotCheck`, so a gap, an overlap or a read that did not end is
never read as "equal".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from changeover.errors import CouldNotCheck
from changeover.stores.base import ranges as partition
from changeover.verifiers.compare.verdict import CANONICALISATION, CLASSES, Range, RangeCount

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

SIDES = ("source", "target")
SOURCE, TARGET = 0, 1
EQUAL = "equal"
REAL = tuple(kind for kind in CLASSES if kind != CANONICALISATION)


@dataclass(frozen=True)
class Tally:
    """Rows of one class in one range of one side, and the keys among them; `twice` is the side of a duplicate.

    Each side's tallies count every row once; `range` is None for the rows that are on the other side alone.
    """

    side: int
    kind: str
    twice: str | None
    range: int | None
    rows: int
    keys: int


def tally_rows(rows: DataFrame) -> list[Tally]:
    """Count by class and range of each side in one pass; a few numbers a range, for the sides' ranges never cross."""
    from pyspark.sql import functions as F

    shared = [F.col("kind"), F.col("twice")]
    sets = [[*shared, F.col("source_range")], [*shared, F.col("target_range")]]
    side = F.when(F.grouping("source_range") == 0, SOURCE).otherwise(TARGET).alias("side")
    counts = (
        rows.groupingSets(sets, "kind", "twice", "source_range", "target_range")
        .agg(side, F.count(F.lit(1)).alias("rows"), F.count_if("first").alias("keys"))
        .collect()
    )
    return [
        Tally(row["side"], row["kind"], row["twice"], row[f"{SIDES[row['side']]}_range"], row["rows"], row["keys"])
        for row in counts
    ]


def require_partition(ranges: Sequence[Range], *, table: str, side: str) -> None:
    """Prove that ranges partition a side's order of keys, and that their numbers tell them apart; or CouldNotCheck."""
    partition.require_partition(table, [(each.lower, each.upper) for each in ranges], f"{side}'s")
    if any(left.number >= right.number for left, right in pairwise(ranges)):
        raise CouldNotCheck(table, f"the numbers of the {side}'s ranges do not go up")


def coverage(
    ranges: Sequence[Range],
    counted: Mapping[int, int],
    *,
    table: str,
    side: str = "source",
    different: Mapping[int, int] | None = None,
) -> tuple[RangeCount, ...]:
    """Return each range once with the rows counted in it, 0 too; raises CouldNotCheck for rows of no range.

    `counted` and `different` are range number -> rows.
    """
    require_partition(ranges, table=table, side=side)
    strangers = sorted(set(counted) - {each.number for each in ranges})
    if strangers:
        rows = sum(counted[number] for number in strangers)
        raise CouldNotCheck(table, f"{rows} rows of the {side} belong to no range that was planned")
    return tuple(RangeCount(each, counted.get(each.number, 0), (different or {}).get(each.number, 0)) for each in ranges)


def require_complete(tallies: Sequence[Tally], rows_read: Sequence[int], *, table: str) -> None:
    """Prove that the classes add up to the rows that each side's reader counted."""
    for side, name in enumerate(SIDES):
        rows = sum(rows_by_range(tallies, side).values())
        if rows != rows_read[side]:
            problem = f"{rows_read[side]} rows of the {name} were read and {rows} were compared: run it again"
            raise CouldNotCheck(table, problem)


def require_read(frame: DataFrame, ranges: int, *, table: str, side: str, empty: bool) -> None:
    """Prove that every range of a side is read to its end, and with `empty` that no row is in any of them (driver).

    The partition i of the frame is range i; a store without an order of keys has one range in any
    number of partitions.

    Args:
        frame: A side's frame.
        ranges: How many ranges were planned.
        table: The table, for messages.
        side: `source` or `target`, for messages.
        empty: Whether the side gave no row at first.

    Raises:
        CouldNotCheck: A range is not read to its end, or an empty side has rows.
    """
    read = _read_to_end(frame)
    if ranges > 1 and sorted(read) != list(range(ranges)):
        raise CouldNotCheck(table, f"{len(read)} of {ranges} ranges of the {side} were read to their end: run it again")
    if empty and (rows := sum(read.values())):
        raise CouldNotCheck(table, f"the {side} read as empty at first and has {rows} rows: run it again")


def _read_to_end(frame: DataFrame) -> dict[int, int]:
    """Return partition -> rows, as each task tells after its last row; no value of a row is asked for."""
    from pyspark.sql import functions as F

    counts = frame.select(F.lit(1)).mapInArrow(_count_rows, "partition int, rows bigint").collect()
    return {row["partition"]: row["rows"] for row in counts}


def _count_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from pyspark import TaskContext

    rows = sum(batch.num_rows for batch in batches)
    context = TaskContext.get()
    number = context.partitionId() if context is not None else -1
    yield pa.RecordBatch.from_arrays([pa.array([number], pa.int32()), pa.array([rows], pa.int64())], names=["partition", "rows"])


def rows_by_range(tallies: Sequence[Tally], side: int, kinds: Sequence[str] = (EQUAL, *CLASSES)) -> dict[int, int]:
    """Return a side's rows of some classes by the number of their range."""
    rows: dict[int, int] = {}
    for tally in tallies:
        if tally.side == side and tally.range is not None and tally.kind in kinds:
            rows[tally.range] = rows.get(tally.range, 0) + tally.rows
    return rows


def keys_of(tallies: Sequence[Tally], kind: str, twice: str | None = None) -> int:
    """Return the keys of a class; every row is in either side's tallies, so one side is enough."""
    return sum(tally.keys for tally in tallies if tally.side == SOURCE and tally.kind == kind and twice in (None, tally.twice))


def rows_found(tallies: Sequence[Tally]) -> int:
    """Return how many rows of the table of differences there would be without a limit."""
    return sum(tally.rows for tally in tallies if tally.side == SOURCE and tally.kind != EQUAL)
