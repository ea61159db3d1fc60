"""The applier: one stream's next batches collapsed, made ready and offered to one target, and how far they reached written down.

A batch is bounded in events and bytes, splits no transaction, and is one change a key. Its position
is written down after it is committed, so a killed replay offers some changes again, which the gate
refuses. A row that can't be carried over ends the batch, unless a later change of its key is there
already, such as its correction. Then the batch reaches that far, and the row is never offered. The
applier knows no direction: the checkpoint says which stream this is. Runs on the driver, what Spark
is needed for in tasks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from changeover import failpoints
from changeover.errors import RowRefused, TableStopped, TextRefused
from changeover.jobs.apply.batch import completed, last_of_each_key, passed_on, without
from changeover.jobs.apply.checkpoint import Checkpoint
from changeover.jobs.apply.floors import caught_up_floor
from changeover.jobs.ledger.epochs import Interval, Section
from changeover.jobs.ledger.records import Load
from changeover.jobs.load import badrow
from changeover.jobs.spool.events import ADDED, DELETE, INSERT, NO_TEXT, RELATION, TRUNCATE, UPDATE, Position, kept
from changeover.jobs.transform.transform import AT_LSN, AT_ORDINAL, Transform
from changeover.position import Version, format_lsn
from changeover.spark.failures import from_spark
from changeover.spec import Spec
from changeover.stores.base.interface import DELETED, Counts, Store
from changeover.stores.base.reader import ExportedSnapshot
from changeover.tenants import EVERY, Tenants

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

BATCH_EVENTS, BATCH_BYTES = 250_000, 64 << 20
"""About how many events, and bytes of the spool's files, one batch takes, so that memory does not
grow with what is behind."""

PART_BYTES = 256 << 20
"""Bytes of rows in memory after which a part ends, whatever it holds: Arrow's texts end at 2 GiB."""

SMALL_BATCH = 20_000
"""Changes up to which one task offers a batch."""


@dataclass(frozen=True)
class Batch:
    """One load's next events: their number, where they end, why the table stops there, and the last TRUNCATE among them."""

    until: int
    events: int
    stop: str | None
    truncated: tuple[int, int] | None = None


Key = tuple[str | None, ...]


class BadChange(Exception):
    """A change that can't be carried over: how it is refused, its source key, and its place in the stream."""

    def __init__(self, refused: RowRefused, key: Key, position: Position) -> None:
        super().__init__(str(refused))
        self.refused, self.key, self.position = refused, key, position


