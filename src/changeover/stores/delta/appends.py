"""Appends to a Delta table from Spark's tasks: one Parquet file and one commit a chunk, once whatever happens.

A task writes its chunk's file beside the table's others, where no reader can see it. Then it
commits the file under the chunk's own application id (`txn`, Delta's transaction protocol,
Transaction Identifiers). Delta's Python writer checks no application id by itself: the id is looked
up in the version that the commit must follow directly, and again after each conflict. The ledger's
mark comes last, so a chunk that is marked is in the table; a task that dies leaves at most a file
that nobody reads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltalake import DeltaTable, Transaction
from deltalake.transaction import AddAction

from changeover import failpoints
from changeover.errors import ChangeoverError, CouldNotFinish, RowRefused
from changeover.files.trouble import working
from changeover.names import RESERVED, folded
from changeover.position import Version
from changeover.spark.failures import failure_of
from changeover.stores.base.interface import Counts, Mark
from changeover.stores.base.taskresult import outcome, partition
from changeover.stores.delta.files import bounded, write
from changeover.stores.delta.merges import act, committed

if TYPE_CHECKING:
    import pyarrow as pa

VERSION, DELETED = MARKS = ("_version", "_deleted")
"""Our two columns of a lake's table: a struct<epoch:int,lsn:bigint,ordinal:bigint>, and whether the row is a tombstone.

Spark compares structs field by field, which is the axis' order.
"""

APART = (f"{RESERVED}version", f"{RESERVED}deleted")
"""Their names in a table which has a column of its own by one of the others."""


def marks(own: Collection[str]) -> tuple[str, str]:
    """Return what our columns are called beside a table's own, whose case Delta does not tell apart (pure)."""
    return APART if set(map(folded, own)) & set(MARKS) else MARKS


def marks_among(columns: Collection[str]) -> tuple[str, str] | None:
    """Return what our columns are called among all of a table's, None where they are not there (pure).

    Args:
        columns: All columns' names.

    Returns:
        Both names, or None.
    """
    return next((pair for pair in (APART, MARKS) if set(pair) <= set(columns)), None)


ROW_GROUP = 100_000
APPEND_VERSION = 1
"""Every chunk has an application id of its own, the same for all attempts, and is appended under it once."""


@dataclass(frozen=True)
class AppendTask:
    """What a Spark task does with one chunk's rows (task; once per attempt)."""

    path: str
    key: tuple[str, ...]
    required: tuple[str, ...]
    chunks: tuple[int, ...]
    image: Version
    mark: Mark
    marks: tuple[str, str] = MARKS
    columns: tuple[str, ...] = ()
    """What the rows' columns are called in the table, where they come by their positions."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Write, commit, mark."""
        try:
            with working(self.path):
                yield outcome(self.append(self.chunks[partition()], batches))
        except ChangeoverError as error:
            yield outcome(None, failure_of(error))

    def append(self, chunk: int, batches: Iterator[pa.RecordBatch]) -> Counts:
        """Append one chunk once and mark it."""
        started = time.monotonic()
        point = f"{self.path} {chunk}"
        added = self._write(chunk, batches)
        failpoints.reach("chunk-read", point)
        rows = commit_once(self.path, self.mark.identity(chunk), added)
        failpoints.reach("target-committed", point)
        counts = Counts(rows, rows)
        self.mark.afterwards(chunk, counts, time.monotonic() - started)
        failpoints.reach("between-chunks", point)
        return counts

    def _write(self, chunk: int, batches: Iterator[pa.RecordBatch]) -> list[AddAction]:
        """Write one file; a chunk without rows has none."""
        key = bounded(DeltaTable(self.path), self.key)
        added = write(Path(self.path), map(self._whole, row_groups(batches)), key, chunk)
        return [added] if added is not None else []

    def _whole(self, placed: pa.Table) -> pa.Table:
        """Return rows with their names, version and tombstone."""
        import pyarrow as pa

        rows = placed.rename_columns(list(self.columns)) if self.columns else placed
        require_values(self.path, self.required, rows)
        version, deleted = self.marks
        marked = rows.append_column(version, pa.repeat(_version(self.image), rows.num_rows))
        return marked.append_column(deleted, pa.repeat(pa.scalar(False), rows.num_rows))


@dataclass(frozen=True)
class TryTask:
    """What a Spark task does with rows of which only is to be known whether the table takes them (task)."""

    path: str
    required: tuple[str, ...]
    columns: tuple[str, ...]
    """The names of the columns that come by their positions."""

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Look at every row and write none."""
        try:
            for placed in row_groups(batches):
                require_values(self.path, self.required, placed.rename_columns(list(self.columns)))
        except ChangeoverError as error:
            yield outcome(None, failure_of(error))


def require_values(path: str, required: Sequence[str], rows: pa.Table) -> None:
    """Raise RowRefused where a column that must have a value has none."""
    for name in required:
        if rows.column(name).null_count:
            raise RowRefused(path, f"column {name}", f"column {name} must not be NULL")


def _version(image: Version) -> pa.Scalar:
    import pyarrow as pa

    kind = pa.struct([("epoch", pa.int32()), ("lsn", pa.int64()), ("ordinal", pa.int64())])
    return pa.scalar({"epoch": image.epoch, "lsn": image.lsn, "ordinal": image.ordinal}, kind)


def row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Gather batches into tables of about one row group."""
    import pyarrow as pa

    gathered: list[pa.RecordBatch] = []
    for batch in batches:
        if batch.num_rows:
            gathered.append(batch)
        if sum(group.num_rows for group in gathered) >= ROW_GROUP:
            yield pa.Table.from_batches(gathered)
            gathered = []
    if gathered:
        yield pa.Table.from_batches(gathered)


def appended(recorded: int | None, version: int = APPEND_VERSION) -> bool:
    """Return whether an append was made before, given the version that the table records for its application id.

    It is Delta's own rule: an id shared by chunks would lose those that commit out of order, one per attempt append twice.
    """
    return recorded is not None and recorded >= version


def commit_once(path: str, identity: str, added: list[AddAction]) -> int:
    """Commit files under an application id unless that was done before; return the rows that stand under it (task)."""

    def commit(table: DeltaTable) -> int:
        if appended(table.transaction_version(identity)):
            return appended_rows(Path(path), identity)
        _append(table, added, [identity])
        return sum(json.loads(action.stats)["numRecords"] for action in added)

    return committed(path, commit)


def claim(path: str, identities: Sequence[str]) -> None:
    """Take application ids by a commit without files, so that an append that is still to come under one of them is skipped."""

    def commit(table: DeltaTable) -> None:
        if not all(appended(table.transaction_version(identity)) for identity in identities):
            _append(table, [], identities)

    committed(path, commit)


def _append(table: DeltaTable, added: list[AddAction], identities: Sequence[str]) -> None:
    """Commit files; the commit must follow the version in which the ids were looked up."""
    act(table, added, *(Transaction(identity, APPEND_VERSION) for identity in identities))


def appended_rows(path: Path, identity: str) -> int:
    """Return how many rows the append under an application id wrote; its commit is looked up, newest first.

    The commit's actions are as the Delta transaction log protocol defines them (Transaction Identifiers, Add File).
    """
    for commit in sorted((path / "_delta_log").glob("*.json"), reverse=True):
        actions = [json.loads(line) for line in commit.read_text(encoding="utf-8").splitlines()]
        if any(action.get("txn", {}).get("appId") == identity for action in actions):
            return sum(json.loads(action["add"]["stats"])["numRecords"] for action in actions if "add" in action)
    raise CouldNotFinish(f"no commit of {path} bears the identity {identity}, though its append ended")
