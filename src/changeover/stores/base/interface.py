"""The stores that a table can move to, behind one small interface.

A third kind of store implements `Store` and is entered in `open_store`; nothing else in the
pipeline asks what kind it is. The methods run on the driver; what they hand to Spark must pickle.
Correctness asks three things of a store. `merge` takes a change if and only if its version is above
the key's cell and the floor. `load` never puts an image over a cell. `freeze` gives a state that no
later write changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psycopg

from changeover.names import RESERVED, joined
from changeover.position import Version
from changeover.stores.base.pgtypes import Column

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

    from changeover.stores.base.reader import Reading, Taken

HASHED = "sha256:"
"""How the hash begins that stands for a value of a sensitive column."""

MEET = "two source rows that are alive have this one target key"

EPOCH, LSN, ORDINAL, DELETED = VERSION_COLUMNS = tuple(f"{RESERVED}{name}" for name in ("epoch", "lsn", "ordinal", "deleted"))
"""Columns that a frame, a batch and a row version have beside the table's own: a version and whether the key is gone."""

OWNER, LEFT = "_changeover_owner", "_changeover_left"
"""What an image or a change has besides where several source keys may make one target key (`TargetTable.owned`).

The source key that it comes from, as text; and of a change, the source keys whose rows were deleted by the same batch.
"""


@dataclass(frozen=True)
class TargetTable:
    """A target table as the pipeline sees it: where it is, its columns in order, and its key."""

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    owned: bool = False
    """Whether the source key of each live row is kept, because nothing proves that no other source row has its target key."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the column names in order."""
        return tuple(column.name for column in self.columns)

    def __str__(self) -> str:
        return joined(self.schema, self.name)


@dataclass(frozen=True)
class Counts:
    """What one chunk or batch did: rows offered, taken, and images refused because of a tombstone."""

    offered: int
    taken: int
    refused: int = 0


@dataclass(frozen=True)
class Collected:
    """What one run of a collection did.

    `rows` are the versions removed; `following` is where the next run starts, None after the last.
    """

    rows: int
    following: int | None


class Mark(Protocol):
    """Marks a chunk as loaded in the ledger; picklable, used in a task or on the driver."""

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark a chunk in the transaction of its rows (task).

        Args:
            cursor: A cursor of that transaction.
            chunk: The chunk's number, from 0.
            counts: What the chunk did: rows offered, taken and refused.
            seconds: How long it took, in seconds.

        Returns:
            False where the attempt was fenced off: then the caller rolls back.
        """
        ...

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark a chunk in a transaction of its own, after an idempotent append (task).

        Args:
            chunk: The chunk's number, from 0.
            counts: What the chunk did: rows offered, taken and refused.
            seconds: How long it took, in seconds.

        Returns:
            False where the attempt was fenced off: the rows are in all the same, once.
        """
        ...

    def identity(self, chunk: int) -> str:
        """Return the name under which a chunk is appended once and never again.

        Args:
            chunk: The chunk's number, from 0.

        Returns:
            The name, the application id of Delta's `txn` action.
        """
        ...


@dataclass(frozen=True)
class Frozen:
    """A state of a table that no later write changes.

    `position` names it, and `ranges` are the key ranges that `frame` reads as partitions. `frame`
    gives its live rows, or those of some keys, in PostgreSQL's text form. `query` runs SQL of the
    user's in the store's own engine. `same_file` tells whether the table still has the file that it
    had before the state was taken: one that was replaced reads as empty.
    """

    position: str
    ranges: Sequence[tuple[tuple[str, ...] | None, tuple[str, ...] | None]]
    frame: Callable[[Sequence[tuple[str, ...]] | None], DataFrame]
    query: Callable[[str], list[tuple[Any, ...]]]
    same_file: Callable[[], bool]
    reading: Reading | None = None
    """How its rows are read where it is PostgreSQL's."""
    states: int = 1
    """Of how many states the rows are: the frame has the partitions of all ranges once for each."""


