"""Split authority, as a verification sees it: which stores have some, and what must hold for a comparison to mean anything.

While tenants are at both stores each store is the truth of its own, and what it writes must reach
the other one. Where it does not, the question can't be answered, which is no "equal". Runs on the
driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from changeover.errors import CouldNotCheck
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.jobs.reverse import path as reverse
from changeover.tenants import describe


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
