"""A Delta Lake table as a target: idempotent appends while loading, then gated MERGEs by one writer.

Every row bears `_version` (epoch, lsn, ordinal) and `_deleted`, by reserved names where the table has such columns of its own; a
tombstone is a row. A chunk is appended under an application
id of its own with version 1, so a repeated append is skipped (`appends`). An append never conflicts with an earlier
MERGE, so merges begin only after the last chunk. Readers use `live_rows`; readers by path see tombstones until `finalize`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from deltalake import DeltaTable, TableFeatures
from deltalake.exceptions import TableNotFoundError
from deltalake.schema import Schema

from changeover.errors import CouldNotFinish, RowRefused
from changeover.files import folders
from changeover.files.trouble import working
from changeover.names import RESERVED, chosen, folded, nth, quoted, segment
from changeover.position import Version, image_version
from changeover.spark.failures import raise_failures
from changeover.stores.base.fits import lake_holds
from changeover.stores.base.interface import DELETED as GONE
from changeover.stores.base.interface import (
    EPOCH,
    HASHED,
    LEFT,
    LSN,
    MEET,
    ORDINAL,
    OWNER,
    Collected,
    Counts,
    Frozen,
    Mark,
    TargetTable,
)
from changeover.stores.base.pgtypes import Column, postgres_type
from changeover.stores.base.reader import EVERYTHING, Taken
from changeover.stores.base.taskresult import OUTCOME
from changeover.stores.delta import merges
from changeover.stores.delta.appends import (
    DELETED,
    MARKS,
    VERSION,
    AppendTask,
    TryTask,
    claim,
    marks,
    marks_among,
    require_values,
)
from changeover.stores.delta.files import STATISTICS, unread

if TYPE_CHECKING:
    from pyspark.sql import Column as SparkColumn
    from pyspark.sql import DataFrame, SparkSession

TO_DELTA = {"tinyint": "byte", "smallint": "short", "int": "integer", "bigint": "long"}
FROM_DELTA = {delta: spark for spark, delta in TO_DELTA.items()}


HOLDER, HELD = f"{RESERVED}holder", f"{RESERVED}held"
"""Whose a lake's row is, and since which version, beside what is offered to it."""

BOUNDED = frozenset({"smallint", "int", "bigint", "string"})
"""Types whose bounds every reader takes alike."""

NOT_WRITTEN = ("delta.constraints.", "delta.columnMapping.", "delta.enableRowTracking", "delta.identity")
"""Properties of a table whose files an append of ours would write wrongly, or unchecked."""

NOT_KEPT = ("delta.appendOnly", "delta.enableChangeDataFeed")
"""Properties of a table that a merge would meet or break: it takes files away, and writes no feed of the rows that it changed."""

NOT_TAKEN = frozenset(" ,;{}()\n\t=")
"""Characters that Delta refuses in a column's name unless the table maps its columns, which an append of ours does not keep."""


class Unmarked:
    """The mark of a chunk that is on nobody's record, because it has no row."""

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark nothing."""
        return True

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark nothing."""
        return True

    def identity(self, chunk: int) -> str:
        """Return some name."""
        return f"check-{chunk}"


