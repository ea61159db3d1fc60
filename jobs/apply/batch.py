"""A batch: spooled events made ready for the transform, the last one of each key and with whole rows.

Of a key's events in a batch the last one says all, since the key of the target follows from the
source's. An update that gave its row another key is two changes, the old key's delete and a put of
the new one. A large value that an update left unchanged, and PostgreSQL therefore out of the
stream, is neither NULL nor the target's, it is the source row's. It is read by key in one snapshot
in which every transaction of the batch is visible. A commit stands in the log before other sessions
see it, so a row might else be older than its event. The row may be newer; whatever made it so is
later in the stream and is offered then. A row that is gone by now is deleted later in the stream,
so its put is left out. Only the columns that were not sent are taken, in the text in which the
stream would have sent them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from changeover.errors import CouldNotFinish, RowRefused
from changeover.jobs.spool.events import DELETE, UPDATE
from changeover.jobs.transform.transform import AT_LSN, AT_ORDINAL, GONE, Transform
from changeover.names import nth, placed
from changeover.position import format_lsn
from changeover.session import application_name
from changeover.spec import Spec
from changeover.stores.base.interface import DELETED, EPOCH, LSN, ORDINAL, VERSION_COLUMNS
from changeover.stores.base.pgtypes import unmovable
from changeover.stores.base.reader import ExportedSnapshot, ReadTable, read_texts
from changeover.stores.postgres.store import exporting

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

VISIBLE_SECONDS = 30.0
"""How long a commit may stay invisible, as it does while it waits for a synchronous standby."""

XIDS = 2**32


MISSING, XID = "_changeover_missing", "_changeover_xid"
"""What a change has besides, until its row is whole: the columns that were not sent, and the transaction."""


def last_of_each_key(events: pa.Table, identity: Sequence[str], columns: Sequence[str], *, commits: bool = False) -> pa.Table:
    """Return the last change of each source key, with its source columns as texts (pure).

    A delete has the columns of its key alone.

    Args:
        events: Inserts, updates and deletes of one table, in the spool's schema.
        identity: The columns of the replica identity.
        columns: The source columns to return, as texts.
        commits: Whether it is the last change of each commit instead.

    Returns:
        A table: the stamps (version, transaction, columns not sent), then `columns`; a row a
        change.
    """
    rows, keys = _Maps(events["row"]), _Maps(events["key"])
    op, lsn, ordinal = (events[name].to_numpy() for name in ("op", "lsn", "ordinal"))
    deletes = np.flatnonzero(op == DELETE)
    puts = np.flatnonzero(op != DELETE)
    moved = puts[(op[puts] == UPDATE) & keys.there[puts]]
    # an update that gave its row another key: at its place the old one's delete, and right after it a put
    gone, event = np.concatenate((deletes, moved)), np.concatenate((deletes, moved, puts))
    after = np.concatenate((ordinal[gone], ordinal[puts] + np.isin(puts, moved)))
    names = {name: pa.concat_arrays([keys.texts(name, gone), rows.texts(name, puts)]) for name in identity}
    last = _last(names, lsn[event], after, commits=commits)
    dead, live = last[last < len(gone)], last[last >= len(gone)]
    chosen = np.concatenate((dead, live))
    of_live = event[live]
    texts = {
        name: pa.concat_arrays(
            [keys.texts(name, event[dead]) if name in identity else pa.nulls(len(dead), pa.string()), rows.texts(name, of_live)]
        )
        for name in columns
    }
    missing = events["missing"].combine_chunks()
    unsent = pa.concat_arrays([_empty_lists(len(dead)), missing.take(pa.array(of_live))])
    gone_now = np.arange(len(chosen)) < len(dead)
    xid = events["xid"].to_numpy()
    stamps = {GONE: gone_now, AT_LSN: lsn[event[chosen]], AT_ORDINAL: after[chosen], MISSING: unsent, XID: xid[event[chosen]]}
    return pa.table({**stamps, **texts})


def without(
    changes: pa.Table, identity: Sequence[str], passed: Mapping[tuple[str | None, ...], tuple[int, int]]
) -> pa.Table:  # fmt: skip
    """Return the changes without those of some keys that lie before a place of each key (pure)."""
    if not passed:
        return changes
    names = (*identity, AT_LSN, AT_ORDINAL)
    rows = zip(*(changes[name].to_pylist() for name in names), strict=True)
    return changes.filter(pa.array([row[-2:] >= passed.get(row[:-2], (0, -1)) for row in rows], pa.bool_()))


def passed_on(changes: pa.Table, transform: Transform, epoch: int) -> pa.Table | None:
    """Return the changes as they stand in the target, texts alone, or None where Spark is needed for a value (pure).

    Raises RowRefused for what a transform would refuse, since no step takes more than another one.
    """
    origins = transform.passed_on()
    if origins is None or pc.any(pc.greater(pc.list_value_length(changes[MISSING]), 0)).as_py():
        return None
    types = {c.name: c.type for c in transform.target.columns}
    columns = {name: changes[origin].combine_chunks() for name, origin in origins.items()}
    for name, texts in columns.items():
        if refused := unmovable(texts, types[name]):
            raise RowRefused(transform.table.source, f"column {origins[name]}", f"it can't be carried over: {refused}")
        if types[name].endswith("[]"):
            columns[name] = _each_once(texts, _literal)
    lsn = _each_once(changes[AT_LSN], format_lsn)
    version = {EPOCH: np.full(len(changes), epoch), LSN: lsn, ORDINAL: changes[AT_ORDINAL], DELETED: changes[GONE]}
    return pa.table({**version, **columns}).select([*VERSION_COLUMNS, *transform.target.names])


def _each_once(values: pa.Array, made: Callable[[Any], str]) -> pa.Array:
    """Return what is made of each value, distinct ones once; NULL stays NULL."""
    encoded = values.combine_chunks().dictionary_encode() if isinstance(values, pa.ChunkedArray) else values.dictionary_encode()
    return pa.array([made(value) for value in encoded.dictionary.to_pylist()], pa.string()).take(encoded.indices)


def _literal(elements: str) -> str:
    """Return PostgreSQL's literal of an array of texts that is written as JSON."""
    parts = ["NULL" if one is None else '"' + one.replace("\\", "\\\\").replace('"', '\\"') + '"' for one in json.loads(elements)]
    return "{" + ",".join(parts) + "}"


