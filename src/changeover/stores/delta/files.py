"""A lake's data files: how ours are written, and how those of a table are read again.

Every file has one physical form, whether an append or a merge wrote it. Its statistics are bounds
of the key columns alone, exact ones, by which a reader may pass a file over. A file is on stable
storage before a commit can name it. Runs on the driver and in tasks.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from changeover.errors import CouldNotFinish
from changeover.files.folders import sync

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST_BOUND = 32
"""Characters of a text that may stand in a file's statistics, as in Delta's own writers."""

STATISTICS = "delta.dataSkippingStatsColumns"
"""The table's property that names the columns with statistics."""

READ = frozenset({"timestampNtz", "variantType"})
"""What a table may ask of its readers without our reading its files wrongly (Delta protocol, Valid Feature Names).

A column of variants has a type that is not carried; delta-rs names the feature of tables that have none.
"""


@dataclass(frozen=True)
class DataFile:
    """A file of a table: its path in the folder as the log has it, its bytes, and the bounds of its key columns."""

    folder: Path
    path: str
    size: int
    bounds: dict[str, tuple[Any, Any]]

    def read(self, schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
        """Return columns of all rows, in the file's order.

        Args:
            schema: The table's schema.
            columns: The columns.

        Returns:
            The rows, in the table's types.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        # INT96, which another engine's compaction may have written, has no unit of its own
        path = str(self.folder / unquote(self.path))
        rows = pq.ParquetFile(path, coerce_int96_timestamp_unit="us").read(columns=list(columns))
        return rows.select(list(columns)).cast(pa.schema([schema.field(name) for name in columns]))

    def removed(self) -> RemoveAction:
        """Return the action that takes the file out of the table."""
        return RemoveAction(self.path, True, int(time.time() * 1000), self.size, {})


def unread(table: DeltaTable) -> list[str]:
    """Return the features of a table by which its files alone are not its rows, such as deletion vectors.

    Args:
        table: The table.

    Returns:
        The features' names, sorted.
    """
    return sorted(set(table.protocol().reader_features or ()) - READ)


def files_of(table: DeltaTable) -> list[DataFile]:
    """Return a table's files, the smallest last.

    Args:
        table: The table, at some version.

    Returns:
        The files of that version.

    Raises:
        CouldNotFinish: The table has a feature by which its files alone are not its rows.
    """
    import pyarrow as pa

    if features := unread(table):
        raise CouldNotFinish(f"{table.table_uri}: changes can't be merged beside the table feature {features[0]}: take it away")
    files = [
        DataFile(
            Path(unquote(table.table_uri.removeprefix("file://"))), row["path"], row["size_bytes"],
            {name.removeprefix("min."): (low, row.get(f"max.{name.removeprefix('min.')}"))
             for name, low in row.items() if name.startswith("min.")},
        )
        for row in pa.table(table.get_add_actions(flatten=True)).to_pylist()
    ]  # fmt: skip
    return sorted(files, key=lambda file: -file.size)


def bounded(table: DeltaTable, key: Sequence[str]) -> tuple[str, ...]:
    """Return the key columns whose bounds may be noted: all where the table names its columns with statistics, as ours does.

    Of a table that does not, readers ask bounds of every column, and delta-rs' dataset passes a file over that has only some.
    """
    return tuple(key) if STATISTICS in table.metadata().configuration else ()


def write(folder: Path, tables: Iterable[pa.Table], key: Sequence[str], number: int = 0) -> AddAction | None:
    """Write one file and bring it to stable storage; no reader sees it before a commit names it.

    Args:
        folder: The table's folder.
        tables: The rows, each a row group or more.
        key: The columns whose bounds are noted, as `bounded` returns them.
        number: A number in the file's name, which tells people what wrote it.

    Returns:
        The action that adds it, None where there is no row.

    Raises:
        OSError: The folder takes nothing.
    """
    import pyarrow.parquet as pq

    path = folder / f"part-{number:05d}-{uuid.uuid4()}.snappy.parquet"
    writer: Any = None
    bounds = Bounds(key)
    for rows in tables:
        bounds.add(rows)
        writer = writer or pq.ParquetWriter(path, rows.schema, compression="snappy", store_decimal_as_integer=True)
        writer.write_table(rows)
    if writer is None:
        return None
    writer.close()
    sync(path)
    return AddAction(path.name, path.stat().st_size, {}, int(time.time() * 1000), True, json.dumps(bounds.statistics()))


class Bounds:
    """A file's statistics: its rows, and the least and greatest of each key column of whole numbers or short texts."""

    def __init__(self, key: Sequence[str]) -> None:
        self.rows = 0
        self._extremes: dict[str, list[Any]] = {name: [] for name in key}

    def add(self, rows: pa.Table) -> None:
        """Take in a row group."""
        import pyarrow as pa
        import pyarrow.compute as pc

        self.rows += rows.num_rows
        for name, values in self._extremes.items():
            column = rows.column(name)
            if pa.types.is_integer(column.type) or pa.types.is_string(column.type):
                values += pc.min_max(column).as_py().values()

    def statistics(self) -> dict[str, Any]:
        """Return them as Delta's log has them: bounds of all columns, or of none where one has a text that is too long.

        A bound that is left out makes a reader look into the file; delta-rs' dataset passes over one that has only some.
        """
        bounds = {name: values for name, values in self._extremes.items() if values}
        texts = [value for values in bounds.values() for value in values if isinstance(value, str)]
        if not bounds or any(len(text) > LONGEST_BOUND for text in texts):
            return {"numRecords": self.rows}
        return {
            "numRecords": self.rows,
            "minValues": {name: min(values) for name, values in bounds.items()},
            "maxValues": {name: max(values) for name, values in bounds.items()},
            "nullCount": dict.fromkeys(bounds, 0),
        }
