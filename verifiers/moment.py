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
from changeover.jobs.ledger.lease import LEASE_SECONDS, lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, NEW, OLD, OLD_STORE
from changeover.jobs.load.prepared import Prepared
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.catalog import SourceTable, source_table
from changeover.jobs.source.changes import SlotSource, change_source
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.source.replication import slot_of
from changeover.jobs.source.ticks import Aligned
from changeover.jobs.spool.waiting import await_spool
from changeover.jobs.transform.tenancy import flag_of, new_column, old_column, required
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

    While tenants are at both stores a state is one of each tenant's rows: at the position of the store that has authority over
    them. `new_lsn` is a position of the new store's log, up to which the old store and the lake have what it told; None where it
    has no authority, or where no stream brings that. `exact` says that nobody has written past that position to what is held:
    nothing has to be judged again.
    """

    source_lsn: int
    sources: dict[str, Frozen]
    targets: dict[tuple[str, str], Frozen]
    tables: dict[str, SourceTable]
    new_lsn: int | None = None
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
        if split.apart:
            return self.apart(split)
        if split.at_old:
            return self.aligned(split)
        _, lakes = self._targets(split)
        alone = self._mirrored() and not split.comes_back(self.ledger, lakes, self._first)
        return self.as_they_are() if alone else self.of_new(split)

    def aligned(self, split: Split) -> Moment:
        """Take a position X, offer every event below it, and hold the targets before any above it is."""
        watches = self._watches()
        every, _ = self._targets(split)
        with self._leases(every):
            split.require_unmoved(self.ledger, self._first)
            # its snapshot shows exactly what the change stream has below it
            aligned = change_source(self.spec).aligned("verify", self.held)
            emit_marker(self.old, "verify")
            replay = Replay(self.spec, self.spark, self.ledger, self.prepared, {OLD: aligned.snapshot})
            self._replay_to(replay, aligned.end, every)
            targets = self._freeze_targets()
        sources = self._freeze_sources(aligned.holder, aligned.snapshot, aligned.end, watches)
        return Moment(aligned.end, sources, targets, self.tables, exact=not self._mirrored())

    def apart(self, split: Split) -> Moment:
        """Take a position X of the old store's log and Y of the new one's, and offer either store's events below its own.

        No snapshot of a store shows both: that of its own position lacks what the other one's events bring. So each store is held
        twice. Its tenants' rows are those at its own position, the others' those after the other store's events were offered.
        """
        every, lakes = self._targets(split)
        watches = self._watches()
        with self._leases((OLD_STORE, *every)):
            split.require_unmoved(self.ledger, self._first)
            split.require_reverse(self.ledger, self._first)
            own: list[tuple[Aligned, Aligned]] = []

            def taken() -> Aligned:
                theirs = self._new_source().aligned("verify", self.held)
                ours = change_source(self.spec).aligned("verify", self.held)
                own.append((ours, theirs))
                emit_marker(self.old, "verify")
                snapshots = {OLD: ours.snapshot, NEW: theirs.snapshot}
                self._bring_back(lakes, theirs.end, snapshots, until=ours.end)
                replay = Replay(self.spec, self.spark, self.ledger, self.prepared, snapshots)
                replay.back.limit = theirs.end
                self._replay_to(replay, ours.end, every)
                return theirs

            at_own = self._freeze_at(taken)
            offered = self._freeze_targets(among=[flag_of(self.spec).target])
            holder, exported = self.held.enter_context(exporting(self._dsn, self._application))
            old_offered = self._freeze_sources(holder, exported, wal_position(holder), watches)
            split.require_unmoved(self.ledger, self._first)
        [(ours, theirs)] = own
        old_at_own = self._freeze_sources(ours.holder, ours.snapshot, ours.end, watches)
        targets = {**at_own}
        for names in at_own.keys() & offered.keys():
            column = required(new_column(self.spec, self.spec.table(names[0])), self.spec)
            targets[names] = split.joined(self.spark, NEW, at_own[names], offered[names], column)
        column, both = required(old_column(self.spec), self.spec), old_at_own.keys() & old_offered.keys()
        sources = {name: split.joined(self.spark, OLD, old_at_own[name], old_offered[name], column) for name in both}
        return Moment(ours.end, sources, targets, self.tables, theirs.end, exact=not self._mirrored())

    @contextmanager
    def _leases(self, targets: Sequence[str]) -> Iterator[None]:
        """Hold the leases of targets: meanwhile nobody else replays into them, and no authority moves."""
        with ExitStack() as leases:
            for target in targets:
                leases.enter_context(self.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
            yield

    def _new_source(self) -> SlotSource:
        """Return where a position of the new store's log is taken, with the snapshot that shows exactly what is below it."""
        return SlotSource(reverse.new_dsn(self.spec), self.spec.name, slot_of(self.spec))

    def _mirrored(self) -> bool:
        """Return whether an application writes to both stores, by what the spec says or by what a router says of itself."""
        return self.spec.mirrors or any(beat.counters.get("mirrors") for beat in self.ledger.heartbeats())

    def of_new(self, split: Split) -> Moment:
        """Take a position of the new store's log, which has all authority, and offer every event below it to the others."""
        _, lakes = self._targets(split)
        with self._leases((OLD_STORE, *lakes)):
            split.require_unmoved(self.ledger, self._first)
            split.require_reverse(self.ledger, self._first)
            watches = self._watches()

            own: list[Aligned] = []

            def taken() -> Aligned:
                own.append(aligned := self._new_source().aligned("verify", self.held))
                self._bring_back(lakes, aligned.end, {NEW: aligned.snapshot})
                return aligned

            targets = self._freeze_at(taken)
            holder, exported = self.held.enter_context(exporting(self._dsn, self._application))
            lsn = wal_position(holder)
            sources = self._freeze_sources(holder, exported, lsn, watches)
        return Moment(lsn, sources, targets, self.tables, own[0].end, exact=not self._mirrored())

    def as_they_are(self) -> Moment:
        """Hold both stores as they are: no stream brings the old one what is written to the new one, a mirror alone does."""
        targets = self._freeze_targets()
        watches = self._watches()
        holder, exported = self.held.enter_context(exporting(self._dsn, self._application))
        lsn = wal_position(holder)
        return Moment(lsn, self._freeze_sources(holder, exported, lsn, watches), targets, self.tables)

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

    def _bring_back(
        self, lakes: Sequence[str], position: int, snapshots: Mapping[str, ExportedSnapshot], until: int | None = None
    ) -> None:  # fmt: skip
        """Offer every event of the new store's log below a position to the old store and the lakes.

        What an update did not send is read in the position's own snapshot. A lake gets nothing of the old store's log from `until`
        on.
        """
        replay = Replay(self.spec, self.spark, self.ledger, self.prepared, snapshots)
        with connect(reverse.new_dsn(self.spec), self._application) as new:
            emit_marker(new, "verify")
        await_spool(replay.ledger, replay.back.checkpoint.spool, position, "the new store's stream", step="capture-new")
        replay.back.limit = position
        self._offer_back(replay.bring_back, position)
        if lakes:
            self._offer_back(lambda: replay.offer(until, lakes), position)

    def _offer_back(self, offer: Callable[[], object], position: int) -> None:
        """Offer the new store's events; a table that lacks some is the only one without a verdict."""
        try:
            offer()
        except ChangeoverError as error:
            behind = {load.source for load in self.ledger.loads(NEW) if load.applied < position}
            if not behind:
                raise
            self.unchecked.add([names for names in self.unchecked.left(self.chosen) if names[0] in behind], error)

    def _freeze_at(self, taken: Callable[[], Aligned]) -> dict[Names, Frozen]:
        """Hold all targets: the new store at the position that is taken of it, the others once they were brought to it."""
        failed: list[BaseException] = []

        def snapshot() -> tuple[Connection, ExportedSnapshot]:
            try:
                aligned = taken()
            except BaseException as error:
                failed.append(error)  # the others' reason too: they stand at no position then
                raise
            return aligned.holder, aligned.snapshot

        if all(target != flag_of(self.spec).target for _, target in self.chosen):
            taken()  # whose position the lakes and the old store are brought to all the same
        targets = self._freeze_targets(snapshot)
        if failed:
            raise failed[0]
        return targets

    def _freeze_targets(self, taken: Taken | None = None, among: Sequence[str] | None = None) -> dict[Names, Frozen]:
        """Hold all tables of each target (all unless named), by as many sessions however many tables there are.

        What takes the snapshot of the store that has authority brings the others up to it, so that one comes first.
        """
        frozen = {}
        left = {names: load for names, load in self.unchecked.left(self.chosen).items() if among is None or names[1] in among}
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
