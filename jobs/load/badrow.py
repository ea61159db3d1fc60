"""A bad row: which one of many it is, found by trying ever smaller parts of what failed, with all that it goes through.

A part is tried as it was offered, but nothing of it is written. So it makes no difference where the row fails: as the server prints
it, in an expression, or at the target's constraint. The sentence names the row's key and its column, and no other value. Nothing
is searched unless something failed. Runs on the driver, what it tries in tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from changeover.errors import ChangeoverError, RowRefused, TextRefused
from changeover.jobs.transform import masking
from changeover.jobs.transform.transform import Transform
from changeover.names import nth, placed
from changeover.session import Connection
from changeover.spark.failures import OURS, from_spark
from changeover.stores.base.interface import MEET
from changeover.stores.base.reader import KeyRange, Reading, ReadTable, read_table, some_rows
from changeover.stores.postgres.store import importing

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

    from changeover.stores.base.interface import Frozen

log = logging.getLogger(__name__)

Part = TypeVar("Part")
Found = TypeVar("Found")
FAILED = "a row that fails"

Tried = Callable[[], object]


def met(trying: Tried, table: str) -> RowRefused | None:
    """Return how a row is refused when something is tried (driver).

    Args:
        trying: What is tried.
        table: The table's name, for the error.

    Returns:
        The refusal, None where there is none.
    """
    try:
        with from_spark(table, FAILED):
            trying()
    except RowRefused as refused:
        return refused
    except TextRefused as refused:
        return RowRefused(table, FAILED, refused.problem)
    return None


def one_alone(refused: ChangeoverError) -> bool:
    """Return whether one row by itself may be at fault (pure).

    Two rows that meet are named already, and each alone is in order.

    Args:
        refused: The error.

    Returns:
        Whether a search for one row makes sense.
    """
    return not (isinstance(refused, RowRefused) and MEET in refused.problem)


def narrowed(
    part: Part, halves: Callable[[Part], Sequence[Part]], refused: Callable[[Part], RowRefused | None]
) -> tuple[Part, RowRefused] | None:
    """Return the first of the smallest parts that is refused by itself (pure).

    A second half is not tried: it fails where the first does not.

    Args:
        part: The whole, which is refused.
        halves: Cuts a part in two; it gives nothing for a smallest one.
        refused: Tries a part, and returns how it is refused, or None.

    Returns:
        The part and its refusal; None where none is refused by itself.
    """
    while two := halves(part):
        first, second = two
        part = second if refused(first) is None else first
    why = refused(part)
    return None if why is None else (part, why)


def in_two(things: Sequence[Part]) -> list[Sequence[Part]]:
    """Return the halves of a sequence; one thing has none."""
    middle = len(things) // 2
    return [things[:middle], things[middle:]] if middle else []


def sentence(
    transform: Transform, key: Sequence[str | None], refused: RowRefused, column: str, *, of_target: bool = False
) -> RowRefused:  # fmt: skip
    """Return the refusal of one row, by its key; what is sensitive is masked (pure).

    Args:
        transform: The table's transform.
        key: The row's key, as texts.
        refused: How the row was refused.
        column: The column, as a part of the sentence.
        of_target: Whether it is the target's key.

    Returns:
        The refusal.
    """
    names = transform.target.key if of_target else [c.name for c in transform.identity]
    table = transform.table
    mask = masking.of_target(table, transform.derivations) if of_target else masking.of_source(table, names)
    shown = ", ".join("NULL" if value is None else str(mask.shown(name, value)) for name, value in zip(names, key, strict=True))
    # what our own expressions raise ends with the value
    problem = refused.problem.rpartition(": ")[0] if table.sensitive and OURS in refused.problem else refused.problem
    return RowRefused(table.source, f"key ({shown}), {column}", problem)


def column_of(transform: Transform, refused: RowRefused, row: Callable[[], DataFrame], asked: Sequence[str] = ()) -> str:
    """Return what of one row is refused (driver).

    It is the column that the target named, or the first one whose value can't be made.

    Args:
        transform: The table's transform.
        refused: How the row was refused.
        row: Makes a frame of the row alone.
        asked: Columns of the frame that say whether the row is kept.

    Returns:
        The column, as a part of the sentence.
    """
    if refused.where.startswith("column "):
        return refused.where
    if met(lambda: _evaluate(row(), asked), transform.table.source):
        return "where" if transform.table.where and transform.table.function is None else "the row as a whole"
    names: Sequence[str] = transform.target.names
    bad = narrowed(names, in_two, lambda some: met(lambda: _evaluate(row(), some), transform.table.source))
    return f"column {', '.join(bad[0])}" if bad else refused.where


def _evaluate(rows: DataFrame, names: Sequence[str]) -> None:
    from pyspark.sql import functions as F

    placed(rows, names).select(F.lit(1), *map(nth, range(len(names)))).collect()


def sought(table: str, search: Callable[[], Found | None]) -> Found | None:
    """Return what a search finds (driver).

    A search that can't be ended leaves the error that it began with.

    Args:
        table: The table's name, for the log.
        search: The search.

    Returns:
        What it found, None where it found nothing or could not end.
    """
    try:
        return search()
    except ChangeoverError as error:
        log.warning("table %s: the row that fails could not be found: %s", table, error)
        return None


def in_ranges(
    transform: Transform, reading: Reading, ranges: Sequence[KeyRange], rows: Callable[[KeyRange], DataFrame],
    trying: Callable[[DataFrame], object], *, of_target: bool = False,
) -> tuple[KeyRange, RowRefused] | None:  # fmt: skip
    """Return the first range of a table's key with a row that fails, and how that row is refused, or None (driver).

    `rows` reads what a range holds, in the snapshot, and `trying` does with it what failed.
    """

    def refused(bounds: KeyRange) -> RowRefused | None:
        return met(lambda: trying(rows(bounds)), transform.table.source)

    with importing(reading.dsn, reading.application, reading.snapshot.name) as (session, _):
        for bounds in ranges:
            halves = partial(_halves, session, reading.table)
            bad = narrowed(bounds, halves, refused) if refused(bounds) is not None else None
            if bad is not None:
                one, why = bad
                (key,) = some_rows(session, reading.table, one, 1)
                return bounds, sentence(transform, key, why, column_of(transform, why, partial(rows, one)), of_target=of_target)
    return None


def in_frozen(spark: SparkSession, transform: Transform, frozen: Frozen, side: str) -> RowRefused | None:
    """Return the refusal of a row that can't be read where a table is compared (driver).

    Args:
        spark: The Spark session.
        transform: The table's transform.
        frozen: The state that is compared.
        side: `source` or the target's side, for the sentence.

    Returns:
        The refusal, None where no row is refused by itself.
    """
    reading = frozen.reading
    if reading is None:
        return None
    of_source = side == "source"

    def rows(bounds: KeyRange) -> DataFrame:
        frame = read_table(spark, reading.dsn, reading.application, reading.table, [bounds], reading.snapshot)
        return transform.uncast(frame) if of_source else frame

    bad = sought(
        transform.table.source,
        lambda: in_ranges(transform, reading, frozen.ranges, rows, _evaluate_all, of_target=not of_source),
    )
    if bad is None:
        return None
    _, row = bad
    return row if of_source else RowRefused(row.table, f"the {side}'s {row.where}", row.problem)


def _evaluate_all(rows: DataFrame) -> None:
    rows.mapInArrow(_pass_over, "nothing int").collect()


def _pass_over(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Take every row, in a task, and give none."""
    for _ in batches:
        pass
    return iter(())


def _halves(session: Connection, read: ReadTable, bounds: KeyRange) -> list[KeyRange]:
    """Return two ranges with about as many rows each, by a key between them; a range of one row or none has no halves."""
    count = len(some_rows(session, read, bounds, 2))
    if count < 2:
        return []
    middle = some_rows(session, read, bounds, 1, middle=True)[0]
    return [(bounds[0], middle), (middle, bounds[1])]