def _last(
    keys: dict[str, pa.Array], lsn: npt.NDArray[np.int64], ordinal: npt.NDArray[np.int64], *, commits: bool
) -> npt.NDArray[np.int64]:
    """Return the places of the last change of each key, or of each key in each commit."""
    order = np.lexsort((ordinal, lsn))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    groups: dict[str, Any] = {**{f"key {name}": key for name, key in keys.items()}, **({"lsn": lsn} if commits else {})}
    latest = pa.table({**groups, "rank": rank}).group_by(list(groups), use_threads=False)
    return np.sort(order[latest.aggregate([("rank", "max")])["rank_max"].to_numpy()])


class _Maps:
    """A column of maps from column name to text, asked for one name and some rows at a time."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        maps = column.combine_chunks()
        if isinstance(maps, pa.ChunkedArray):  # an older pyarrow keeps the one chunk
            maps = maps.chunk(0) if maps.num_chunks else pa.array([], column.type)
        self.there: npt.NDArray[np.bool_] = maps.is_valid().to_numpy(zero_copy_only=False)
        offsets = maps.offsets.to_numpy()
        self.values = maps.items
        self.names = maps.keys.slice(offsets[0], offsets[-1] - offsets[0]).dictionary_encode()
        self.first = int(offsets[0])
        self.row = np.repeat(np.arange(len(maps)), np.diff(offsets))
        self.count = len(maps)

    def texts(self, name: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        """Return the value of that name in each of the rows, NULL where there is none."""
        at = np.full(self.count, -1, np.int64)
        if (code := self.names.dictionary.index(name).as_py()) >= 0:
            entries = np.flatnonzero(self.names.indices.to_numpy() == code)
            at[self.row[entries]] = entries + self.first
        chosen = at[rows]
        return self.values.take(pa.array(chosen, mask=chosen < 0))


def _empty_lists(count: int) -> pa.Array:
    return pa.array([[]], pa.list_(pa.string())).take(pa.array(np.zeros(count, np.int64)))


@contextmanager
def completed(
    spec: Spec, spark: SparkSession, transform: Transform, changes: pa.Table, snapshot: ExportedSnapshot | None, dsn: str
) -> Iterator[DataFrame]:
    """Yield the changes with whole rows, as Spark has them (driver; values are read in tasks).

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        transform: The table's transform.
        changes: What `last_of_each_key` returns.
        snapshot: Where values that were not sent are read; it must show all of the updates. A new
            one unless given.
        dsn: The store whose stream the changes are of.

    Yields:
        A lazy frame, valid while the block lasts.

    Raises:
        CouldNotFinish: A transaction of the stream stays invisible, as behind a standby that does
            not answer.
    """
    from pyspark.sql import functions as F

    frame = spark.createDataFrame(changes.drop_columns([XID]))
    partial = changes.filter(pc.greater(pc.list_value_length(changes[MISSING]), 0))
    if not len(partial):
        yield frame
        return
    application = application_name(spec.name, "replay")
    identity = [c.name for c in transform.identity]
    names = set(pc.unique(pc.list_flatten(partial[MISSING])).to_pylist())
    keys = sorted(zip(*(partial[name].to_pylist() for name in identity), strict=True))
    columns = tuple(c for c in transform.source if c.name in names)
    read = ReadTable(*transform.table.source_name, columns, transform.identity, transform.partitioned)
    with ExitStack() as held:
        shown = snapshot or held.enter_context(_seeing(dsn, application, pc.unique(partial[XID]).to_pylist()))
        present = read_texts(spark, dsn, application, read, keys, shown)
        sent = placed(frame, [c.name for c in transform.source])
        own = dict(zip(frame.columns, sent.columns, strict=True))
        there = present.toDF(*(f"{name}_now" for name in present.columns))
        now = {c.name: there[f"{nth(len(identity) + number)}_now"] for number, c in enumerate(columns)}
        same = [sent[own[name]] == there[f"{nth(number)}_now"] for number, name in enumerate(identity)]
        whole = F.size(MISSING) == 0
        joined = sent.join(there, [~whole, *same], "left").where(whole | there[f"{nth(0)}_now"].isNotNull())
        yield joined.select(
            *(
                F.when(F.array_contains(MISSING, name), now[name]).otherwise(sent[own[name]]).alias(name)
                if name in now else sent[own[name]].alias(name)
                for name in frame.columns
            )
        )  # fmt: skip


@contextmanager
def _seeing(dsn: str, application: str, xids: Collection[int]) -> Iterator[ExportedSnapshot]:
    """Hold an exported snapshot in which all of the transactions are visible."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with exporting(dsn, application) as (_, snapshot):
            hidden = [xid for xid in xids if not visible(xid, snapshot.visible)]
            if not hidden:
                yield snapshot
                return
        if time.monotonic() > deadline:
            raise CouldNotFinish(
                f"replay: transaction {hidden[0]} is in the stream, but after {VISIBLE_SECONDS:g} s it is not visible yet:"
                " does its commit wait for a synchronous standby?"
            )
        time.sleep(0.05)


def visible(xid: int, snapshot: str) -> bool:
    """Return whether a snapshot, as `pg_current_snapshot()` prints it, shows a committed transaction, whose xid has 32 bits (pure).

    Such an id belongs to the 2^31 transactions before or after the snapshot's (PostgreSQL, Routine Vacuuming, Preventing
    Transaction ID Wraparound Failures).
    """
    _, following, running = snapshot.split(":")
    first_unseen = int(following)
    whole = first_unseen - first_unseen % XIDS + xid
    if whole >= first_unseen + XIDS // 2:
        whole -= XIDS
    elif whole < first_unseen - XIDS // 2:
        whole += XIDS
    return whole < first_unseen and str(whole) not in running.split(",")