class DeltaStore:
    """A folder of Delta tables as the target of one migration."""

    merges_while_loading = False
    takes_text = False
    pass_on = None

    def __init__(self, name: str, folder: Path, migration: str, mode: int = 0o700) -> None:
        self.name = name
        self.folder = folder
        self.migration = migration
        self.mode = mode
        self.floors: dict[str, Version] = {}

    def path(self, name: str) -> Path:
        """Return the folder of a table.

        Args:
            name: The table, as schema.table.

        Returns:
            The folder, whether it is there or not.
        """
        return self.folder / segment(name)

    def columns(self, schema: str, name: str) -> tuple[Column, ...] | None:
        """Return the table's own columns, without version and tombstone."""
        table = self._open(name)
        if table is None:
            return None
        fields = json.loads(table.schema().to_json())["fields"]
        ours = marks_among([field["name"] for field in fields]) or ()
        return tuple(
            Column(field["name"], postgres_type(kind) or "text", kind, not field["nullable"])
            for field in fields
            if field["name"] not in (*ours, OWNER)
            for kind in [_from_delta(field["type"])]
        )

    def type_of(self, column: Column) -> str:
        """Return a column's type by the name that this kind of store has for it."""
        return column.spark_type

    def holds(self, source: Column, target: Column) -> bool:
        """Return whether a column of a table here holds every value of a source column, carried as it is."""
        return lake_holds(source.spark_type, target.spark_type)

    def misfits(self, table: str, names: Sequence[str], *, owned: bool = False) -> list[str]:
        """Return which names Delta does not take: two that differ in case alone, and those with a character of its own."""
        there: dict[str, str] = {}
        misfits = []
        for name in names:
            if (other := there.setdefault(folded(name), name)) != name:
                misfits.append(f"two columns that differ in case alone, {_escaped(other)} and {_escaped(name)}")
            if NOT_TAKEN & set(name):
                misfits.append(f"a column {_escaped(name)}")
        return [
            f"target table {table} would have {one}, which Delta does not take: give another name in [table.columns]"
            for one in misfits
        ]

    def objections(self, schema: str, name: str, key: Sequence[str]) -> list[str]:
        """Return what stands against a folder: an existing table must have our versions, and files that an append can write."""
        table = self._open(name)
        subject = f"target {self.name}: {self.path(name)}"
        if table is None:
            return [f"{subject} {reason}" for reason in unwritable(self.path(name))]
        if marks_among([field.name for field in table.schema().fields]) is None:
            return [f"{subject} is a Delta table without {VERSION} and {DELETED}: name another one"]
        metadata = table.metadata()
        columns = json.loads(table.schema().to_json())["fields"]
        reasons = [f"is partitioned by {', '.join(metadata.partition_columns)}"] if metadata.partition_columns else []
        reasons += [f"has the property {name}" for name in metadata.configuration if name.startswith(NOT_WRITTEN)]
        reasons += [
            f"has the column {c['name']} with {kind}" for c in columns for kind in c["metadata"] if kind.startswith("delta.")
        ]
        reasons += [f"has the table feature {feature}" for feature in unread(table)]
        reasons += [f"has {name} = true" for name in NOT_KEPT if metadata.configuration.get(name, "").lower() == "true"]
        return [f"{subject} {reason}, which an append or a merge of ours does not keep: name another one" for reason in reasons]

    def remarks(self, schema: str, name: str) -> list[str]:
        """Return nothing: all that there is to be said of a folder stands against it."""
        return []

    def has_rows(self, schema: str, name: str) -> bool:
        """Return whether the table has any file."""
        table = self._open(name)
        return table is not None and bool(table.file_uris())

    def create(self, table: TargetTable) -> None:
        """Create the table; all but the key may be NULL, because a tombstone has a key alone."""
        fields = [
            {"name": c.name, "type": _to_delta(c.spark_type), "nullable": c.name not in table.key, "metadata": {}}
            for c in table.columns
        ]
        fields += [{"name": OWNER, "type": "string", "nullable": True, "metadata": {}}] if table.owned else []
        parts = [("epoch", "integer"), ("lsn", "long"), ("ordinal", "long")]
        version, deleted = marks(table.names)
        fields += [
            {"name": version, "nullable": False, "metadata": {}, "type": {"type": "struct", "fields": [
                {"name": name, "type": kind, "nullable": True, "metadata": {}} for name, kind in parts]}},
            {"name": deleted, "type": "boolean", "nullable": False, "metadata": {}},
        ]  # fmt: skip
        folders.made(self.folder, self.mode)
        schema = Schema.from_json(json.dumps({"type": "struct", "fields": fields}))
        made = DeltaTable.create(str(self.path(table.name)), schema, configuration=_statistics(table))
        if made.protocol().writer_features is not None:
            # from writer version 7 on (timestamp_ntz asks for it) NOT NULL is a feature that must be named
            made.alter.add_feature(TableFeatures.Invariants)

    def install(self, table: TargetTable, image: Version) -> None:
        """The gate is the merge's own comparison; only the floor has to be known."""
        self.floors[table.name] = image

    def load(self, table: TargetTable, chunks: Sequence[int], read: Callable[[Sequence[int]], DataFrame], mark: Mark) -> None:
        """Append each chunk once and mark it: one Spark job, a task a chunk."""
        required = self._required(table)
        task = AppendTask(
            str(self.path(table.name)), table.key, required, tuple(chunks), self.floors[table.name], mark,
            _marks(self._existing(table.name)),
            (*table.names, *self._owner(table))
        )  # fmt: skip
        images = chosen(read(chunks), (*table.names, *self._owner(table)))
        raise_failures(row.failure for row in images.mapInArrow(task, OUTCOME).collect())

    def _required(self, table: TargetTable) -> tuple[str, ...]:
        fields = self._existing(table.name).schema().fields
        return tuple(field.name for field in fields if not field.nullable and field.name in table.names)

    def try_rows(self, table: TargetTable, rows: DataFrame) -> None:
        """Evaluate images and look for values that the table must have."""
        self._try(table, rows, self._required(table))

    def try_changes(self, table: TargetTable, changes: DataFrame) -> None:
        """Evaluate changes and look for values that the table must have: of a delete its key alone, of a row that lives all."""
        self._try(table, changes, table.key)
        if beside := set(self._required(table)) - set(table.key):
            self._try(table, changes.where(f"NOT {GONE}"), sorted(beside))

    def _try(self, table: TargetTable, rows: DataFrame, required: Sequence[str]) -> None:
        task = TryTask(str(self.path(table.name)), tuple(required), table.names)
        raise_failures(row.failure for row in chosen(rows, table.names).mapInArrow(task, OUTCOME).collect())

    def close(self, table: TargetTable) -> int:
        """Nothing to sweep: no merge ran before the last append. Images that meet in one key are refused by name."""
        from pyspark.sql import SparkSession
        from pyspark.sql import functions as F

        if self._owner(table):
            images = SparkSession.active().read.format("delta").load(str(self.path(table.name)))
            keys = F.sort_array(F.collect_list(OWNER)).alias(HOLDER)
            owners = images.groupBy(*map(quoted, table.key)).agg(keys).where(F.size(HOLDER) > 1).select(HOLDER)
            if (met := owners.first()) is not None:
                raise RowRefused(str(table), f"source keys {' and '.join(met[0])}", MEET)
        return 0

    def _owner(self, table: TargetTable) -> list[str]:
        """Return the column of source keys where it is kept; a table that was made without one has none."""
        return [OWNER] if table.owned and self._has_owner(table) else []

    def _has_owner(self, table: TargetTable) -> bool:
        return any(field.name == OWNER for field in self._existing(table.name).schema().fields)

    def _require_sole(self, spark: SparkSession, table: TargetTable, offered: DataFrame, version: str, deleted: str) -> None:
        """Refuse a put that would overwrite the live row of another source key, which this batch does not delete (see `owners`)."""
        from pyspark.sql import functions as F

        live = spark.read.format("delta").load(str(self.path(table.name))).where(~F.col(deleted))
        matched = live.select(F.col(OWNER).alias(HOLDER), F.col(version).alias(HELD), *map(quoted, table.key)).alias("t")
        same = " AND ".join(f"t.{quoted(name)} = s.{quoted(name)}" for name in table.key)
        met = (
            offered.where(~F.col(deleted) & (F.col(f"{version}.epoch") == self.floors[table.name].epoch))
            .alias("s")
            .join(matched, F.expr(same))
            .where((F.col(version) > F.col(HELD)) & (F.col(HOLDER) != F.col(OWNER)) & ~F.array_contains(LEFT, F.col(HOLDER)))
            .where(F.col(HOLDER).contains(HASHED) == F.col(OWNER).contains(HASHED))
            .select(HOLDER, OWNER)
            .first()
        )
        if met is not None:
            raise RowRefused(str(table), f"source keys {met[0]} and {met[1]}", MEET)

    def merge(self, table: TargetTable, changes: DataFrame, reached: Version | None = None) -> Counts:
        """Offer changes by one commit: an older one changes nothing, a delete of an absent key leaves a tombstone.

        The driver has them all, since a batch is bounded; Spark's own MERGE costs seconds for a single row.
        """
        import pyarrow.compute as pc
        from pyspark.sql import functions as F

        version, deleted = _marks(self._existing(table.name))
        at = F.struct(F.col(EPOCH).alias("epoch"), F.col(LSN).alias("lsn"), F.col(ORDINAL).alias("ordinal"))
        owner = self._owner(table)
        own = [*owner, *([LEFT] if owner else [])]
        offered = changes.select(*map(quoted, table.names), *own, at.alias(version), F.col(GONE).alias(deleted))
        offered = offered.where(F.col(version) > _literal(self.floors[table.name]))
        if owner:
            self._require_sole(changes.sparkSession, table, offered, version, deleted)
        elif self._has_owner(table):  # what another store's stream brings has no source key of this one's
            offered = offered.withColumn(OWNER, F.lit(None).cast("string"))
        rows = offered.drop(LEFT).toArrow()
        path = str(self.path(table.name))
        require_values(path, table.key, rows)
        require_values(path, self._required(table), rows.filter(pc.invert(rows[deleted])))
        with working(path):
            taken = merges.merge(path, rows, table.key, version) if rows.num_rows else 0
        return Counts(taken, taken)

    def truncate(self, table: TargetTable, version: Version) -> None:
        """Make a tombstone of every older row. Older changes find it: events come in order, so each has a row by now."""
        at, deleted = _marks(self._existing(table.name))
        with working(self.path(table.name)):
            merges.bury(str(self.path(table.name)), table.key, at, deleted, version)

    def row_versions(self, table: TargetTable) -> int:
        """Return 0: versions are columns of the rows, and tombstones are rows that stay until `finalize`."""
        return 0

    def collect(self, table: TargetTable, upto: Version, start: int) -> Collected:
        """Collect nothing: no floor in the table would turn away a MERGE of a replay that lost its lease without knowing."""
        return Collected(0, None)

    @contextmanager
    def freeze(
        self, spark: SparkSession, tables: Sequence[TargetTable], parts: int, taken: Taken | None = None
    ) -> Iterator[Callable[[TargetTable], Frozen]]:  # fmt: skip
        """Name a table's present version, which no later commit changes; it has no order of keys, so one range."""
        yield lambda table: self._frozen(spark, table)

    def _frozen(self, spark: SparkSession, table: TargetTable) -> Frozen:
        version = self._existing(table.name).version()
        live = live_rows(spark, self.path(table.name), version).select(*map(quoted, table.names))

        def frame(keys: Sequence[tuple[str, ...]] | None = None) -> DataFrame:
            if keys is None:
                return live
            names = [nth(number) for number in range(len(table.key))]
            asked_keys = spark.createDataFrame([tuple(key) for key in keys], ", ".join(f"{name} string" for name in names))
            same = [live[quoted(name)].cast("string") == asked_keys[asked] for name, asked in zip(table.key, names, strict=True)]
            return live.join(asked_keys, same, "left_semi")

        def query(text: str) -> list[tuple[Any, ...]]:
            live.createOrReplaceTempView(quoted(table.name))
            answer = spark.sql(text).toArrow()  # which keeps zones; a row's timestamps would be the machine's local time
            return list(zip(*(column.to_pylist() for column in answer.columns), strict=True))

        # a version names its files, and one that is gone is an error of the read
        return Frozen(f"version {version}", EVERYTHING, frame, query, same_file=lambda: True)

    @contextmanager
    def rehearsing(
        self, spark: SparkSession, table: TargetTable, scratch: Path, images: DataFrame, changes: DataFrame
    ) -> Iterator[DataFrame | None]:
        """Make a table like it in a folder that is removed, and MERGE nothing into it."""
        table = replace(table, owned=False)  # without a row nobody owns one
        with passing_folder(scratch) as folder:
            copy = DeltaStore(self.name, folder, self.migration)
            copy.create(table)
            copy.install(table, image_version(0))
            copy.load(table, [0], lambda _: images, Unmarked())
            copy.merge(table, changes)
            with copy.freeze(spark, [table], 1) as hold:
                yield hold(table).frame(None)

    def begin_anew(self, table: TargetTable, image: Version, appended: Sequence[str]) -> None:
        """Claim the names of earlier appends, so that none comes late, then take all rows and tombstones out."""
        claim(str(self.path(table.name)), appended)
        self._existing(table.name).delete()
        self.floors[table.name] = image

    def finalize(self, table: TargetTable) -> None:
        """Remove the tombstones; the columns of ours stay, dropping them would rewrite the table."""
        delta = self._open(table.name)
        if delta is not None:
            delta.delete(_marks(delta)[1])

    def abort(self, table: TargetTable, created: bool) -> None:
        """Remove the table where prepare created it."""
        if created and self.path(table.name).exists():
            shutil.rmtree(self.path(table.name))

    def _existing(self, name: str) -> DeltaTable:
        delta = self._open(name)
        if delta is None:
            raise CouldNotFinish(f"target {self.name}: there is no Delta table at {self.path(name)}")
        return delta

    def _open(self, name: str) -> DeltaTable | None:
        if not self.path(name).is_dir():
            return None
        try:
            return DeltaTable(str(self.path(name)))
        except TableNotFoundError:
            return None


