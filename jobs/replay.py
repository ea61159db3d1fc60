"""Replay: the spooled changes offered to each target through its gate, in batches, until caught up or for as long as asked.

A batch is every event between the position that a load has reached and the end of the spool (or a given position), collapsed
to one change a key. The position moves after the batch is committed, so a killed replay offers some changes again, which the
gate refuses. Batches and verifications of one target take turns by a lease. An event that this version
does not carry stops its table by name, after everything before it was applied.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from changeover.errors import TableStopped
from changeover.jobs.changes import completed, keys_apart
from changeover.jobs.chunks import mergeable
from changeover.jobs.collection import Collecting
from changeover.jobs.entries import CLOSED, Authority, Load
from changeover.jobs.ledger import Ledger
from changeover.jobs.prepare import Prepared, require_prepared, spool_of
from changeover.jobs.spool import DELETE, INSERT, RELATION, TRUNCATE, UPDATE
from changeover.jobs.transform import Transform
from changeover.position import Version, format_lsn
from changeover.sparkerrors import from_spark
from changeover.spec import Spec
from changeover.stores import Counts, Store, open_store
from changeover.stores.reader import ExportedSnapshot

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

STEP = "replay"
LEASE_SECONDS = 120.0
"""How long a batch may wait for its turn: longer than any other batch or alignment takes."""

SMALL_BATCH = 20_000
"""Events up to which a batch is handed to Spark as Arrow data, which spares it the look into the spool's log."""

IDLE_SECONDS = 0.1

FOR_EVER = 2**63 - 1


@dataclass(frozen=True)
class Replayed:
    """What one round did: events of the tables offered over all loads, changes taken, and the position reached."""

    events: int
    taken: int
    applied: int


@dataclass(frozen=True)
class Batch:
    """One load's next events: their number, where they end, why the table stops there, and the last TRUNCATE among them."""

    until: int
    events: int
    stop: str | None
    truncated: tuple[int, int] | None = None
    partial: bool = False


@dataclass(frozen=True)
class Interval:
    """A part of the old store's stream: the epoch of its events, and the commit LSNs since <= lsn < until."""

    epoch: int
    since: int
    until: int


