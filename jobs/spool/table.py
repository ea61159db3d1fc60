"""The spool: every captured change of the source, durable, in commit order, in one Delta table.

An append is one Delta commit that carries the rows. As the application transaction `capture` it
carries the commit END LSN up to which the spool is complete. So data and resume position can't
part, and an append that was made before is left out. A large transaction comes in parts. The end
stays below it until it is whole, and no reader takes what lies beyond the end. The position of the
last event is in the same commits, so no part comes twice. An append returns only when the data
file, then the log entry, then their folders are on stable storage. The slot is told to forget what
the spool says it holds. One writer at a time (the lease `capture`), which also merges small files;
any number of readers. No event is ever removed before `finalize`, since a replay may begin anew.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from changeover.errors import FolderFailed, LeaseHeld, SourceChanged, SpoolGap, StepOrder
from changeover.files.folders import sync
from changeover.files.trouble import working
from changeover.jobs.spool.compaction import grouped, mergeable
from changeover.jobs.spool.events import (
    ADDED,
    DELETE,
    INSERT,
    NOWHERE,
    RELATION,
    SCHEMA,
    TRUNCATE,
    UPDATE,
    Event,
    Position,
    arrow_table,
    kept,
    last_position,
)
from changeover.spec import Spec

FORMAT = "2"
"""Version of the spool's columns; another version found is refused, never guessed at."""

APPLICATION = "capture"
PART_LSN, PART_ORDINAL = "capture.part.lsn", "capture.part.ordinal"
FORMAT_KEY = "changeover.format"
BEGIN_KEY = "changeover.begin"
CHECKPOINT_EVERY = 50

RETAIN_SECONDS = 86_400
"""How long a file that was merged stays for the readers who have listed it."""

LOG_RETENTION = "interval 1 hours"
"""How long log entries below a checkpoint stay: up to five a second are written, and Spark lists them all."""

ROWS_AT_ONCE = 50_000
"""How many events of a file are read before it is looked how large they are."""

ROWS_BYTES = 64 << 20
"""Bytes of events in memory after which it is looked whose they are."""

REPETITIVE = ["relation", "op", "row.key_value.key", "key.key_value.key", "missing.list.element"]
"""Columns with few values, for which a dictionary is worth its making: half the file and two thirds of the time."""

LAYOUT: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": REPETITIVE,
    "write_statistics": ["lsn"],  # by which alone row groups are chosen
}
"""How a file is written."""


def spool_path(work: Path, epoch: int) -> Path:
    """Return where the spool of an epoch's stream is (pure).

    Another source's positions are never beside those of an earlier one.

    Args:
        work: The work folder.
        epoch: The epoch in which the tables were begun.

    Returns:
        The path; nothing need be there.
    """
    return work / (f"spool-{epoch}" if epoch else "spool")


def remove_spools(work: Path) -> bool:
    """Remove the spools of all epochs (driver).

    Args:
        work: The work folder.

    Returns:
        Whether there was any.
    """
    folders = [path for path in (work / "spool", *work.glob("spool-[0-9]*")) if path.is_dir()]
    for path in folders:
        shutil.rmtree(path)
    return bool(folders)


