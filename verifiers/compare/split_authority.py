"""Split authority, as a verification sees it: which stores have some, and what must hold for a comparison to mean anything.

While tenants are at both stores each store is the truth of its own, and what it writes must reach
the other one. Where it does not, the question can't be answered, which is no "equal". Runs on the
driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from changeover.errors import CouldNotCheck, CouldNotFinish
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.jobs.reverse import path as reverse
from changeover.stores.base.interface import Frozen
from changeover.stores.base.reader import read_table
from changeover.tenants import describe

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclass(frozen=True)
class Split:
    """Where authority is: the log that says so, and whether each store has some."""

    changes: Sequence[Authority]

    @property
    def at_old(self) -> bool:
        """Return whether the old store has authority over any row."""
        return epochs.at(self.changes, OLD) is not None

    @property
    def at_new(self) -> bool:
        """Return whether the new store has authority over any row."""
        return epochs.at(self.changes, NEW) is not None

    @property
    def apart(self) -> bool:
        """Return whether each of the two has some."""
        return self.at_old and self.at_new

    def joined(self, spark: SparkSession, store: str, at_own: Frozen, offered: Frozen, column: str) -> Frozen:
        """Return a store's rows of two states as one, each tenant's of the state that its authority goes by (driver).

        Args:
            spark: The Spark session.
            store: `OLD` or `NEW`: which store the states are of.
            at_own: Its state at a position of its own log, for the rows over which it has authority.
            offered: Its state once the other store's rows had come, for those.
            column: The column that holds the tenant.

        Returns:
            The rows, in the ranges of the first state, at its position. The spec's own queries see
            the other state.

        Raises:
            CouldNotFinish: A state is not PostgreSQL's, or one store has no authority.
        """
        readings = [
            replace(state.reading, table=replace(state.reading.table, only=(column, tenants)))
            for state, whose in ((at_own, store), (offered, NEW if store == OLD else OLD))
            if (tenants := epochs.at(self.changes, whose)) is not None and state.reading is not None
        ]
        if len(readings) != 2:
            raise CouldNotFinish("rows of two states are read as one, of PostgreSQL and while tenants are at both stores alone")

        def frame(keys: Sequence[tuple[str, ...]] | None) -> DataFrame:
            one, other = (
                read_table(spark, reading.dsn, reading.application, reading.table, at_own.ranges, reading.snapshot, keys)
                for reading in readings
            )
            return one.union(other)

        def same_file() -> bool:
            return at_own.same_file() and offered.same_file()

        return replace(at_own, frame=frame, query=offered.query, same_file=same_file, reading=readings[0], states=2)

    def comes_back(self, ledger: Ledger, lakes: Sequence[str], source: str) -> bool:
        """Return whether the old store gets all that is written to the new one.

        Args:
            ledger: The migration's ledger.
            lakes: The lakes that are compared and follow the new store.
            source: The source table, for the message.

        Returns:
            Whether the reverse path is whole.

        Raises:
            CouldNotCheck: A lake gets more than the old store, and so has nothing beside it.
        """
        lacking = reverse.whole(ledger)
        if lacking is None:
            return True
        if lakes and reverse.carried(reverse.recorded(ledger), self.changes) & {held.epoch for held in epochs.shares(self.changes)}:
            problem = f"the lake follows the new store, and the old store, which it is held against, does not: {lacking}"
            raise CouldNotCheck(source, problem)
        return False

    def require_unmoved(self, ledger: Ledger, source: str) -> None:
        """Raise CouldNotCheck where authority has moved since it was looked up; it can't while the leases are held.

        Args:
            ledger: The migration's ledger.
            source: The source table, for the message.

        Raises:
            CouldNotCheck: Authority has moved.
        """
        if ledger.authorities() != self.changes:
            raise CouldNotCheck(source, "authority moved while the verification began: run it again")

    def require_reverse(self, ledger: Ledger, source: str) -> None:
        """Raise CouldNotCheck where the old store does not get what is written to the new one, while it gets some itself.

        Args:
            ledger: The migration's ledger.
            source: The source table, for the message.

        Raises:
            CouldNotCheck: The reverse path does not follow.
        """
        gone = epochs.at(self.changes, NEW)
        if gone is not None and (lacking := reverse.whole(ledger)) is not None:
            problem = f"{describe(gone)}: the new store has authority, and the old one, held against it, does not follow"
            raise CouldNotCheck(source, f"{problem}: {lacking}")
