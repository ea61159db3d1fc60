"""Rounds of replay: spooled changes offered to each target through its gate, in batches, until caught up or for as long as asked.

A round offers a target all between the position that each load has reached and the end of the spool
(or a given position), batch by batch (`applier`). Rounds and verifications of one target exclude
each other by a lease. An event that this version does not carry stops its table by name, after
everything before it was applied.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import psycopg
from ldclient.migrations.types import Stage

from changeover.errors import ChangeoverError, LeaseHeld, RowRefused, TableStopped, TextRefused
from changeover.jobs.apply.applier import Applier
from changeover.jobs.apply.checkpoint import ForwardCheckpoint, ReverseStream
from changeover.jobs.apply.retention import Collecting
from changeover.jobs.ledger.chunks import mergeable
from changeover.jobs.ledger.epochs import NEW, Section, named, sections
from changeover.jobs.ledger.lease import LEASE_SECONDS, lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED
from changeover.jobs.load.prepared import Prepared, require_prepared
from changeover.jobs.reverse import path as reverse
from changeover.jobs.spool.table import spool_of
from changeover.position import format_lsn
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base.interface import Counts, Store
from changeover.stores.base.reader import ExportedSnapshot

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Part = TypeVar("Part")

log = logging.getLogger(__name__)

STEP = "replay"

IDLE_SECONDS = 0.1

AGAIN_SECONDS = 2.0
"""How long to wait before what the old store refused is offered to it again."""


@dataclass(frozen=True)
class Replayed:
    """What one round did: events of the tables offered over all loads, changes taken, and the position reached."""

    events: int
    taken: int
    applied: int


class Replay:
    """Replays one migration (driver); `round` is one pass over all its loads, in the thread that calls it.

    Values that an update did not send are read in `snapshot` where one is given: then they are those of its moment. What was
    written to the new store while it had authority goes to the other targets as well, and back to the old store.
    """

    def __init__(
        self, spec: Spec, spark: SparkSession, ledger: Ledger, prepared: Prepared, snapshot: ExportedSnapshot | None = None,
        stop: threading.Event | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.spark = spark
        self.ledger = ledger
        self.prepared = prepared
        self.stop = stop or threading.Event()
        self.spool = spool_of(spec, prepared.stream.epoch)
        self.applier = Applier(spec, spark, ForwardCheckpoint(spec, ledger, self.spool, prepared.stream.epoch), snapshot)
        self.back = ReverseStream(spec, spark, ledger, prepared.transforms)
        self.returning = Applier(spec, spark, self.back.checkpoint, None)

    def lease(self, target: str) -> AbstractContextManager[None]:
        """Hold a target's lease, however long it takes; `stop` calls the wait off, which is LeaseHeld (driver).

        Args:
            target: The target's name.

        Returns:
            A context manager: the lease ends with the block.

        Raises:
            LeaseHeld: `stop` was set while it waited.
        """
        return self.ledger.lease(lease_of(target), LEASE_SECONDS, self.stop)

    def round(self, until: int | None = None, targets: Sequence[str] | None = None) -> Replayed:
        """Offer everything spooled below `until` to each target, under that target's lease (driver).

        Args:
            until: An LSN of the old store's log; the spool's end unless given.
            targets: The targets' names, all unless given.

        Returns:
            Events offered, changes taken, and the least position reached.

        Raises:
            TableStopped: A table was stopped; the others are done.
            RowRefused: A row can't be carried over; the other tables are done.
        """

        def of_target(target: str) -> list[Replayed]:
            with self.lease(target):
                return [self.offer(until, [target])]

        return each(of_target, targets or list(self.spec.targets))

    def offer(self, until: int | None = None, targets: Sequence[str] | None = None) -> Replayed:
        """Do a round's work (driver); the caller holds the leases.

        Args:
            until: An LSN of the old store's log; the spool's end unless given.
            targets: The targets' names, all unless given.

        Returns:
            Events offered, changes taken, and the least position reached.

        Raises:
            TableStopped: A table was stopped; the others are done.
            RowRefused: A row can't be carried over; the other tables are done.
        """
        end = min([self.spool.end()] + ([until] if until is not None else []))
        authorities = self.ledger.authorities()
        carried = self.back.carried(authorities)

        def of_load(load: tuple[str, str]) -> list[Replayed]:
            parts = sections(authorities, takes_over=self._takes_over(load[1]), carried=carried)
            return self._offer_table(*load, parts, end, apart=bool(named(authorities)))

        return each(of_load, [one for one in self.prepared.transforms if targets is None or one[1] in targets])

    def _offer_table(self, source: str, target: str, parts: Sequence[Section], end: int, *, apart: bool) -> list[Replayed]:
        """Offer what is left of a table to a target; nothing is said of one that may not be merged yet.

        Epochs are offered one after the other, unless tenants have moved `apart`: then both streams go on, of other rows each.
        """
        load = self.ledger.load(source, target)
        if load.applied >= end and all(section[0].store != NEW for section in parts):
            return [Replayed(0, 0, load.applied)]
        transform = self.prepared.transforms[source, target]
        with open_store(self.spec, self.spec.targets[target], "replay") as store:
            if not mergeable(store.merges_while_loading, load.state == CLOSED):
                return []
            store.install(transform.target, self.prepared.stream.image)
            events = taken = 0
            for section in parts:
                if section[0].store == NEW:
                    # the target's lease, which a fence has, keeps tenants from moving meanwhile
                    there, offered = self._bring_back(section, source, target, store, self.back.reach())
                else:
                    load, offered = self.applier.catch_up(load, section, end, transform, store)
                    there = load.applied >= section[0].until
                events, taken = events + offered.offered, taken + offered.taken
                if not there and not apart:
                    break
            return [Replayed(events, taken, load.applied)]

    def _takes_over(self, target: str) -> bool:
        return self.spec.flag is not None and self.spec.flag.target == target

    def bring_back(self) -> Replayed:
        """Offer to the old store what was written to the new one while it had authority (driver).

        What stands in the way of a table is on record, and raised when the others are done. Once
        the last stage was reached the old store gets nothing any more.

        The caller holds the old store's lease.

        Returns:
            Events offered, changes taken, and the least position reached, an LSN of the new store's
            log.

        Raises:
            ChangeoverError: What stands in the way of a table, which is on record; the others are
                done.
        """
        parts, reach = self.back.plan() if self.spec.flag is not None else ([], 0)
        if not parts or self.ledger.stage() == Stage.COMPLETE.value:
            return Replayed(0, 0, 0)
        end, counts = min(reach, parts[-1][0].until), Counts(0, 0)
        failed: list[ChangeoverError] = []
        loads = self.back.loads(reverse.OLD_STORE)
        for load in (load for load in loads if load.applied < end):
            try:
                of_table = self._table_back(load.source, parts, reach)
                counts = Counts(counts.offered + of_table.offered, counts.taken + of_table.taken)
            except ChangeoverError as error:
                if not isinstance(error, TableStopped):  # else its own reason is on record
                    reverse.stop(self.ledger, load.target, str(error), load.source)
                failed.append(error)
        if failed:
            raise failed[0]
        return Replayed(counts.offered, counts.taken, min((load.applied for load in loads), default=0))

    def _table_back(self, source: str, parts: Sequence[Section], reach: int) -> Counts:
        """Offer one table's changes of all sections to the old store."""
        events = taken = 0
        with open_store(self.spec, reverse.old_target(self.spec), "replay") as store:
            for section in parts:
                there, offered = self._bring_back(section, source, reverse.OLD_STORE, store, reach)
                events, taken = events + offered.offered, taken + offered.taken
                if not there:
                    break
        return Counts(events, taken)

    def _bring_back(self, section: Section, source: str, target: str, store: Store, reach: int) -> tuple[bool, Counts]:
        """Offer what is left of one section of the new store's stream; tell whether all of it was."""
        load = next(load for load in self.back.loads(target) if load.source == source)
        transform = self.back.transform(source, target)
        load, counts = self.returning.catch_up(load, section, reach, transform, store)
        return load.applied >= section[0].until, counts