@contextmanager
def passing_folder(parent: Path) -> Iterator[Path]:
    """Make a folder for the block, and above it what is missing; all of it is removed at the end."""
    missing = [one for one in (parent, *parent.parents) if not one.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="check-", dir=parent) as folder:
            yield Path(folder)
    finally:
        for folder_above in missing:
            folder_above.rmdir()


def unwritable(path: Path) -> list[str]:
    """Return why no Delta table can be made in a folder that has none (looks only)."""
    if path.exists() and not path.is_dir():
        return ["is a file: name another one"]
    if any(file.is_file() for file in path.rglob("*") if "_delta_log" not in file.parts):  # whose own is a creation's, killed
        return ["is a folder with files and no Delta table: empty it or name another one"]
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        return [f"can't be made: {nearest} is a file"]
    return [] if os.access(nearest, os.W_OK | os.X_OK) else [f"can't be made: {nearest} is not writable"]


def live_rows(spark: SparkSession, path: Path | str, version: int | None = None) -> DataFrame:
    """Return the rows of a migrated Delta table that are not tombstones, as of a version if given (lazy)."""
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    rows = reader.load(str(path))
    at, deleted = marks_among(rows.columns) or MARKS
    return rows.where(f"NOT {deleted}").drop(at, deleted, OWNER)


