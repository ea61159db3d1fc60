"""Observed authority: which store has authority over which rows, worked out of the moves on record.

Each tenant has an observed stage of its own once it has moved by name, and all others share one.
What is worked out here in one pass over the moves is what `epochs.authority_epochs` says of each
tenant; nothing else decides where a write goes. Everything is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ldclient.migrations.types import Origin

from changeover.jobs.ledger.epochs import EVERYTHING
from changeover.jobs.ledger.records import Authority


@dataclass(frozen=True)
class Observation:
    """Who has authority, since which epoch."""

    epoch: int
    store: Origin

    def after(self, move: Authority) -> Observation:
        """Return what holds after a move of these rows: those that are there already have nothing to do.

        Args:
            move: A move of authority over these rows.

        Returns:
            The observation after it, which is this one where nothing moved.
        """
        return Observation(move.epoch, Origin(move.store)) if move.anew or self.store.value != move.store else self


BEGINNING = Observation(0, Origin.OLD)


@dataclass(frozen=True)
class Observations:
    """Who has authority over what: `named` are the tenants that are not as all the others; `epoch` is that of the newest move."""

    epoch: int = 0
    rest: Observation = BEGINNING
    named: Mapping[str, Observation] = field(default_factory=dict)

    def of(self, tenant: str) -> Observation:
        """Return the observed authority of a tenant's rows, or of all that have not moved by name.

        Args:
            tenant: The tenant's key as text.

        Returns:
            Who has authority, and since which epoch.
        """
        return self.named.get(tenant, self.rest)

    def epochs(self, store: Origin, tenants: Collection[str] | None = None) -> frozenset[int]:
        """Return the epochs under which a store has authority now over some tenants, or over anything.

        Args:
            store: The store.
            tenants: The tenants' keys as texts; None is everything.

        Returns:
            The epochs, none where the store has no authority there.
        """
        held = [self.rest, *self.named.values()] if tenants is None else map(self.of, tenants)
        return frozenset(observation.epoch for observation in held if observation.store is store)

    @property
    def stores(self) -> frozenset[Origin]:
        """Return the stores that have authority over anything: two while tenants stand apart."""
        return frozenset(observation.store for observation in (self.rest, *self.named.values()))

    @property
    def apart(self) -> dict[str, Observation]:
        """Return the tenants that are at another store than all the others."""
        return {name: observation for name, observation in self.named.items() if observation.store is not self.rest.store}


def observations(moves: Iterable[Authority], before: Observations | None = None) -> Observations:
    """Return what holds after moves, first to last: all that are on record, or those that came since what held `before`.

    Args:
        moves: The moves as the ledger has them, first to last.
        before: What held before them; None where they are all on record.

    Returns:
        What holds now, for the rest and by name.
    """
    start = before or Observations()
    epoch, rest, named = start.epoch, start.rest, dict(start.named)
    for move in moves:
        epoch = move.epoch
        if move.tenants is None:
            rest = rest.after(move)
            named = {name: after for name, observation in named.items() if (after := observation.after(move)) != rest}
        else:
            named.update({name: named.get(name, rest).after(move) for name in move.tenants if name != EVERYTHING})
    return Observations(epoch, rest, named)