def each(action: Callable[[Part], list[Replayed]], parts: Iterable[Part]) -> Replayed:
    """Replay part after part; what stops one is raised when all others are done.

    Args:
        action: Replays one part.
        parts: Targets, or loads.

    Returns:
        What was done in all of them together.

    Raises:
        TableStopped: A table was stopped.
        RowRefused: A row can't be carried over.
        TextRefused: A text can't be.
    """
    results: list[Replayed] = []
    stops: list[ChangeoverError] = []
    for part in parts:
        try:
            results += action(part)
        except (TableStopped, RowRefused, TextRefused) as stop:
            stops.append(stop)
    if stops:
        raise stops[0]
    return total(results)


def total(rounds: Sequence[Replayed]) -> Replayed:
    """Return what several rounds did together."""
    applied = min((one.applied for one in rounds), default=0)
    return Replayed(sum(one.events for one in rounds), sum(one.taken for one in rounds), applied)


def replay(
    spec: Spec, spark: SparkSession, *, follow: bool = False, stop: threading.Event | None = None,
    targets: Sequence[str] | None = None,
) -> Replayed:  # fmt: skip
    """Replay until caught up with the spool, or with `follow` until `stop` is set (driver).

    Each target is followed in a thread of its own, so that a slow one does not hold up another, and
    an error in one stops all.

    The old store is replayed into as well, where reverse replication is open.

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        follow: Whether to go on once it has caught up.
        stop: Ends it after the batch under way.
        targets: The targets' names, all unless given.

    Returns:
        Events offered, changes taken, and the least position reached.

    Raises:
        StepOrder: Prepare did not run.
        TableStopped: A table was stopped.
        ServerUnavailable: A server can't be reached.
    """
    stop = stop or threading.Event()
    with Ledger.open(spec, STEP) as ledger:
        prepared = require_prepared(spec, spark, ledger, STEP)
    chosen = list(targets or spec.targets)
    with ThreadPoolExecutor(len(chosen) + 1, thread_name_prefix="replay") as pool:
        running = [pool.submit(_replay_target, spec, spark, prepared, target, follow, stop) for target in chosen]
        back = pool.submit(_replay_back, spec, spark, prepared, follow, stop) if spec.flag is not None else None
        try:
            forward = total([one.result() for one in as_completed(running)])
        finally:
            stop.set()
        returned = back.result() if back is not None else Replayed(0, 0, 0)
    return replace(forward, events=forward.events + returned.events, taken=forward.taken + returned.taken)


