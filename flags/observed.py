"""Observed authority: which store has authority over which rows, worked out of the moves on record.

Each tenant has a fact of its own once it has moved by name, and all others share one. What is worked out here in one pass over the
moves is what `epochs.tenures` says of each tenant; nothing else decides where a write goes. Everything is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ldclient.migrations.types import Origin

from changeover.jobs.ledger.epochs import EVERYTHING
from changeover.jobs.ledger.records import Authority


@dataclass(frozen=True)
class Fact:
    """Who has authority, since which epoch."""

    epoch: int
    store: Origin

    def after(self, move: Authority) -> Fact:
        """Return what holds after a move of these rows: those that are there already have nothing to do."""
        return Fact(move.epoch, Origin(move.store)) if move.anew or self.store.value != move.store else self


BEGINNING = Fact(0, Origin.OLD)


@dataclass(frozen=True)
class Facts:
    """Who has authority over what: `named` are the tenants that are not as all the others; `epoch` is that of the newest move."""

    epoch: int = 0
    rest: Fact = BEGINNING
    named: Mapping[str, Fact] = field(default_factory=dict)

    def of(self, tenant: str) -> Fact:
        """Return the fact of a tenant's rows, or of all that have not moved by name."""
        return self.named.get(tenant, self.rest)

    def epochs(self, store: Origin, tenants: Collection[str] | None = None) -> frozenset[int]:
        """Return the epochs under which a store has authority now over some tenants, or over anything."""
        held = [self.rest, *self.named.values()] if tenants is None else map(self.of, tenants)
        return frozenset(fact.epoch for fact in held if fact.store is store)

    @property
    def stores(self) -> frozenset[Origin]:
        """Return the stores that have authority over anything: two while tenants stand apart."""
        return frozenset(fact.store for fact in (self.rest, *self.named.values()))

    @property
    def apart(self) -> dict[str, Fact]:
        """Return the tenants that are at another store than all the others."""
        return {name: fact for name, fact in self.named.items() if fact.store is not self.rest.store}


def facts(moves: Iterable[Authority], before: Facts | None = None) -> Facts:
    """Return what holds after moves, first to last: all that are on record, or those that came since what held `before`."""
    start = before or Facts()
    epoch, rest, named = start.epoch, start.rest, dict(start.named)
    for move in moves:
        epoch = move.epoch
        if move.tenants is None:
            rest = rest.after(move)
            named = {name: after for name, fact in named.items() if (after := fact.after(move)) != rest}
        else:
            named.update({name: named.get(name, rest).after(move) for name in move.tenants if name != EVERYTHING})
    return Facts(epoch, rest, named)