class Replay:
    """Replays one migration (driver); `round` is one turn over all its loads, in the thread that calls it.

    Values that an update did not send are read in `snapshot` where one is given: then they are those of its moment.
    """

    def __init__(
        self, spec: Spec, spark: SparkSession, ledger: Ledger, prepared: Prepared, snapshot: ExportedSnapshot | None = None
    ) -> None:
        self.spec = spec
        self.spark = spark
        self.ledger = ledger
        self.prepared = prepared
        self.snapshot = snapshot
        self.spool = spool_of(spec)

    def round(self, until: int | None = None, targets: Sequence[str] | None = None) -> Replayed:
        """Offer everything spooled below `until` to each target, in one turn of that target's lease."""
        done = []
        stops = []
        for target in targets or list(self.spec.targets):
            with self.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS):
                try:
                    done.append(self.offer(until, [target]))
                except TableStopped as stop:
                    stops.append(stop)
        if stops:
            raise stops[0]
        return total(done)

    def offer(self, until: int | None = None, targets: Sequence[str] | None = None) -> Replayed:
        """Do a round's work; the caller holds the leases of the targets. A table that stops is named when the others are done."""
        end = min([self.spool.end()] + ([until] if until is not None else []))
        authorities = self.ledger.authorities()
        events = taken = 0
        positions = []
        stops = []
        for (source, target), transform in self.prepared.transforms.items():
            if targets is not None and target not in targets:
                continue
            load = self.ledger.load(source, target)
            with open_store(self.spec, self.spec.targets[target], "replay") as store:
                if not mergeable(store.merges_while_loading, load.state == CLOSED):
                    continue
                store.install(transform.target, self.prepared.stream.image)
                try:
                    for interval in offered_intervals(authorities, takes_over=self._takes_over(target)):
                        load, offered = self._catch_up(load, interval, end, transform, store)
                        events, taken = events + offered.offered, taken + offered.taken
                except TableStopped as stop:
                    stops.append(stop)
            positions.append(load.applied)
        if stops:
            raise stops[0]
        return Replayed(events, taken, min(positions, default=0))

    def _takes_over(self, target: str) -> bool:
        return self.spec.flag is not None and self.spec.flag.target == target

    def _catch_up(self, load: Load, interval: Interval, end: int, transform: Transform, store: Store) -> tuple[Load, Counts]:
        """Offer what is left of one interval; what lies between two of them is never offered."""
        end = min(end, interval.until)
        if load.applied >= end:
            return load, Counts(0, 0)
        start = max(load.applied, interval.since)
        _, _, stopped = self.ledger.source_table(load.source)
        # stopped by an event: each target is still brought up to it
        if stopped and self._next_batch(start, self.spool.end(), transform).stop is None:
            raise TableStopped(load.source, stopped)
        batch = self._next_batch(start, end, transform)
        counts = Counts(0, 0)
        if batch.events:
            with from_spark(load.source, f"changes from {format_lsn(start)} to {format_lsn(batch.until)}"):
                if batch.truncated:
                    store.truncate(self.spark, transform.target, Version(interval.epoch, *batch.truncated))
                with self._changes(start, batch, interval.epoch, transform) as changes:
                    counts = store.merge(transform.target, changes)
        self.ledger.advance(load.source, load.target, batch.until, batch.events)
        if batch.stop:
            self.ledger.stop_table(load.source, batch.stop)
            raise TableStopped(load.source, batch.stop)
        return replace(load, applied=batch.until), Counts(batch.events, counts.taken)

    def _next_batch(self, start: int, end: int, transform: Transform) -> Batch:
        schema, name = transform.table.source_name
        outline = self.spool.outline(start, end)
        ours = outline.filter(pc.equal(outline["relation"], f"{schema}.{name}"))
        stop = first_stop(ours, [c.name for c in transform.identity])
        if stop is not None:
            end, ours = stop[0], ours.filter(pc.less(ours["lsn"], stop[0]))
        reason = f"{stop[1]} (at {format_lsn(end)})" if stop else None
        partial = pc.any(pc.greater(pc.list_value_length(ours["missing"]), 0)).as_py()
        return Batch(end, ours.num_rows, reason, last_truncate(ours), bool(partial))

    @contextmanager
    def _changes(self, start: int, batch: Batch, epoch: int, transform: Transform) -> Iterator[DataFrame]:
        """Yield the batch's changes, one row a key; what an update did not send is read from the source."""
        relation = ".".join(transform.table.source_name)
        if batch.events <= SMALL_BATCH:
            found = self.spool.events(start, batch.until).drop_columns(["committed_at", "note"])
            events = self.spark.createDataFrame(found).coalesce(1)
        else:
            events = self.spool.read(self.spark, start, batch.until)
        ours = events.where((events["relation"] == relation) & events["op"].isin(INSERT, UPDATE, DELETE))
        if batch.truncated:  # what came before it has nothing to say any more
            lsn, ordinal = batch.truncated
            ours = ours.where((ours["lsn"] > lsn) | ((ours["lsn"] == lsn) & (ours["ordinal"] > ordinal)))
        ours = keys_apart(ours)
        with ExitStack() as held:
            if batch.partial:
                partial = self.spool.partial(relation, start, batch.until)
                ours = held.enter_context(completed(self.spec, self.spark, transform, ours, partial, self.snapshot))
            changes = transform.changes(ours, epoch)
            # one task: the fence waits for such batches
            yield changes.coalesce(1) if batch.events <= SMALL_BATCH else changes


def offered_intervals(authorities: Sequence[Authority], *, takes_over: bool) -> list[Interval]:
    """Return the intervals of the old store's stream that a target is offered, by the authority log (pure).

    While the new store has authority, the old one's stream holds our own mirrored writes. The target that takes over wrote them
    itself, so it never gets that echo. Any other target waits at the fence; it learns of those writes by the echo once authority is
    back, because then the old store is the truth again.
    """
    intervals = [Interval(0, 0, FOR_EVER)]
    for change in authorities:
        intervals[-1] = replace(intervals[-1], until=change.from_lsn)
        intervals.append(Interval(change.epoch, change.from_lsn, FOR_EVER))
    if authorities and authorities[-1].store == "new":
        intervals.pop()
    elsewhere = {change.epoch for change in authorities if change.store == "new"}
    return [one for one in intervals if not (takes_over and one.epoch in elsewhere)]