def _replay_target(
    spec: Spec, spark: SparkSession, prepared: Prepared, target: str, follow: bool, stop: threading.Event
) -> Replayed:
    """Replay into one target; a scheduler pool of its own keeps a long backfill from starving it."""
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", lease_of(target))
    with Ledger.open(spec, STEP) as ledger, ledger.recorded(STEP) as report:
        report["target"] = target
        running = Replay(spec, spark, ledger, prepared, stop=stop)
        collecting = Collecting(spec, ledger, prepared, target)
        until = None if follow else running.spool.end()  # a writer that never rests would otherwise keep it for ever
        events = taken = applied = 0
        while True:
            try:
                result = running.round(until, targets=[target])
                if collects := collecting.due(result.events):
                    with running.lease(target):
                        collecting.collect()
            except LeaseHeld:  # `stop` has called the wait off
                result, collects = Replayed(0, 0, applied), False
            events, taken, applied = events + result.events, taken + result.taken, result.applied
            if stop.is_set() or not (follow or result.events or collects):
                report.update(events=events, taken=taken, applied=format_lsn(result.applied))
                return Replayed(events, taken, result.applied)
            if not (result.events or collects):
                stop.wait(IDLE_SECONDS)


def _replay_back(spec: Spec, spark: SparkSession, prepared: Prepared, follow: bool, stop: threading.Event) -> Replayed:
    """Replay from the new store into the old one; with `follow` whatever goes wrong is tried again, since the others go on."""
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", lease_of(reverse.OLD_STORE))
    reported = ""
    while True:
        try:
            with Ledger.open(spec, STEP) as ledger:
                return _back_rounds(Replay(spec, spark, ledger, prepared, stop=stop), follow, stop)
        except (ChangeoverError, psycopg.Error) as error:
            if not follow:
                raise
            if str(error) != reported:
                log.warning("nothing comes back to the old store: %s", error)
            reported = str(error)
        if stop.wait(AGAIN_SECONDS):
            return Replayed(0, 0, 0)


def _back_rounds(running: Replay, follow: bool, stop: threading.Event) -> Replayed:
    events = taken = 0
    while True:
        try:
            with running.lease(reverse.OLD_STORE):
                result = running.bring_back()
        except LeaseHeld:  # `stop` has called the wait off
            result = Replayed(0, 0, 0)
        events, taken = events + result.events, taken + result.taken
        if stop.is_set() if follow else not result.events:
            return Replayed(events, taken, result.applied)
        if not result.events:
            stop.wait(IDLE_SECONDS)