class Applier:
    """Carries batches of one store's stream into a target (driver)."""

    def __init__(
        self, spec: Spec, spark: SparkSession, checkpoint: Checkpoint,
        snapshot: ExportedSnapshot | None, stop: threading.Event,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.spark = spark
        self.checkpoint = checkpoint
        self.spool = checkpoint.spool
        self.snapshot = snapshot
        self.stop = stop

    def catch_up(self, load: Load, section: Section, end: int, transform: Transform, store: Store) -> tuple[Load, Counts]:
        """Offer what is left of one section, batch by batch (driver; values are read in tasks).

        What lies between two sections is never offered. No batch begins once `stop` is set.

        Args:
            load: The load, with its position.
            section: Intervals of one store and the same positions, each of other tenants.
            end: The LSN below which events are offered, in that store's own log.
            transform: What a row goes through on its way into the target.
            store: The target, open.

        Returns:
            The load at its new position, and how many events were offered and taken.

        Raises:
            TableStopped: The table was stopped, by an event that this version does not carry or
                before.
            RowRefused: A row can't be carried over, and no later change of its key is there.
        """
        end = min(end, section[0].until)
        events = taken = 0
        while load.applied < end and not self.stop.is_set():
            load, counts = self._carry(load, section, end, transform, store)
            events, taken = events + counts.offered, taken + counts.taken
        return load, Counts(events, taken)

    def _carry(self, load: Load, section: Section, end: int, transform: Transform, store: Store) -> tuple[Load, Counts]:
        """Offer the next batch, and write down how far it reached."""
        start = max(load.applied, section[0].since)
        stopped = self.checkpoint.stopped(load)
        # stopped by an event: each target is still brought up to it
        if stopped and first_stop(self._outline(start, self.spool.end(), transform, section), identity_of(transform)) is None:
            raise TableStopped(load.source, stopped)
        self._require_begun(load, start)
        batch, taken = self._offer_next(load, start, end, section, transform, store)
        failpoints.reach("batch-offered", f"{load.source} {load.target} {batch.events}")
        self.checkpoint.advance(load, batch.until, batch.events)
        if batch.stop:
            self.checkpoint.stop(load, batch.stop)
            raise TableStopped(load.source, batch.stop)
        return replace(load, applied=batch.until), Counts(batch.events, taken)

    def _require_begun(self, load: Load, start: int) -> None:
        """Stop a table that needs what its stream had before the spool begins: nobody can tell what that was."""
        if start < (begin := self.spool.begin()):
            reason = f"its events from {format_lsn(start)} on are asked for, and the spool begins at {format_lsn(begin)}"
            self.checkpoint.stop(load, reason)
            raise TableStopped(load.source, reason)

    def _offer_next(
        self, load: Load, start: int, end: int, section: Section, transform: Transform, store: Store
    ) -> tuple[Batch, int]:
        """Offer the next batch; with a row that can't be carried over it reaches to the last change of its key, before `end`."""
        batch = self._next_batch(start, end, transform, section)
        passed: dict[Key, Position] = {}
        while True:
            try:
                return batch, self._offer(load, start, batch, section, transform, store, passed) if batch.events else 0
            except BadChange as bad:
                last = self._last_position(bad, end, transform, section)
                if last <= bad.position:
                    raise bad.refused from bad
                if last[0] >= batch.until:
                    batch = self._batch(start, last[0] + 1, transform, section)
                if batch.until <= last[0]:  # the table stops in between
                    raise bad.refused from bad
                passed[bad.key] = last

    def _last_position(self, bad: BadChange, end: int, transform: Transform, section: Section) -> Position:
        """Return the place of the last change of a bad row's key, or of a TRUNCATE; it has all to say of that key."""
        identity = identity_of(transform)
        last = last_truncate(self._outline(bad.position[0], end, transform, section)) or bad.position
        relation = transform.table.source_relation
        for events in self.spool.parts(bad.position[0], end, relation, 2 * BATCH_EVENTS, PART_BYTES):
            changed = offered(kept(events, pc.is_in(events["op"], pa.array(CHANGES))), echo=any(one.echo for one in section))
            changes = last_of_each_key(changed, identity, identity)
            positions = zip(changes[AT_LSN].to_pylist(), changes[AT_ORDINAL].to_pylist(), strict=True)
            keyed = zip(_keys(changes, identity), positions, strict=True)
            last = max([last, *(position for key, position in keyed if key == bad.key)])
        return last

    def _truncate(self, load: Load, at: tuple[int, int], section: Section, transform: Transform, store: Store) -> None:
        """Offer a TRUNCATE, which is of all rows; both stores refuse one once tenants have moved apart."""
        if section[0].tenants != EVERY:
            reason = f"a TRUNCATE (at {format_lsn(at[0])}), though tenants have moved apart: nobody has authority over all rows"
            self.checkpoint.stop(load, reason)
            raise TableStopped(load.source, reason)
        self.checkpoint.require_truncatable(load)
        store.truncate(transform.target, Version(section[0].epoch, *at))

    def _outline(self, start: int, end: int, transform: Transform, section: Section) -> pa.Table:
        """Return what of the table's events is offered, without their rows."""
        outline = self.spool.outline(start, end)
        ours = outline.filter(pc.equal(outline["relation"], transform.table.source_relation))
        return offered(ours, echo=any(interval.echo for interval in section))

    def _next_batch(self, start: int, end: int, transform: Transform, section: Section) -> Batch:
        return self._batch(start, self.spool.reach(start, end, BATCH_EVENTS, BATCH_BYTES), transform, section)

    def _batch(self, start: int, end: int, transform: Transform, section: Section) -> Batch:
        ours = self._outline(start, end, transform, section)
        stop = first_stop(ours, identity_of(transform))
        if stop is not None:
            end, ours = stop[0], ours.filter(pc.less(ours["lsn"], stop[0]))
        reason = f"{stop[1]} (at {format_lsn(end)})" if stop else None
        return Batch(end, ours.num_rows, reason, last_truncate(ours))

    def _offer(
        self, load: Load, start: int, batch: Batch, section: Section, transform: Transform, store: Store,
        passed: Mapping[Key, Position],
    ) -> int:  # fmt: skip
        """Offer the batch's changes; return how many were taken. A batch is one part, unless one transaction outgrew it.

        Of the keys in `passed` nothing is offered before their places; raises BadChange. A large one, of a closed table, may
        let its position be the gate; with small ones an application's own writes would wait more often than they do.
        """
        if batch.truncated:
            with from_spark(load.source, f"a TRUNCATE at {format_lsn(batch.truncated[0])}"):
                self._truncate(load, batch.truncated, section, transform, store)
        relation = transform.table.source_relation
        taken = 0
        parts = self.spool.parts(start, batch.until, relation, 2 * BATCH_EVENTS, PART_BYTES)
        first = list(islice(parts, 2))
        # the floor of a part would refuse the next one
        alone = len(first) == 1 and batch.events > SMALL_BATCH and self.checkpoint.closed(load)
        reached = caught_up_floor(section[0].epoch, batch.until) if alone else None
        for events in chain(first, parts):
            changed = kept(events, pc.is_in(events["op"], pa.array(CHANGES)))
            for interval in section:
                ours = offered(changed, echo=interval.echo)
                if batch.truncated:  # what came before it has nothing to say any more
                    ours = ours.filter(_after(ours, *batch.truncated))
                taken += self._offer_part(load, ours, interval, reached, transform, store, passed)
        return taken

    def _offer_part(
        self, load: Load, events: pa.Table, interval: Interval, reached: Version | None, transform: Transform, store: Store,
        passed: Mapping[Key, Position],
    ) -> int:  # fmt: skip
        """Offer the last change of each key that is an interval's."""
        last = last_of_each_key(events, identity_of(transform), [c.name for c in transform.source])
        last = without(last, identity_of(transform), passed)
        if interval.tenants != EVERY:
            last = of_tenants(last, self.checkpoint.tenant(load), interval.tenants)
        if not len(last):
            return 0
        try:
            with from_spark(load.source, f"changes up to {format_lsn(max(last[AT_LSN].to_pylist(), default=0))}"):
                return self._put(last, interval.epoch, reached, transform, store)
        except (RowRefused, TextRefused) as refused:
            if not badrow.one_alone(refused):
                raise
            bad = badrow.sought(load.source, lambda: self._refused(last, interval.epoch, transform, store))
            if bad is None:
                raise
            one, why = bad
            (key,) = _keys(one, identity_of(transform))
            raise BadChange(why, key, (one[AT_LSN][0].as_py(), one[AT_ORDINAL][0].as_py())) from refused

    def _put(self, last: pa.Table, epoch: int, reached: Version | None, transform: Transform, store: Store) -> int:
        """Put changes into the target, one a key; return how many were taken."""
        if store.pass_on is not None and (texts := passed_on(last, transform, epoch)) is not None:
            return store.pass_on(transform.target, texts, reached).taken
        with self._made(last, epoch, transform, store) as changes:
            # one task: the fence waits for such batches
            return store.merge(transform.target, changes.coalesce(1) if len(last) <= SMALL_BATCH else changes, reached).taken

    @contextmanager
    def _made(self, last: pa.Table, epoch: int, transform: Transform, store: Store, *, lazy: bool = False) -> Iterator[DataFrame]:
        """Yield the target's changes for those of the source; a `lazy` frame evaluates no column that is not asked for."""
        with completed(self.spec, self.spark, transform, last, self.snapshot, self.checkpoint.dsn) as whole:
            rows = whole.coalesce(1) if lazy else whole  # Spark's optimiser evaluates local rows at once, all columns of them
            yield transform.changes(rows, epoch, transform.moved_in_stream() if store.takes_text else frozenset())

    def _refused(self, last: pa.Table, epoch: int, transform: Transform, store: Store) -> tuple[pa.Table, RowRefused] | None:
        """Return the first change that is refused, and how; None where changes are refused together alone."""
        source = transform.table.source

        def attempt(some: pa.Table) -> None:
            if store.pass_on is not None and (texts := passed_on(some, transform, epoch)) is not None:
                store.pass_on(transform.target, texts, write=False)
            else:
                with self._made(some, epoch, transform, store) as changes:
                    store.try_changes(transform.target, changes)

        bad = badrow.narrowed(last, _halves, lambda some: badrow.met(lambda: attempt(some), source))
        if bad is None or len(bad[0]) != 1:
            return None
        one, why = bad
        (key,) = _keys(one, identity_of(transform))
        with self._made(one, epoch, transform, store, lazy=True) as changes:
            column = badrow.column_of(transform, why, lambda: changes, (DELETED,))
        return one, badrow.sentence(transform, key, why, column)


CHANGES = [INSERT, UPDATE, DELETE]


def _halves(changes: pa.Table) -> list[pa.Table]:
    middle = len(changes) // 2
    return [changes.slice(0, middle), changes.slice(middle)] if middle else []


def _keys(changes: pa.Table, identity: Sequence[str]) -> list[Key]:
    return list(zip(*(changes[name].to_pylist() for name in identity), strict=True))


def identity_of(transform: Transform) -> list[str]:
    """Return the columns by which the stream tells a source row from others (pure).

    Args:
        transform: The table's transform.

    Returns:
        The names of its replica identity, in order.
    """
    return [c.name for c in transform.identity]


def offered(events: pa.Table, *, echo: bool) -> pa.Table:
    """Return what of a table's events is offered: of an echo all, else what bears no mark of our own writes (pure)."""
    if echo:
        return events
    return kept(events, pc.or_(pc.is_null(events["note"]), pc.is_in(events["op"], pa.array([RELATION, ADDED]))))


def of_tenants(changes: pa.Table, column: str, tenants: Tenants) -> pa.Table:
    """Return the changes of some tenants' rows, one a key; `column` is the key column that holds them (pure)."""
    inside = pc.is_in(changes[column], pa.array(sorted(tenants.names), pa.string()))
    return changes.filter(pc.invert(inside) if tenants.others else inside)


def first_stop(outline: pa.Table, identity: Sequence[str]) -> tuple[int, str] | None:
    """Return (commit LSN, reason) of the first event that this version does not carry, or None (pure)."""
    unsent = pc.greater(pc.list_value_length(outline["missing"]), 0)
    suspects = outline.filter(pc.or_(unsent, pc.equal(outline["op"], RELATION)))
    for event in suspects.sort_by([("lsn", "ascending"), ("ordinal", "ascending")]).to_pylist():
        if event["op"] == RELATION:
            note = event["note"]
            return event["lsn"], note if NO_TEXT in note else f"its definition changed: {note}"
        if met := set(event["missing"]) & set(identity):
            return event["lsn"], (
                f"an update left the large key column {min(met)} unchanged and so out of the stream:"
                " ALTER TABLE … REPLICA IDENTITY FULL before prepare makes it whole"
            )
    return None


def _after(events: pa.Table, lsn: int, ordinal: int) -> pa.ChunkedArray:
    later = pc.and_(pc.equal(events["lsn"], lsn), pc.greater(events["ordinal"], ordinal))
    return pc.or_(pc.greater(events["lsn"], lsn), later)


def last_truncate(outline: pa.Table) -> tuple[int, int] | None:
    """Return commit LSN and ordinal of the last TRUNCATE, which is all that counts of those before it (pure)."""
    truncates = outline.filter(pc.equal(outline["op"], TRUNCATE))
    return max(zip(truncates["lsn"].to_pylist(), truncates["ordinal"].to_pylist(), strict=True), default=None)