class PassOn(Protocol):
    """Offers changes whose values are PostgreSQL's texts; not to `write` raises what it would raise, and writes nothing."""

    def __call__(
        self, table: TargetTable, changes: pa.Table, reached: Version | None = None, *, write: bool = True
    ) -> Counts:  # fmt: skip
        """Offer changes (driver).

        Args:
            table: The target table.
            changes: One row a key: version, whether the key is gone, and the columns as
                PostgreSQL's texts.
            reached: As in `Store.merge`.
            write: Whether they are written; else it only raises what it would raise.

        Returns:
            Rows offered and taken.
        """
        ...


class Store(Protocol):
    """A target store: what the pipeline asks of it, and when."""

    name: str
    merges_while_loading: bool
    """Whether replay may run beside the backfill; otherwise it starts after the last chunk."""
    takes_text: bool
    """Whether `load` and `merge` take a column that is only moved as PostgreSQL's own text (`pgtypes.moved`)."""

    def columns(self, schema: str, name: str) -> tuple[Column, ...] | None:
        """Return the columns of an existing table (prepare).

        Args:
            schema: The table's schema.
            name: The table's name.

        Returns:
            The columns in order, None where there is no such table.
        """
        ...

    def type_of(self, column: Column) -> str:
        """Return a column's type by the name that this kind of store has for it.

        Args:
            column: The column.

        Returns:
            The type's name.
        """
        ...

    def holds(self, source: Column, target: Column) -> bool:
        """Return whether a column here holds every value of a source column as it is (check, prepare).

        Args:
            source: The source column.
            target: The column of the table here.

        Returns:
            Whether it does; in doubt not.
        """
        ...

    def misfits(self, table: str, names: Sequence[str], *, owned: bool = False) -> list[str]:
        """Return why a table can't have columns of these names here (check, prepare).

        Args:
            table: The table's name, as the spec has it.
            names: The columns' names.
            owned: As `TargetTable.owned` will be.

        Returns:
            The reasons, each a sentence.
        """
        ...

    def objections(self, schema: str, name: str, key: Sequence[str]) -> list[str]:
        """Return why what is there can't be a target, or why none can be made (check, prepare).

        Args:
            schema: The table's schema.
            name: The table's name.
            key: The key columns that the spec names.

        Returns:
            The reasons, each a sentence.
        """
        ...

    def remarks(self, schema: str, name: str) -> list[str]:
        """Return what a person should know of an existing table (check).

        Args:
            schema: The table's schema.
            name: The table's name.

        Returns:
            The remarks, each a sentence.
        """
        ...

    def has_rows(self, schema: str, name: str) -> bool:
        """Return whether an existing table has rows (prepare).

        Args:
            schema: The table's schema.
            name: The table's name.

        Returns:
            Whether it has any.
        """
        ...

    def create(self, table: TargetTable) -> None:
        """Create the table (prepare).

        Args:
            table: The target table.
        """
        ...

    def install(self, table: TargetTable, image: Version) -> None:
        """Install the gate with its floor at v0 (prepare); idempotent.

        Args:
            table: The target table.
            image: v0, the version of all images.
        """
        ...

    def load(self, table: TargetTable, chunks: Sequence[int], read: Callable[[Sequence[int]], DataFrame], mark: Mark) -> None:
        """Load the chunks' images (backfill; read and written in tasks).

        Args:
            table: The target table.
            chunks: The chunks' numbers.
            read: Gives a frame whose partition i holds chunk number `chunks[i]`.
            mark: Marks each chunk in the ledger.

        Raises:
            RowRefused: A row can't be represented in the target.
        """
        ...

    def try_rows(self, table: TargetTable, rows: DataFrame) -> None:
        """Raise what loading images would raise, and write nothing (a search for a bad row).

        Args:
            table: The target table.
            rows: The target's rows.

        Raises:
            RowRefused: A row can't be represented in the target.
        """
        ...

    def try_changes(self, table: TargetTable, changes: DataFrame) -> None:
        """Raise what merging changes would raise, and write nothing (a search for a bad row).

        Args:
            table: The target table.
            changes: As in `merge`.

        Raises:
            RowRefused: A row can't be represented in the target.
        """
        ...

    def close(self, table: TargetTable) -> int:
        """Barrier and sweep after the last chunk (backfill).

        Args:
            table: The target table.

        Returns:
            How many ghosts the sweep removed: rows for whose key a tombstone is kept.
        """
        ...

    def merge(self, table: TargetTable, changes: DataFrame, reached: Version | None = None) -> Counts:
        """Offer changes through the gate (replay; read and written in tasks).

        `reached` says that the table is closed, and that these are all changes up to that version
        that were not offered before. A store may then let the position be the gate, and write no
        version for each key.

        Args:
            table: The target table.
            changes: One row a key: the target's columns, the version and whether the key is gone.
            reached: The version below which all was offered with these, of a closed table; None
                elsewhere.

        Returns:
            Rows offered and taken.

        Raises:
            RowRefused: A row can't be represented in the target.
        """
        ...

    @property
    def pass_on(self) -> PassOn | None:
        """Return what offers changes whose values are PostgreSQL's texts, versions in front; None where they are not taken."""
        ...

    def truncate(self, table: TargetTable, version: Version) -> None:
        """Delete every row older than a TRUNCATE, and refuse what is older from then on (replay).

        Args:
            table: The target table.
            version: The TRUNCATE's version.
        """
        ...

    def row_versions(self, table: TargetTable) -> int:
        """Return about how many versions are kept beside the table (replay, status).

        It costs next to nothing.

        Args:
            table: The target table.

        Returns:
            An estimate.
        """
        ...

    def collect(self, table: TargetTable, upto: Version, start: int) -> Collected:
        """Remove some of the versions up to one that `floors.collectable` allows (replay).

        Args:
            table: The target table.
            upto: That version.
            start: Where to begin: 0 first, then what the last run returned.

        Returns:
            How many were removed, and where the next run starts.
        """
        ...

    def freeze(
        self, spark: SparkSession, tables: Sequence[TargetTable], parts: int, taken: Taken | None = None
    ) -> AbstractContextManager[Callable[[TargetTable], Frozen]]:  # fmt: skip
        """Hold a state of tables that verification reads, by however many sessions (verify).

        Args:
            spark: The Spark session.
            tables: The target tables.
            parts: About how many key ranges a table is read in, where the store has an order.
            taken: What takes the snapshot, once the tables' files are known; None takes one of now.
                A store without snapshots is never given one.

        Returns:
            A context manager. It yields a function from a table to its state, which raises what
            stands against that table alone.
        """
        ...

    def rehearsing(
        self, spark: SparkSession, table: TargetTable, scratch: Path, images: DataFrame, changes: DataFrame
    ) -> AbstractContextManager[DataFrame | None]:
        """Take images and changes without a row as `load` and `merge` do, and leave nothing behind (check).

        Args:
            spark: The Spark session.
            table: The target table.
            scratch: A folder for what is made meanwhile; nothing of it stays.
            images: Images without a row.
            changes: Changes without a row.

        Returns:
            A context manager. It yields the rows as verification reads them, None where no table is
            there and nothing else tells.
        """
        ...

    def begin_anew(self, table: TargetTable, image: Version, appended: Sequence[str]) -> None:
        """Take every row and tombstone out, and put the floor to a later epoch's v0 (prepare --anew).

        What earlier epochs offer has no effect then.

        Args:
            table: The target table.
            image: v0 of the new epoch.
            appended: The names under which chunks of earlier epochs may have been appended.
        """
        ...

    def finalize(self, table: TargetTable) -> None:
        """Remove the gate and tombstones, keep the table and its rows (finalize).

        Args:
            table: The target table.
        """
        ...

    def abort(self, table: TargetTable, created: bool) -> None:
        """Remove what prepare made, the table too where prepare created it (abort).

        Args:
            table: The target table.
            created: Whether prepare made the table, which is then removed too.
        """
        ...