def first_stop(outline: pa.Table, identity: Sequence[str]) -> tuple[int, str] | None:
    """Return (commit LSN, reason) of the first event that this version does not carry, or None (pure)."""
    unsent = pc.greater(pc.list_value_length(outline["missing"]), 0)
    suspects = outline.filter(pc.or_(unsent, pc.equal(outline["op"], RELATION)))
    for event in suspects.sort_by([("lsn", "ascending"), ("ordinal", "ascending")]).to_pylist():
        if event["op"] == RELATION:
            return event["lsn"], f"its definition changed: {event['note']}"
        if met := set(event["missing"]) & set(identity):
            return event["lsn"], (
                f"an update left the large key column {min(met)} unchanged and so out of the stream:"
                " ALTER TABLE … REPLICA IDENTITY FULL before prepare makes it whole"
            )
    return None


def last_truncate(outline: pa.Table) -> tuple[int, int] | None:
    """Return commit LSN and ordinal of the last TRUNCATE, which is all that counts of those before it (pure)."""
    found = outline.filter(pc.equal(outline["op"], TRUNCATE))
    return max(zip(found["lsn"].to_pylist(), found["ordinal"].to_pylist(), strict=True), default=None)


def lease_of(target: str) -> str:
    """Return the name of the lease under which batches of one target take turns."""
    return f"{STEP}-{target}"


def total(rounds: Sequence[Replayed]) -> Replayed:
    """Return what several rounds did together."""
    applied = min((one.applied for one in rounds), default=0)
    return Replayed(sum(one.events for one in rounds), sum(one.taken for one in rounds), applied)


def replay(
    spec: Spec, spark: SparkSession, *, follow: bool = False, stop: threading.Event | None = None,
    targets: Sequence[str] | None = None,
) -> Replayed:  # fmt: skip
    """Replay until caught up with the spool, or with `follow` until `stop` is set (driver).

    Each target is followed in a thread of its own, so that a slow one does not hold up another, and an error in one stops all.
    Raises StepOrder before prepare, TableStopped, ServerUnavailable.
    """
    stop = stop or threading.Event()
    with Ledger.open(spec, STEP) as ledger:
        prepared = require_prepared(spec, spark, ledger, STEP)
    chosen = list(targets or spec.targets)
    with ThreadPoolExecutor(len(chosen), thread_name_prefix="replay") as pool:
        running = [pool.submit(_replay_target, spec, spark, prepared, target, follow, stop) for target in chosen]
        try:
            return total([one.result() for one in as_completed(running)])
        finally:
            stop.set()


def _replay_target(
    spec: Spec, spark: SparkSession, prepared: Prepared, target: str, follow: bool, stop: threading.Event
) -> Replayed:
    """Replay into one target; a scheduler pool of its own keeps a long backfill from starving it."""
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", lease_of(target))
    with Ledger.open(spec, STEP) as ledger, ledger.recorded(STEP) as told:
        told["target"] = target
        running = Replay(spec, spark, ledger, prepared)
        collecting = Collecting(spec, ledger, prepared, target)
        until = None if follow else running.spool.end()  # a writer that never rests would otherwise keep it for ever
        events = taken = 0
        while True:
            done = running.round(until, targets=[target])
            events, taken = events + done.events, taken + done.taken
            if collects := collecting.due(done.events):
                with ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS):
                    collecting.turn()
            if stop.is_set() or not (follow or done.events or collects):
                told.update(events=events, taken=taken, applied=format_lsn(done.applied))
                return Replayed(events, taken, done.applied)
            if not (done.events or collects):
                stop.wait(IDLE_SECONDS)


def main() -> None:
    """Entry of `spark-submit jobs/replay.py SPEC`."""
    from changeover.cli import main as command

    command(args=["replay", *sys.argv[1:]])


if __name__ == "__main__":
    main()