def _marks(table: DeltaTable) -> tuple[str, str]:
    """Return what our columns of a lake's table are called."""
    return marks_among([field.name for field in table.schema().fields]) or MARKS


def _escaped(name: str) -> str:
    """Return a name as a sentence has it, whatever characters it is made of."""
    return json.dumps(name, ensure_ascii=False)


def _literal(version: Version) -> SparkColumn:
    from pyspark.sql import functions as F

    parts = zip(version._fields, ("int", "bigint", "bigint"), version, strict=True)
    return F.struct(*(F.lit(value).cast(kind).alias(name) for name, kind, value in parts))


def _statistics(table: TargetTable) -> dict[str, str | None]:
    """Return the properties by which no writer keeps statistics that readers take otherwise (Delta protocol, Per-file Statistics).

    Spark cuts a timestamp's bounds to milliseconds, which delta-rs takes as they are, and passes over files; days and moments far
    from now it can't read at all. So the columns are those of which an append keeps them: the key's whole numbers and texts.
    """
    names = [c.name for c in table.columns if c.name in table.key and c.spark_type in BOUNDED]
    return {STATISTICS: ",".join(map(quoted, names))} if names else {"delta.dataSkippingNumIndexedCols": "0"}


def _to_delta(spark_type: str) -> Any:
    """Return a Spark type as Delta's schema has it."""
    array = re.fullmatch(r"array<(.+)>", spark_type)
    if array:
        return {"type": "array", "elementType": _to_delta(array[1]), "containsNull": True}
    return TO_DELTA.get(spark_type, spark_type)


def _from_delta(kind: Any) -> str:
    if isinstance(kind, dict) and kind.get("type") == "array":
        return f"array<{_from_delta(kind['elementType'])}>"
    return FROM_DELTA.get(kind, kind) if isinstance(kind, str) else json.dumps(kind)
