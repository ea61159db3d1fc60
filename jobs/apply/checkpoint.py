"""The checkpoint: one store's spooled stream as replay carries it on, and where it writes down how far each load has come.

There are two, the old store's and the new one's, and they differ in a few rules alone, which stand
here. The applier asks its checkpoint and knows no direction. A position that is written down says
that every event below it was offered, in the log of that store. Lives on the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from changeover.errors import TableStopped
from changeover.jobs.ledger.epochs import NEW, OLD, Section, sections
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, OLD_STORE, Authority, Load, Stream
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.catalog import store_columns
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform import inverse, tenancy
from changeover.jobs.transform.transform import Transform
from changeover.spec import Spec

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Transforms = Mapping[tuple[str, str], Transform]


@dataclass(frozen=True)
class Checkpoint:
    """A store's stream, in the epoch in which the tables were begun: what carrying a batch asks of it."""

    spec: Spec
    ledger: Ledger
    spool: Spool
    epoch: int
    store: str = OLD

    @property
    def dsn(self) -> str:
        """Return where the values are read that an update did not send."""
        return self.spec.source.dsn.resolve() if self.store == OLD else reverse.new_dsn(self.spec)

    def stopped(self, load: Load) -> str | None:
        """Return why a load stands still for ever.

        Nothing that stands in the way of the new store's stream is for ever: it is tried again.

        Args:
            load: The load.

        Returns:
            The reason, None while it goes on.
        """
        return self.ledger.stopped().get(load.source) if self.store == OLD else None

    def stop(self, load: Load, reason: str) -> None:
        """Write down what stands in the way: of the old stream in all targets, of the new one in this target alone.

        Args:
            load: The load, whose table is meant.
            reason: Why, as a sentence for people.
        """
        self.ledger.stop(reason, load.source, None if self.store == OLD else load.target, self.store)

    def advance(self, load: Load, until: int, events: int) -> None:
        """Write down that every event below `until` was offered.

        Args:
            load: The load, whose table is meant.
            until: The LSN, in the log of the stream's own store.
            events: How many more events were offered.

        Raises:
            CouldNotFinish: The migration was begun anew since this run began.
        """
        self.ledger.advance(load.source, load.target, until, events, self.epoch, self.store)

    def closed(self, load: Load) -> bool:
        """Return whether a position may stand for the versions of all keys.

        While tenants move apart no position is above all epochs. Of the new store's stream a
        verification asks which keys were written since authority moved, so each has its version.

        Args:
            load: The load, whose table is meant.

        Returns:
            Whether all chunks are loaded and swept, and nothing of that is the case.
        """
        apart = self.spec.flag is not None and self.spec.flag.context is not None
        return self.store == OLD and not apart and self.ledger.load(load.source, load.target).state == CLOSED

    def tenant(self, load: Load) -> str:
        """Return the column of the stream's table that holds a row's tenant; asked where tenants have moved apart.

        Args:
            load: The load, whose table is meant.

        Returns:
            The column's name.

        Raises:
            SpecError: The spec names none.
        """
        if self.store == OLD:
            return tenancy.required(tenancy.old_column(self.spec), self.spec)
        return tenancy.required(tenancy.new_column(self.spec, self.spec.table(load.source)), self.spec)

    def require_truncatable(self, load: Load) -> None:
        """Raise where a TRUNCATE would take rows with it that are none of the stream's.

        The old table may have rows that `where` leaves out, which a TRUNCATE of the new one does not mean.

        Args:
            load: The load, whose table is meant.

        Raises:
            TableStopped: It would.
        """
        if load.target == OLD_STORE and self.spec.table(load.source).where is not None:
            reason = "a TRUNCATE of the new table, which would empty the old one of the rows too that `where` leaves out"
            self.stop(load, reason)
            raise TableStopped(load.source, reason)


class ReverseStream:
    """The new store's stream of one migration, planned once its path is there; `limit` bounds what is offered (driver)."""

    def __init__(self, spec: Spec, spark: SparkSession, ledger: Ledger, transforms: Transforms, epoch: int = 0) -> None:
        self.spec, self.spark, self.ledger, self.forward = spec, spark, ledger, transforms
        self.checkpoint = Checkpoint(spec, ledger, reverse.spool_of(spec), epoch, NEW)
        self.limit: int | None = None
        self._planned: tuple[Stream, Transforms] | None = None
        self._opened: datetime | None = None

    def carried(self, changes: Sequence[Authority]) -> frozenset[int]:
        """Return the epochs that the path on record carries.

        Args:
            changes: The moves of authority on record, oldest first.

        Returns:
            The epochs; none without a flag or before the first fence.
        """
        if self.spec.flag is None or all(change.store != NEW for change in changes):
            return frozenset()
        path = reverse.recorded(self.ledger)
        if path is not None and path.opened != self._opened:  # its spool may be another one at the same place
            self.checkpoint.spool.reopen()
            self._opened = path.opened
        return reverse.carried(path, changes)

    def plan(self) -> tuple[list[Section], int]:
        """Return the parts of the new store's stream that are offered, and how far it reaches.

        The reach is read in front of the authority log: a tenant whose move is not in the log has
        written nothing below it.

        Returns:
            The sections, and an LSN of the new store's log.
        """
        if all(change.store != NEW for change in self.ledger.authorities()):
            return [], 0
        reach, changes = self.reach(), self.ledger.authorities()
        parts = [one for one in sections(changes, takes_over=False, carried=self.carried(changes)) if one[0].store == NEW]
        return parts, reach

    def reach(self) -> int:
        """Return how far the stream is offered: to the end of its spool, or to the limit that was set.

        Returns:
            An LSN of the new store's log.
        """
        end = self.checkpoint.spool.end()
        return end if self.limit is None else min(end, self.limit)

    def transform(self, source: str, target: str) -> Transform:
        """Return what a row of the new table goes through on its way into a target.

        Args:
            source: The source table, as the spec names it.
            target: The target's name, `OLD_STORE` for the old store.

        Returns:
            The transform, planned once for each path on record.

        Raises:
            SpecError: A column that the spec names is not there.
            UnsafePlan: Rows can't be had back exactly.
        """
        path = reverse.require_recorded(self.ledger)
        if self._planned is None or self._planned[0] != path:
            self._planned = path, {}
        planned = self._planned[1]
        if (source, target) not in planned:
            self._planned = path, {**planned, (source, target): self._plan(source, target)}
        return self._planned[1][source, target]

    def _plan(self, source: str, target: str) -> Transform:
        table = self.spec.table(source)
        columns = self.ledger.source_table(table.target_relation, NEW)[1]
        new, key = store_columns(columns), [column.name for column in columns if column.key]
        if target == OLD_STORE:
            forward = self.forward[source, tenancy.flag_of(self.spec).target]
            old = forward.source, [c.name for c in forward.identity]
            return inverse.plan(self.spark, self.spec, table, old, new, key)
        return inverse.same(self.spark, self.spec, table, new, key, self.forward[source, target].target.columns)
