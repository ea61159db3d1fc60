"""Rounds of replay: spooled changes offered to each target through its gate, in batches, until caught up or for as long as asked.

A round offers a target all between the position that each load has reached and the end of the spool
(or a given position), batch by batch (`applier`). Rounds and verifications of one target exclude
each other by a lease. An event that this version does not carry stops its table by name, after
everything before it was applied.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

import psycopg
from ldclient.migrations.types import Stage

from changeover.errors import ChangeoverError, LeaseHeld, RowRefused, TableStopped, TextRefused
from changeover.interrupt import asked_to_stop
from changeover.jobs.apply.applier import Applier
from changeover.jobs.apply.checkpoint import Checkpoint, ReverseStream
from changeover.jobs.apply.retention import Collecting
from changeover.jobs.ledger.chunks import mergeable
from changeover.jobs.ledger.epochs import NEW, OLD, Section, named, sections
from changeover.jobs.ledger.lease import LEASE_SECONDS, lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, OLD_STORE
from changeover.jobs.load.prepared import Prepared, require_prepared
from changeover.jobs.reverse import path as reverse
from changeover.jobs.spool.table import spool_of
from changeover.jobs.transform.transform import Transform
from changeover.position import format_lsn
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base.interface import Store
from changeover.stores.base.reader import ExportedSnapshot

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Part = TypeVar("Part")

log = logging.getLogger(__name__)

STEP = "replay"

IDLE_SECONDS = 0.1

NO_SNAPSHOTS: Mapping[str, ExportedSnapshot] = MappingProxyType({})

AGAIN_SECONDS = 2.0
"""How long to wait before what the old store refused is offered to it again."""


@dataclass(frozen=True)
class Replayed:
    """What rounds did: events offered over all loads, changes taken, and the position reached.

    `interrupted` says whether Ctrl-C or SIGTERM ended them.
    """

    events: int
    taken: int
    applied: int
    interrupted: bool = False


class Replay:
    """Replays one migration (driver); `round` is one pass over all its loads, in the thread that calls it.

    Values that an update did not send are read in the snapshot of `snapshots` that is of its store, where there is one: then they
    are those of its moment. What was written to the new store while it had authority goes to the other targets as well, and back
    to the old store.
    """

    def __init__(
        self, spec: Spec, spark: SparkSession, ledger: Ledger, prepared: Prepared,
        snapshots: Mapping[str, ExportedSnapshot] = NO_SNAPSHOTS, stop: threading.Event | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.spark = spark
        self.ledger = ledger
        self.prepared = prepared
        self.stop = stop or threading.Event()
        self.spool = spool_of(spec, prepared.stream.epoch)
        epoch = prepared.stream.epoch
        self.back = ReverseStream(spec, spark, ledger, prepared.transforms, epoch)
        self.appliers = {
            OLD: Applier(spec, spark, Checkpoint(spec, ledger, self.spool, epoch), snapshots.get(OLD), self.stop),
            NEW: Applier(spec, spark, self.back.checkpoint, snapshots.get(NEW), self.stop),
        }

    def lease(self, target: str) -> AbstractContextManager[None]:
        """Hold a target's lease, however long it takes; `stop` calls the wait off, which is LeaseHeld (driver).

        Args:
            target: The target's name.

        Returns:
            A context manager: the lease ends with the block.

        Raises:
            LeaseHeld: `stop` was set while it waited.
        """
        return self.ledger.lease(lease_of(target), LEASE_SECONDS, self.stop, again=True)

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
            if not self.due(target, until):
                return [Replayed(0, 0, min(load.applied for load in self.ledger.loads() if load.target == target))]
            with self.lease(target):
                return [self.offer(until, [target])]

        return each(of_target, targets or list(self.spec.targets))

    def due(self, target: str, until: int | None = None) -> bool:
        """Return whether a round of a target has anything to offer (driver; looks only, and needs no lease).

        Args:
            target: The target's name, `OLD_STORE` for the old store.
            until: An LSN of the old store's log; the spool's end unless given.

        Returns:
            Whether a load lacks what is spooled.
        """
        end = self._end(until)
        if any(load.applied < end for load in self.ledger.loads() if load.target == target):
            return True
        back = [load.applied for load in self.ledger.loads(NEW) if load.target == target]
        parts, reach = self.back.plan() if back else ([], 0)
        return bool(parts) and min(back) < min(reach, parts[-1][0].until)

    def _end(self, until: int | None) -> int:
        return min([self.spool.end()] + ([until] if until is not None else []))

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
        end = self._end(until)
        authorities = self.ledger.authorities()
        carried, apart = self.back.carried(authorities), bool(named(authorities))

        def of_load(names: tuple[str, str]) -> list[Replayed]:
            source, target = names
            load = self.ledger.load(source, target)
            parts = sections(authorities, takes_over=self._takes_over(target), carried=carried)
            comes_back = any(section[0].store == NEW for section in parts)
            if load.applied >= end and not comes_back:
                return [Replayed(0, 0, load.applied)]
            with open_store(self.spec, self.spec.targets[target], "replay") as store:
                if not mergeable(store.merges_while_loading, load.state == CLOSED):
                    return []
                store.install(self.prepared.transforms[names].target, self.prepared.stream.image)
                # the target's lease, which a fence has, keeps tenants from moving meanwhile
                reach = {OLD: end, NEW: self.back.reach() if comes_back else 0}
                return [self._offer_table(source, target, store, parts, reach, apart=apart)]

        return each(of_load, [one for one in self.prepared.transforms if targets is None or one[1] in targets])

    def _offer_table(
        self, source: str, target: str, store: Store, parts: Sequence[Section], reach: Mapping[str, int], *, apart: bool = False
    ) -> Replayed:  # fmt: skip
        """Offer what is left of a table to a target, whichever store's stream it is from; the position is in the first one's log.

        Epochs are offered one after the other, unless tenants have moved `apart`: then both streams go on, of other rows each.
        """
        events = taken = 0
        applied: dict[str, int] = {}
        for section in parts:
            stream = section[0].store
            load = self.ledger.load(source, target, stream)
            load, offered = self.appliers[stream].catch_up(
                load, section, reach[stream], self._transform(stream, source, target), store
            )
            applied[stream] = load.applied
            events, taken = events + offered.offered, taken + offered.taken
            if load.applied < section[0].until and not apart:
                break
        return Replayed(events, taken, applied.get(OLD, max(applied.values(), default=0)))

    def _transform(self, stream: str, source: str, target: str) -> Transform:
        return self.prepared.transforms[source, target] if stream == OLD else self.back.transform(source, target)

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
        end = min(reach, parts[-1][0].until)
        results: list[Replayed] = []
        failed: list[ChangeoverError] = []
        for load in [one for one in self.ledger.loads(NEW) if one.target == OLD_STORE and one.applied < end]:
            try:
                with open_store(self.spec, reverse.old_target(self.spec), "replay") as store:
                    results.append(self._offer_table(load.source, load.target, store, parts, {NEW: reach}))
            except ChangeoverError as error:
                if not isinstance(error, TableStopped):  # else its own reason is on record
                    self.back.checkpoint.stop(load, str(error))
                failed.append(error)
        if failed:
            raise failed[0]
        return total(results)


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
    an error in one stops all. A replay that follows ends at Ctrl-C and SIGTERM as by `stop`.

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
    # one that does not follow is a step among others, which Ctrl-C has to end with it
    listening = asked_to_stop(stop) if follow else nullcontext(lambda: False)
    threads = ThreadPoolExecutor(len(chosen) + 1, thread_name_prefix="replay")
    with listening as asked, threads as pool:
        running = [pool.submit(_replay_target, spec, spark, prepared, target, follow, stop) for target in chosen]
        back = pool.submit(_replay_back, spec, spark, prepared, follow, stop) if spec.flag is not None else None
        try:
            forward = total([one.result() for one in as_completed(running)])
            returned = back.result() if back is not None else Replayed(0, 0, 0)
        finally:
            stop.set()  # an error in one ends all
        return replace(
            forward,
            events=forward.events + returned.events,
            taken=forward.taken + returned.taken,
            interrupted=asked(),
        )


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

        def once() -> tuple[Replayed, bool]:
            result = running.round(until, targets=[target])
            if collects := collecting.due(result.events):
                with running.lease(target):
                    collecting.collect()
            return result, bool(result.events or collects)

        result = _rounds(once, follow, stop)
        report.update(events=result.events, taken=result.taken, applied=format_lsn(result.applied))
        return result


def _replay_back(spec: Spec, spark: SparkSession, prepared: Prepared, follow: bool, stop: threading.Event) -> Replayed:
    """Replay from the new store into the old one; with `follow` whatever goes wrong is tried again, since the others go on."""
    spark.sparkContext.setLocalProperty("spark.scheduler.pool", lease_of(OLD_STORE))
    reported = ""
    while True:
        try:
            with Ledger.open(spec, STEP) as ledger:
                running = Replay(spec, spark, ledger, prepared, stop=stop)

                def once(running: Replay = running) -> tuple[Replayed, bool]:
                    if not running.due(OLD_STORE):
                        return Replayed(0, 0, 0), False
                    with running.lease(OLD_STORE):
                        result = running.bring_back()
                    return result, bool(result.events)

                return _rounds(once, follow, stop)
        except (ChangeoverError, psycopg.Error) as error:
            if not follow:
                raise
            if str(error) != reported:
                log.warning("nothing comes back to the old store: %s", error)
            reported = str(error)
        if stop.wait(AGAIN_SECONDS):
            return Replayed(0, 0, 0)


def _rounds(once: Callable[[], tuple[Replayed, bool]], follow: bool, stop: threading.Event) -> Replayed:
    """Do round after round until one did nothing, or with `follow` until `stop` is set; return what all did together."""
    events = taken = applied = 0
    while True:
        try:
            result, moved = once()
            applied = result.applied
        except LeaseHeld:  # `stop` has called the wait off
            result, moved = Replayed(0, 0, applied), False
        events, taken = events + result.events, taken + result.taken
        if stop.is_set() or not (follow or moved):
            return Replayed(events, taken, applied)
        if not moved:
            stop.wait(IDLE_SECONDS)
