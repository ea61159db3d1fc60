"""The checkpoint: one store's spooled stream as replay carries it on, and where it writes down how far each load has come.

There are two, the old store's and the new one's. The applier asks its checkpoint and knows no
direction. A position that is written down says that every event below it was offered, in the log of
that store. Lives on the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from changeover.errors import TableStopped
from changeover.jobs.ledger.epochs import NEW, Section, sections
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, Authority
from changeover.jobs.reverse import path as reverse
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform import inverse, tenancy
from changeover.jobs.transform.transform import Transform
from changeover.spec import Spec

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Transforms = Mapping[tuple[str, str], Transform]


class Progress(Protocol):
    """A load of one of the two streams, as far as carrying needs it."""

    @property
    def source(self) -> str:
        """Return the source table's name in the spec."""
        ...

    @property
    def target(self) -> str:
        """Return the target's name."""
        ...

    @property
    def applied(self) -> int:
        """Return the position below which every event was offered."""
        ...


class Checkpoint(Protocol):
    """What carrying a batch asks of the stream that it is from."""

    @property
    def spool(self) -> Spool:
        """Return where the stream is spooled."""
        ...

    @property
    def dsn(self) -> str:
        """Return where the values are read that an update did not send."""
        ...

    def stopped(self, load: Progress) -> str | None:
        """Return why the table is stopped.

        Args:
            load: The load, whose table is meant.

        Returns:
            The reason, None while the table goes on.
        """
        ...

    def stop(self, load: Progress, reason: str) -> None:
        """Write down why the table is stopped.

        Args:
            load: The load, whose table is meant.
            reason: Why, as a sentence for people.
        """
        ...

    def advance(self, load: Progress, until: int, events: int) -> None:
        """Write down that every event below `until` was offered.

        Args:
            load: The load, whose table is meant.
            until: The LSN, in the log of the stream's own store.
            events: How many more events were offered.
        """
        ...

    def closed(self, load: Progress) -> bool:
        """Return whether the target's table is closed, and needs no version for each key that is written.

        Args:
            load: The load, whose table is meant.

        Returns:
            Whether a position may stand for the versions of all keys.
        """
        ...

    def tenant(self, load: Progress) -> str:
        """Return the column of the stream's table that holds a row's tenant; asked where tenants have moved apart.

        Args:
            load: The load, whose table is meant.

        Returns:
            The column's name.
        """
        ...

    def require_truncatable(self, load: Progress) -> None:
        """Raise TableStopped where a TRUNCATE would take rows with it that are none of the stream's."""
        ...


@dataclass(frozen=True)
class ForwardCheckpoint:
    """The old store's stream, of the epoch in which the tables were begun."""

    spec: Spec
    ledger: Ledger
    spool: Spool
    epoch: int

    @property
    def dsn(self) -> str:
        """Return the old store's DSN."""
        return self.spec.source.dsn.resolve()

    def stopped(self, load: Progress) -> str | None:
        """Return why the table is stopped, in all targets."""
        return self.ledger.source_table(load.source)[2]

    def stop(self, load: Progress, reason: str) -> None:
        """Stop the table in all targets."""
        self.ledger.stop_table(load.source, reason)

    def advance(self, load: Progress, until: int, events: int) -> None:
        """Write down the position in the old store's log."""
        self.ledger.advance(load.source, load.target, until, events, self.epoch)

    def closed(self, load: Progress) -> bool:
        """Return whether all chunks are loaded and swept; while tenants move apart no position is above all epochs."""
        apart = self.spec.flag is not None and self.spec.flag.context is not None
        return not apart and self.ledger.load(load.source, load.target).state == CLOSED

    def tenant(self, load: Progress) -> str:
        """Return the old table's column."""
        return tenancy.required(tenancy.old_column(self.spec), self.spec)

    def require_truncatable(self, load: Progress) -> None:
        """Every row of a target is the old table's."""


@dataclass(frozen=True)
class ReverseCheckpoint:
    """The new store's stream; a table that stands still in one target goes on in the others."""

    spec: Spec
    ledger: Ledger
    spool: Spool

    @property
    def dsn(self) -> str:
        """Return the new store's DSN."""
        return reverse.new_dsn(self.spec)

    def stopped(self, load: Progress) -> str | None:
        """Nothing that stands in the way is for ever: it is tried again."""
        return None

    def stop(self, load: Progress, reason: str) -> None:
        """Write down what stands in the way."""
        reverse.stop(self.ledger, load.target, reason, load.source)

    def advance(self, load: Progress, until: int, events: int) -> None:
        """Write down the position in the new store's log."""
        reverse.advance(self.ledger, load.source, load.target, until, events)

    def closed(self, load: Progress) -> bool:
        """A verification asks which keys were written since authority moved, so each has its version."""
        return False

    def tenant(self, load: Progress) -> str:
        """Return the new table's column."""
        return tenancy.required(tenancy.new_column(self.spec, self.spec.table(load.source)), self.spec)

    def require_truncatable(self, load: Progress) -> None:
        """The old table may have rows that `where` leaves out, which a TRUNCATE of the new one does not mean."""
        if load.target == reverse.OLD_STORE and self.spec.table(load.source).where is not None:
            reason = "a TRUNCATE of the new table, which would empty the old one of the rows too that `where` leaves out"
            self.stop(load, reason)
            raise TableStopped(load.source, reason)


class ReverseStream:
    """The new store's stream of one migration, planned once its path is there; `limit` bounds what is offered (driver)."""

    def __init__(self, spec: Spec, spark: SparkSession, ledger: Ledger, transforms: Transforms) -> None:
        self.spec, self.spark, self.ledger, self.forward = spec, spark, ledger, transforms
        self.checkpoint = ReverseCheckpoint(spec, ledger, reverse.spool_of(spec))
        self.limit: int | None = None
        self._planned: tuple[reverse.Path, Transforms] | None = None
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

    def loads(self, target: str) -> list[reverse.ReverseLoad]:
        """Return the loads into a target.

        Args:
            target: The target's name, `OLD_STORE` for the old store.

        Returns:
            The loads, with their positions as LSNs of the new store's log.
        """
        return [load for load in reverse.loads(self.ledger) if load.target == target]

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
            self._planned = path, {**planned, (source, target): self._plan(path, source, target)}
        return self._planned[1][source, target]

    def _plan(self, path: reverse.Path, source: str, target: str) -> Transform:
        table = self.spec.table(source)
        new, forward = reverse.columns_of(path, table), self.forward[source, tenancy.flag_of(self.spec).target]
        key = [c.name for c in path.tables[table.target_relation] if c.key]
        if target == reverse.OLD_STORE:
            old = forward.source, [c.name for c in forward.identity]
            return inverse.plan(self.spark, self.spec, table, old, new, key)
        return inverse.same(self.spark, self.spec, table, new, key, self.forward[source, target].target.columns)
