"""The moment of a verification: the old store's state per table, and the targets' states, all held open until the verdicts.

However many tables there are, a store is held by as many sessions, and all tables of one PostgreSQL store by one snapshot. A table
that can't be held keeps no other from its verdict. Runs on the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from changeover.errors import ChangeoverError, CouldNotCheck, RowRefused, StepOrder, TableStopped, TextRefused
from changeover.jobs.apply.rounds import Replay
from changeover.jobs.guarantee import assumptions
from changeover.jobs.ledger.epochs import shares
from changeover.jobs.ledger.lease import LEASE_SECONDS, lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, NEW, OLD_STORE, Authority
from changeover.jobs.load.prepared import Prepared
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.catalog import SourceTable, source_table
from changeover.jobs.source.changes import SlotSource, change_source
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.source.replication import slot_of
from changeover.jobs.spool.waiting import await_spool
from changeover.jobs.transform.tenancy import flag_of
from changeover.jobs.transform.transform import Transform
from changeover.position import format_lsn
from changeover.session import Connection, application_name, connect, wal_position
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base.interface import Frozen
from changeover.stores.base.reader import ExportedSnapshot, Taken
from changeover.stores.postgres.store import exporting, file_watch, frozen_at
from changeover.verifiers.compare.split_authority import Split
from changeover.verifiers.unchecked import Names, Unchecked

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Chosen = Mapping[Names, Transform]
"""What is compared: (source, target) -> transform."""

PARTS = 8
"""Key ranges that a side is read in: a few per core, so that one slow range does not hold the others up."""


@dataclass(frozen=True)
class Moment:
    """The moment of one verification: the states of the old store's tables, at a position of its log, and of the targets'.

    `aligned` says that the new store has authority, of some tenants at least, and that the old store and the lake have what it had
    told up to one position. `exact` says that nobody has written past that position to what is held: nothing has to be judged
    again.
    """

    source_lsn: int
    sources: dict[str, Frozen]
    targets: dict[tuple[str, str], Frozen]
    tables: dict[str, SourceTable]
    aligned: bool = False
    exact: bool = False


@contextmanager
def held_still(
    spec: Spec, spark: SparkSession, ledger: Ledger, prepared: Prepared, chosen: Chosen, split: Split, unchecked: Unchecked,
) -> Iterator[Moment]:  # fmt: skip
    """Hold both sides still; while the old store has authority over any row they are aligned at one LSN."""
    with ExitStack() as held, connect(spec.source.dsn.resolve(), application_name(spec.name, "verify")) as old:
        tables = _tables(old, spec, chosen, unchecked)
        holding = _Holding(held, spec, spark, ledger, prepared, chosen, unchecked, old, tables)
        moment = holding.take(split)
        holding.ask()
        yield moment


@dataclass(frozen=True)
class _Holding:
    """How one moment comes to be held; what holds it stays in `held`."""

    held: ExitStack
    spec: Spec
    spark: SparkSession
    ledger: Ledger
    prepared: Prepared
    chosen: Chosen
    unchecked: Unchecked
    old: Connection
    tables: dict[str, SourceTable]

    def take(self, split: Split) -> Moment:
        """Hold both sides, at one position of the log of the store that has authority."""
        if split.at_old:
            return self.aligned(split)
        return self.as_it_is(split) if self._mirrored() else self.of_new(split)

    def aligned(self, split: Split) -> Moment:
        """Take a position X, offer every event below it, and hold the targets before any above it is."""
        watches = self._watches()
        every, lakes = self._targets(split)
        with ExitStack() as leases:
            for target in [*([OLD_STORE] if split.at_new else []), *every]:
                leases.enter_context(self.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
            split.require_unmoved(self.ledger, self._first)
            limit = None
            if split.at_new:
                split.require_reverse(self.ledger, self._first)
                limit = self._bring_back_to_now(lakes)
            # its snapshot shows exactly what the change stream has below it
            aligned = change_source(self.spec).aligned("verify", self.held)
            emit_marker(self.old, "verify")
            replay = Replay(self.spec, self.spark, self.ledger, self.prepared, aligned.snapshot)
            replay.back.limit = limit
            self._replay_to(replay, aligned.end, every)
            targets = self._freeze_targets()
        sources = self._freeze_sources(aligned.holder, aligned.snapshot, aligned.end, watches)
        exact = not split.at_new and not self._mirrored()
        return Moment(aligned.end, sources, targets, self.tables, aligned=split.at_new, exact=exact)

    def _mirrored(self) -> bool:
        """Return whether an application writes to both stores, by what the spec says or by what a router says of itself."""
        return self.spec.mirrors or any(beat.counters.get("mirrors") for beat in self.ledger.heartbeats())

    def of_new(self, split: Split) -> Moment:
        """Take a position of the new store's log, which has all authority, and offer every event below it to the others."""
        _, lakes = self._targets(split)
        with ExitStack() as leases:
            for target in (OLD_STORE, *lakes):
                leases.enter_context(self.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
            split.require_unmoved(self.ledger, self._first)
            split.require_reverse(self.ledger, self._first)
            watches = self._watches()
            failed: list[BaseException] = []

            def taken() -> tuple[Connection, ExportedSnapshot]:
                # its snapshot shows exactly what the new store's stream has below it
                source = SlotSource(reverse.new_dsn(self.spec), self.spec.name, slot_of(self.spec))
                try:
                    aligned = source.aligned("verify", self.held)
                    self._bring_back(lakes, aligned.end, aligned.snapshot)
                except BaseException as error:
                    failed.append(error)  # the others' reason too: they stand at no position then
                    raise
                return aligned.holder, aligned.snapshot

            if all(target != flag_of(self.spec).target for _, target in self.chosen):
                taken()  # whose position the lakes and the old store are brought to all the same
            targets = self._freeze_targets(taken)
            if failed:
                raise failed[0]
            holder, exported = self.held.enter_context(exporting(self._dsn, self._application))
            lsn = wal_position(holder)
            sources = self._freeze_sources(holder, exported, lsn, watches)
        return Moment(lsn, sources, targets, self.tables, aligned=True, exact=not self._mirrored())

    def as_it_is(self, split: Split) -> Moment:
        """Hold both as they are, once the old store and the lakes have what the new one wrote, where they get it."""
        _, lakes = self._targets(split)
        with ExitStack() as leases:
            aligned = _comes_back(self.ledger, lakes, self._first, split.changes)
            if aligned:
                for target in (OLD_STORE, *lakes):
                    leases.enter_context(self.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
                self._bring_back_to_now(lakes)
            targets = self._freeze_targets()
            watches = self._watches()
            holder, exported = self.held.enter_context(exporting(self._dsn, self._application))
            lsn = wal_position(holder)
            sources = self._freeze_sources(holder, exported, lsn, watches)
        return Moment(lsn, sources, targets, self.tables, aligned)

    @property
    def _dsn(self) -> str:
        return self.spec.source.dsn.resolve()

    @property
    def _application(self) -> str:
        return application_name(self.spec.name, "verify")

    @property
    def _first(self) -> str:
        """Return the table by which what concerns all is told."""
        return min(source for source, _ in self.chosen)

    def _targets(self, split: Split) -> tuple[list[str], list[str]]:
        """Return all targets that are compared, and the lakes among them that follow the new store."""
        every = sorted({target for _, target in self.chosen})
        return every, [name for name in reverse.targets_of(self.spec) if name in every] if split.at_new else []

    def _watches(self) -> dict[str, Callable[[], bool]]:
        return {name: file_watch(self.old, table.read) for name, table in self.tables.items()}

    def _replay_to(self, replay: Replay, position: int, targets: Sequence[str]) -> None:
        """Offer every event below a position, once capture has made them durable."""
        await_spool(replay.ledger, replay.spool, position, "the source's stream")
        try:
            replay.offer(until=position, targets=targets)
        except (TableStopped, RowRefused, TextRefused) as error:  # the other tables are there
            look_closed(replay.ledger, self.chosen, self.unchecked)
            behind = [names for names in self.unchecked.left(self.chosen) if replay.ledger.load(*names).applied < position]
            self.unchecked.add(behind, error)

    def _bring_back_to_now(self, lakes: Sequence[str]) -> int:
        """Offer what was written to the new store to the old store and the lakes, whose leases are held; return up to where."""
        with connect(reverse.new_dsn(self.spec), self._application) as new:
            position = wal_position(new)
        self._bring_back(lakes, position)
        return position

    def _bring_back(self, lakes: Sequence[str], position: int, snapshot: ExportedSnapshot | None = None) -> None:
        """Offer every event of the new store's log below a position to the old store and the lakes.

        What an update did not send is read in the position's own snapshot, where there is one.
        """
        replay = Replay(self.spec, self.spark, self.ledger, self.prepared, snapshot, of=NEW)
        with connect(reverse.new_dsn(self.spec), self._application) as new:
            emit_marker(new, "verify")
        await_spool(replay.ledger, replay.back.checkpoint.spool, position, "the new store's stream", step="capture-new")
        replay.back.limit = position
        self._offer_back(replay.bring_back, position)
        if lakes:
            self._offer_back(lambda: replay.offer(targets=lakes), position)

    def _offer_back(self, offer: Callable[[], object], position: int) -> None:
        """Offer the new store's events; a table that lacks some is the only one without a verdict."""
        try:
            offer()
        except ChangeoverError as error:
            behind = {load.source for load in self.ledger.loads(NEW) if load.applied < position}
            if not behind:
                raise
            self.unchecked.add([names for names in self.unchecked.left(self.chosen) if names[0] in behind], error)

    def _freeze_targets(self, taken: Taken | None = None) -> dict[Names, Frozen]:
        """Hold all tables of each target, by as many sessions however many tables there are.

        What takes the snapshot of the store that has authority brings the others up to it, so that one comes first.
        """
        frozen = {}
        left = self.unchecked.left(self.chosen)
        authority = self.spec.flag.target if taken is not None and self.spec.flag is not None else None
        for target in sorted({target for _, target in left}, key=lambda name: (name != authority, name)):
            tables = {names: load.target for names, load in left.items() if names[1] == target}
            with self.unchecked.at(tables):
                store = self.held.enter_context(open_store(self.spec, self.spec.targets[target], "verify"))
                its = taken if target == authority else None
                hold = self.held.enter_context(store.freeze(self.spark, list(tables.values()), PARTS, its))
                for names, table in tables.items():
                    with self.unchecked.at([names]):
                        frozen[names] = hold(table)
        return frozen

    def _freeze_sources(
        self, holder: Connection, exported: ExportedSnapshot, lsn: int, watches: Mapping[str, Callable[[], bool]]
    ) -> dict[str, Frozen]:
        """Hold all source tables in one snapshot, which is that of a position."""
        frozen = {}
        for name, table in self.tables.items():
            with self.unchecked.at(_of(name, self.chosen)):
                frozen[name] = frozen_at(
                    self.spark, self._dsn, self._application, table.read, exported, format_lsn(lsn), holder, PARTS, watches[name]
                )
        return frozen

    def ask(self) -> None:
        """Ask of each table whether what a verdict rests on still holds; what concerns all is every table's reason."""
        for source in sorted({source for source, _ in self.unchecked.left(self.chosen)}):
            with self.unchecked.at(_of(source, self.chosen)):
                asked = assumptions.Asked(self.spec, self.old, self.ledger, source)
                assumptions.require(assumptions.Moment.VERDICT, asked)


def _of(source: str, chosen: Chosen) -> list[Names]:
    """Return what is compared of one source table."""
    return [names for names in chosen if names[0] == source]


def look_closed(ledger: Ledger, chosen: Chosen, unchecked: Unchecked) -> None:
    """Take down which tables stopped, or are not loaded yet."""
    for source, target in unchecked.left(chosen):
        with unchecked.at([(source, target)]):
            if stopped := ledger.stopped().get(source):
                raise TableStopped(source, stopped)
            if ledger.load(source, target).state != CLOSED:
                raise StepOrder("verify", "backfill")


def _tables(old: Connection, spec: Spec, chosen: Chosen, unchecked: Unchecked) -> dict[str, SourceTable]:
    """Return the source tables as they are now."""
    tables = {}
    for source in sorted({source for source, _ in unchecked.left(chosen)}):
        with unchecked.at(_of(source, chosen)):
            table = source_table(old, spec.table(source))
            if table is None:
                raise CouldNotCheck(source, "there is no such table in the old store any more")
            tables[source] = table
    return tables


def _comes_back(ledger: Ledger, lakes: Sequence[str], source: str, changes: Sequence[Authority]) -> bool:
    """Return whether the old store gets all that is written to the new one; a lake that gets more than it has nothing beside it."""
    lacking = reverse.whole(ledger)
    if lacking is None:
        return True
    if lakes and reverse.carried(reverse.recorded(ledger), changes) & {held.epoch for held in shares(changes)}:
        problem = f"the lake follows the new store, and the old store, which it is held against, does not: {lacking}"
        raise CouldNotCheck(source, problem)
    return False