class Spool:
    """The spool of one migration at a local path (driver)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle: DeltaTable | None = None
        self._opened = 0
        self._doubtful: int | None = None

    def create(self, begin: int = 0) -> None:
        """Create the table durably unless it is there (driver).

        Args:
            begin: The LSN at which its stream begins: what lies below is in no event of it.

        Raises:
            SourceChanged: The spool has another format than this version's.
            FolderFailed: The work folder can't be written.
        """
        with working(self.path):
            self._create(begin)
        self._table()

    def _create(self, begin: int) -> None:
        if not DeltaTable.is_deltatable(str(self.path)):
            DeltaTable.create(
                self.path,
                SCHEMA,
                mode="ignore",
                configuration={
                    FORMAT_KEY: FORMAT,
                    BEGIN_KEY: str(begin),
                    "delta.checkpointInterval": str(CHECKPOINT_EVERY),
                    "delta.logRetentionDuration": LOG_RETENTION,
                    "delta.deletedFileRetentionDuration": LOG_RETENTION,
                },
                raise_if_key_not_exists=False,
            )
            log = self.path / "_delta_log"
            for path in (*log.glob("*.json"), log, self.path, self.path.parent):
                sync(path)

    def reopen(self) -> None:
        """Forget what is known of the table: it may be another one at the same path."""
        self._handle = None

    def end(self) -> int:
        """Return the commit END LSN up to which all is durable (driver, capture).

        Returns:
            The LSN in bytes, 0 before the first append.

        Raises:
            StepOrder: There is no spool.
            FolderFailed: The work folder can't be read.
        """
        return self._marked(self._latest(), APPLICATION)

    def begin(self) -> int:
        """Return where the stream begins; a reader that needs what lies below has a gap in front of it.

        Returns:
            The LSN that `create` was given.
        """
        return int(self._table().metadata().configuration.get(BEGIN_KEY, "0"))

    def proved(self, least: int, require: Callable[[int], None]) -> None:
        """Require something of where the spool ends; capture may append, and acknowledge, meanwhile.

        Args:
            least: The LSN that it is asked with at least.
            require: Raises SpoolGap where the stream is not whole from a position on.

        Raises:
            SpoolGap: The stream is not whole, and capture has not moved the spool's end since.
        """
        while True:
            end = self.end()
            try:
                return require(max(end, least))
            except SpoolGap:
                if self.end() == end:
                    raise

    def held(self) -> Position:
        """Return the position up to which events are durable (driver, capture).

        It is that of the last part of a large transaction, where that lies beyond the end.

        Returns:
            Commit LSN and ordinal.

        Raises:
            StepOrder: There is no spool.
            FolderFailed: The work folder can't be read.
        """
        table = self._latest()
        end, lsn, ordinal = (self._marked(table, name) for name in (APPLICATION, PART_LSN, PART_ORDINAL))
        return max((end, NOWHERE[1]), (lsn, ordinal) if lsn else NOWHERE)

    def append(self, batch: Sequence[Event] | pa.Table, end_lsn: int) -> None:
        """Append whole transactions durably and once, and what is there of the next one (capture).

        A table has the spool's schema; its rows are in any order. After FolderFailed `settle` comes
        before the next append. An append that reaches no further than the spool does is left out.

        Args:
            batch: Events, or a table of the spool's schema with rows in any order.
            end_lsn: The commit END LSN of the last whole transaction.

        Raises:
            LeaseHeld: Another writer has committed meanwhile.
            FolderFailed: The work folder can't be written.
        """
        events = batch if isinstance(batch, pa.Table) else arrow_table(batch)
        reach = (end_lsn, NOWHERE[1])
        marks = [Transaction(APPLICATION, end_lsn)]
        last = last_position(events)
        if last[0] >= end_lsn:
            reach = last
            marks += [Transaction(PART_LSN, reach[0]), Transaction(PART_ORDINAL, reach[1])]
        if reach <= self.held():
            return
        with working(self.path):
            self._commit([self._write(events)] if len(events) else [], marks)

    def settle(self) -> None:
        """Make durable what a commit left in doubt whose log entry could not be brought to stable storage.

        What the system failed to write once it may count as written, so the entry is written anew and takes its own place.
        """
        if self._doubtful is None:
            return
        with working(self.path):
            entry = self.path / "_delta_log" / f"{self._doubtful:020d}.json"
            fresh = entry.with_suffix(".settling")
            fresh.write_bytes(entry.read_bytes())
            sync(fresh)
            fresh.replace(entry)
            sync(entry.parent)
        self._doubtful = None

    def compact(self) -> int:
        """Merge the newest small files into one, as durably as an append, and return how many they were (capture alone).

        Events, end and place stay as they are, and the merged files stay on disk for
        RETAIN_SECONDS. Each event comes to a file at least twice as large as the one that it was
        in, so it is written a few times at most.

        Returns:
            The number of files that were merged.

        Raises:
            FolderFailed: The spool's folder can't be written.
        """
        with working(self.path):
            return self._compact()

    def _compact(self) -> int:
        files = pa.table(self._latest().get_add_actions(flatten=True)).to_pylist()
        small = mergeable(files)
        if small:
            merged = self._merge(small)
            now = int(time.time() * 1000)
            for file in small:
                os.utime(self.path / file["path"])  # from here on it counts as left behind
            self._commit([merged, *(RemoveAction(file["path"], False, now, file["size_bytes"], {}) for file in small)], [])
        self._remove_leavings({file["path"] for file in files})
        return len(small)

    def events(self, after: int = 0, until: int = 2**63 - 1) -> pa.Table:
        """Return the events of whole transactions with ``after <= lsn < until`` in stream order, without Spark.

        Args:
            after: The first commit LSN.
            until: The commit LSN in front of which it ends.

        Returns:
            A table of the spool's schema.
        """
        return self._scan(after, until, SCHEMA.names).sort_by([("lsn", "ascending"), ("ordinal", "ascending")])

    def outline(self, after: int, until: int) -> pa.Table:
        """Return relation, lsn, ordinal, op, key, missing and note of the events with ``after <= lsn < until``.

        Args:
            after: The first commit LSN.
            until: The commit LSN in front of which it ends.

        Returns:
            A table of these columns, in no order.
        """
        return self._scan(after, until, ["relation", "lsn", "ordinal", "op", "key", "missing", "note"])

    def reach(self, after: int, until: int, events: int, size: int) -> int:
        """Return a position up to which about so many events, or bytes of files, lie (driver).

        It splits no transaction.

        Args:
            after: The first commit LSN.
            until: The commit LSN in front of which it ends.
            events: About how many events at most.
            size: About how many bytes of the spool's files at most.

        Returns:
            A commit LSN above `after`, at most `until`.
        """
        table = self._latest()
        until = min(until, self._marked(table, APPLICATION))
        for file in self._met(table, after, until):
            events, size = events - file["num_records"], size - file["size_bytes"]
            if events <= 0 or size <= 0:
                return min(until, max(int(file["max.lsn"]), after) + 1)
        return until

    def parts(
        self, after: int, until: int, relation: str, events: int, size: int, *, noted: bool | None = None
    ) -> Iterator[pa.Table]:
        """Yield a relation's events, about so many, or bytes in memory, at a time and in no order.

        Args:
            after: The first commit LSN.
            until: The commit LSN in front of which it ends.
            relation: The table's qualified name in its own store.
            events: How many events a part has at least, but for the last.
            size: Bytes in memory after which a part ends.
            noted: Only files that hold a note, or only those with something without one; all unless
                given.

        Yields:
            Tables of the spool's schema, with ``after <= lsn < until``.
        """
        table = self._latest()
        until = min(until, self._marked(table, APPLICATION))
        held: list[pa.Table] = []
        with working(self.path):
            for file in _holding(self._met(table, after, until), noted):
                with pq.ParquetFile(self.path / file["path"]) as data:
                    for batch in data.iter_batches(min(events, ROWS_AT_ONCE), columns=SCHEMA.names, use_threads=True):
                        read = pa.Table.from_batches([batch])
                        ours = pc.and_(pc.greater_equal(read["lsn"], after), pc.less(read["lsn"], until))
                        held.append(kept(read, pc.and_(ours, pc.equal(read["relation"], relation))))
                        if sum(map(len, held)) >= events or sum(part.nbytes for part in held) >= size:
                            yield pa.concat_tables(held)
                            held = []
        if any(map(len, held)):
            yield pa.concat_tables(held)

    def notes(self) -> list[tuple[str, int, str]]:
        """Return how tables changed, each note of a table once.

        Returns:
            (relation, commit LSN of the first time, note).
        """
        events = self._scan(0, 2**63 - 1, ["relation", "lsn", "op", "note"], noted=True)
        reports = events.filter(pc.is_in(events["op"], pa.array([RELATION, ADDED]))).sort_by("lsn")
        first: dict[tuple[str, str], int] = {}
        for event in reports.to_pylist():
            first.setdefault((event["relation"], event["note"]), event["lsn"])
        return [(relation, lsn, note) for (relation, note), lsn in first.items()]

    def unmarked(self, after: int, until: int) -> pa.Table:
        """Return what of a range bears no mark of our own writes, without the rows.

        Args:
            after: The first commit LSN.
            until: The commit LSN in front of which it ends.

        Returns:
            A table of relation, lsn, xid and committed_at.
        """
        events = self._scan(after, until, ["relation", "lsn", "op", "xid", "committed_at", "note"], noted=False)
        return events.filter(_unmarked(events)).drop_columns(["op", "note"])

    def unmarked_rows(self, after: int, until: int, relation: str) -> Iterator[pa.Table]:
        """Yield a relation's events that bear no mark of our own writes, whole, some at a time.

        Args:
            after: The first commit LSN.
            until: The commit LSN in front of which it ends.
            relation: The table's qualified name in its own store.

        Yields:
            Tables of the spool's schema, with ``after <= lsn < until``.
        """
        for part in self.parts(after, until, relation, ROWS_AT_ONCE, ROWS_BYTES, noted=False):
            yield part.filter(_unmarked(part))

    def _scan(self, after: int, until: int, columns: list[str], *, noted: bool | None = None) -> pa.Table:
        """Read the files whose positions meet the range; with `noted`, those that hold a note, or something without one."""
        table = self._latest()
        until = min(until, self._marked(table, APPLICATION))
        paths = [str(self.path / file["path"]) for file in _holding(self._met(table, after, until), noted)]
        if not paths:
            return SCHEMA.empty_table().select(columns)
        chosen = (pc.field("lsn") >= after) & (pc.field("lsn") < until)
        with working(self.path):
            return pq.read_table(paths, columns=columns, filters=chosen, schema=SCHEMA)

    def _marked(self, table: DeltaTable, name: str) -> int:
        """Return what the newest append left under a name, 0 where there was none."""
        with working(self.path):
            return table.transaction_version(name) or 0

    def _met(self, table: DeltaTable, after: int, until: int) -> list[dict[str, Any]]:
        """Return the files whose positions meet the range, in order: the log tells which, so the others cost nothing."""
        with working(self.path):
            actions = pa.table(table.get_add_actions(flatten=True))
        if "min.lsn" not in actions.column_names:  # nothing was ever appended
            return []
        met: list[dict[str, Any]] = actions.filter((pc.field("max.lsn") >= after) & (pc.field("min.lsn") < until)).to_pylist()
        return sorted(met, key=lambda file: (file["max.lsn"], file["min.lsn"]))

    def _table(self) -> DeltaTable:
        if self._handle is None:
            with working(self.path):
                try:
                    table = DeltaTable(self.path)
                except TableNotFoundError as error:
                    raise StepOrder(f"reading the spool {self.path}", "prepare") from error
            version = table.metadata().configuration.get(FORMAT_KEY)
            if version != FORMAT:
                raise SourceChanged(f"spool format ({self.path})", FORMAT, str(version))
            self._handle, self._opened = table, table.version()
        return self._handle

    def _latest(self) -> DeltaTable:
        table = self._table()
        try:
            with working(self.path):
                table.update_incremental()
        except DeltaError as error:
            if self.path.exists():
                raise
            raise FolderFailed(str(self.path), "it is gone, or the migration ended or was begun anew") from error
        if table.version() - self._opened < CHECKPOINT_EVERY:
            return table
        # a handle carries every log entry since it was opened: 100 ms an append after 700 of them, else 14 ms
        self._handle = None
        return self._table()

    def _commit(self, actions: list[AddAction | RemoveAction], marks: list[Transaction]) -> None:
        """Commit right after the version that was looked at, durably; raises LeaseHeld where another commit came between."""
        table = self._table()
        try:
            table.create_write_transaction(
                actions,
                mode="append",
                schema=SCHEMA,
                # no retry: the commit must be the one right after the version in which the position was looked up
                commit_properties=CommitProperties(max_commit_retries=0, app_transactions=marks),
                post_commithook_properties=PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False),
            )
        except CommitFailedError as error:
            raise LeaseHeld("capture", f"it committed to the spool {self.path}") from error
        table.update_incremental()
        self._doubtful = table.version()
        self._sync_log(table)
        self._doubtful = None

    def _write(self, events: pa.Table) -> AddAction:
        """Write an append's file."""
        lsns = pc.min_max(events["lsn"])
        return self._written([events], lsns["min"].as_py(), lsns["max"].as_py(), data_change=True)

    def _merge(self, files: Sequence[Mapping[str, Any]]) -> AddAction:
        """Write the events of several files into one."""
        tables = (pq.read_table(self.path / file["path"], schema=SCHEMA) for file in files)
        first, last = min(file["min.lsn"] for file in files), max(file["max.lsn"] for file in files)
        return self._written(grouped(tables), first, last, data_change=False)

    def _written(self, tables: Iterable[pa.Table], first: int, last: int, *, data_change: bool) -> AddAction:
        """Write one data file and bring it to stable storage before any log entry can name it."""
        path = self.path / f"part-{uuid.uuid4()}.parquet"
        count = without = 0
        try:
            with pq.ParquetWriter(path, SCHEMA, **LAYOUT) as writer:
                for table in tables:
                    writer.write_table(table)
                    count += table.num_rows
                    without += table["note"].null_count
            sync(path)
            sync(self.path)
        except OSError:
            path.unlink(missing_ok=True)  # or what did not fit would keep what comes next from fitting
            raise
        nulls = {"lsn": 0, "note": without}
        stats = {"numRecords": count, "minValues": {"lsn": first}, "maxValues": {"lsn": last}, "nullCount": nulls}
        return AddAction(path.name, path.stat().st_size, {}, int(time.time() * 1000), data_change, json.dumps(stats))

    def _remove_leavings(self, listed: Collection[str]) -> None:
        """Delete files that were merged a while ago, or written by a capture that was killed before its commit."""
        for path in self.path.glob("*.parquet"):
            if path.name not in listed and path.stat().st_mtime < time.time() - RETAIN_SECONDS:
                path.unlink()

    def _sync_log(self, table: DeltaTable) -> None:
        log = self.path / "_delta_log"
        sync(log / f"{table.version():020d}.json")
        if table.version() % CHECKPOINT_EVERY == 0:
            table.create_checkpoint()
            for path in log.glob(f"{table.version():020d}.checkpoint*"):
                sync(path)
            sync(log / "_last_checkpoint")
            table.cleanup_metadata()
        sync(log)


def _unmarked(events: pa.Table) -> pa.ChunkedArray:
    changes = pc.is_in(events["op"], pa.array([INSERT, UPDATE, DELETE, TRUNCATE]))
    return pc.and_(changes, pc.is_null(events["note"]))


def _holding(files: list[dict[str, Any]], noted: bool | None) -> list[dict[str, Any]]:
    """Return the files that hold a note, or something without one; None asks for all."""
    if noted is None:
        return files
    return [file for file in files if (file["null_count.note"] < file["num_records"] if noted else file["null_count.note"] > 0)]


def spool_of(spec: Spec, epoch: int = 0) -> Spool:
    """Return the migration's spool of the epoch in which its tables were begun (`Stream.epoch`).

    Args:
        spec: The migration's spec.
        epoch: The epoch in which the tables were begun, `Stream.epoch`.

    Returns:
        The spool, which is not opened yet (driver, capture).
    """
    return Spool(spool_path(spec.work, epoch))
