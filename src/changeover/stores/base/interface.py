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

    from changeover.stores.base.reader import Reading

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
    """What one run of a collection did: versions removed, and the place where the next run goes on, None after the last."""

    rows: int
    following: int | None


class Mark(Protocol):
    """Marks a chunk as loaded in the ledger; picklable, used in a task or on the driver."""

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark in the transaction of the rows; False means fenced off, and the caller rolls back."""
        ...

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark in a transaction of its own, after an idempotent append."""
        ...

    def identity(self, chunk: int) -> str:
        """Return the name under which a chunk is appended once and never again."""
        ...


@dataclass(frozen=True)
class Frozen:
    """A state of a table that no later write changes.

    `position` names it. `ranges` are the key ranges that `frame` reads as partitions. `frame` gives
    its live rows, or those of some keys in PostgreSQL's text form. `query` runs SQL of the user's
    in the store's own engine. `same_file` tells whether the table still has the file that it had
    before the state was taken: one that was replaced reads as empty.
    """

    position: str
    ranges: Sequence[tuple[tuple[str, ...] | None, tuple[str, ...] | None]]
    frame: Callable[[Sequence[tuple[str, ...]] | None], DataFrame]
    query: Callable[[str], list[tuple[Any, ...]]]
    same_file: Callable[[], bool]
    reading: Reading | None = None
    """How its rows are read where it is PostgreSQL's."""


class PassOn(Protocol):
    """Offers changes whose values are PostgreSQL's texts; not to `write` raises what it would raise, and writes nothing."""

    def __call__(
        self, table: TargetTable, changes: pa.Table, reached: Version | None = None, *, write: bool = True
    ) -> Counts:  # fmt: skip
        """Offer them."""
        ...


class Store(Protocol):
    """A target store: what the pipeline asks of it, and when."""

    name: str
    merges_while_loading: bool
    """Whether replay may run beside the backfill; otherwise it starts after the last chunk."""
    takes_text: bool
    """Whether `load` and `merge` take a column that is only moved as PostgreSQL's own text (`pgtypes.moved`)."""

    def columns(self, schema: str, name: str) -> tuple[Column, ...] | None:
        """Return the columns of an existing table, or None (prepare)."""
        ...

    def type_of(self, column: Column) -> str:
        """Return a column's type by the name that this kind of store has for it."""
        ...

    def holds(self, source: Column, target: Column) -> bool:
        """Return whether a column of a table here holds every value of a source column, carried as it is (check, prepare)."""
        ...

    def misfits(self, table: str, names: Sequence[str], *, owned: bool = False) -> list[str]:
        """Return why a table, by its name in the spec, can't have columns of these names here, each a sentence (check, prepare).

        `owned` is as the table's will be.
        """
        ...

    def objections(self, schema: str, name: str, key: Sequence[str]) -> list[str]:
        """Return reasons why what is there can't be a target, or why none can be made, each a sentence (check, prepare)."""
        ...

    def remarks(self, schema: str, name: str) -> list[str]:
        """Return what a person should know of an existing table, each a sentence (check)."""
        ...

    def has_rows(self, schema: str, name: str) -> bool:
        """Return whether an existing table has rows (prepare)."""
        ...

    def create(self, table: TargetTable) -> None:
        """Create the table (prepare)."""
        ...

    def install(self, table: TargetTable, image: Version) -> None:
        """Install the gate with its floor at v0 (prepare); idempotent."""
        ...

    def load(self, table: TargetTable, chunks: Sequence[int], read: Callable[[Sequence[int]], DataFrame], mark: Mark) -> None:
        """Load the chunks' images; `read` gives a frame whose partition i holds chunk number `chunks[i]` (backfill)."""
        ...

    def try_rows(self, table: TargetTable, rows: DataFrame) -> None:
        """Raise what loading images would raise, and write nothing (a search for a bad row)."""
        ...

    def try_changes(self, table: TargetTable, changes: DataFrame) -> None:
        """Raise what merging changes would raise, and write nothing (a search for a bad row)."""
        ...

    def close(self, table: TargetTable) -> int:
        """Barrier and sweep after the last chunk; return the ghosts removed (backfill)."""
        ...

    def merge(self, table: TargetTable, changes: DataFrame, reached: Version | None = None) -> Counts:
        """Offer changes, one row a key, through the gate (replay).

        `reached` says that the table is closed, and that these are all changes up to that version
        that were not offered before. A store may then let the position be the gate, and write no
        version for each key.
        """
        ...

    @property
    def pass_on(self) -> PassOn | None:
        """Return what offers changes whose values are PostgreSQL's texts, versions in front; None where they are not taken."""
        ...

    def truncate(self, spark: SparkSession, table: TargetTable, version: Version) -> None:
        """Delete every row older than a TRUNCATE of that version, and refuse what is older from then on (replay)."""
        ...

    def row_versions(self, table: TargetTable) -> int:
        """Return about how many versions are kept beside the table; costs next to nothing (replay, status)."""
        ...

    def collect(self, table: TargetTable, upto: Version, start: int) -> Collected:
        """Remove some of the versions up to one that `rule.collectable` allows, from a place on, first 0 (replay)."""
        ...

    def freeze(
        self, spark: SparkSession, tables: Sequence[TargetTable], parts: int
    ) -> AbstractContextManager[Callable[[TargetTable], Frozen]]:  # fmt: skip
        """Hold a state of tables that verification reads, by as many sessions however many there are (verify).

        What it yields gives a table's, in about `parts` ranges of the key where the store has an order, and raises what stands
        against that table alone.
        """
        ...

    def rehearsing(
        self, spark: SparkSession, table: TargetTable, scratch: Path, images: DataFrame, changes: DataFrame
    ) -> AbstractContextManager[DataFrame | None]:
        """Take images and changes without a row as `load` and `merge` do, and leave nothing behind, nor in `scratch` (check).

        Yields the rows as verification reads them, none where the table is not there yet and nothing else tells.
        """
        ...

    def begin_anew(self, table: TargetTable, image: Version, appended: Sequence[str]) -> None:
        """Take every row and tombstone out and put the floor to a later epoch's v0; what earlier epochs offer has no effect then.

        `appended` are the names under which chunks of earlier epochs may have been appended (prepare --anew).
        """
        ...

    def finalize(self, table: TargetTable) -> None:
        """Remove the gate and tombstones, keep the table and its rows (finalize)."""
        ...

    def abort(self, table: TargetTable, created: bool) -> None:
        """Remove what prepare made, the table too where prepare created it (abort)."""
        ...
