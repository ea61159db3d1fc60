"""The two endpoints of a fence: each store's session and tables, what it refuses, and where its log is.

What a store refuses follows from the authority log: all rows over which it has no authority. Where
tenants move one by one, the store that takes over refuses from the first fence on what it has not
got yet. While all rows move at once it has nothing to refuse before. Everything runs where
`changeover flags` runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ldclient.migrations.types import Origin

from changeover.jobs.ledger.epochs import shares
from changeover.jobs.ledger.records import Authority
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.catalog import source_table
from changeover.jobs.source.changes import change_source
from changeover.jobs.transform import tenancy
from changeover.names import joined
from changeover.position import epoch_floor
from changeover.session import Connection, application_name, connect, server_name, wal_position
from changeover.spec import Spec, Table
from changeover.stores.postgres import gate, refusal, tenantfloor
from changeover.stores.postgres.refusal import Refusal, TenantEpoch


@dataclass(frozen=True)
class FencedTable:
    """A table as one store has it: its key there, and the column that holds a row's tenant, where tenants move one by one."""

    schema: str
    name: str
    key: tuple[str, ...]
    tenant: str | None

    @property
    def gated(self) -> gate.GatedTable:
        """Return the table behind its gate."""
        return gate.GatedTable(self.schema, self.name, self.key, ())


@dataclass(frozen=True)
class FencedStore:
    """One store at a fence."""

    store: Origin
    dsn: str
    connection: Connection
    tables: tuple[FencedTable, ...]

    def refused(self, changes: Sequence[Authority]) -> tuple[TenantEpoch, ...]:
        """Return what this store has no authority over."""
        return tuple(
            TenantEpoch(held.epoch, tenants) for held, tenants in shares(changes).items() if held.store != self.store.value
        )

    def freeze(self, changes: Sequence[Authority], begun: TenantEpoch | None, deadline: float) -> str | None:
        """Refuse what this store has no authority over, and what is begun up to the deadline; return a table that is not granted.

        None says that no transaction is alive any more that could write such rows.
        """
        for table in self.tables:
            what = Refusal(self.refused(changes) if table.tenant else (), begun, table.tenant)
            if not refusal.install(self.connection, table.schema, table.name, what, deadline):
                return joined(table.schema, table.name)
        return None

    def settle(self, changes: Sequence[Authority]) -> None:
        """Refuse what this store has no authority over, for good, and nothing else; safe to repeat."""
        for table in self.tables:
            what = Refusal(self.refused(changes), None, table.tenant)
            if what.standing or (table.tenant and changes):
                refusal.replace(self.connection, table.schema, table.name, what)
            else:
                refusal.remove(self.connection, table.schema, table.name)

    def raise_floors(self, changes: Sequence[Authority]) -> None:
        """Take nothing through the gates any more of an epoch before a row's present one; safe to repeat."""
        for table in self.tables:
            if not changes or not gate.installed(self.connection, table.gated):
                continue
            if table.tenant is None:
                gate.raise_floor(self.connection, table.gated, epoch_floor(changes[-1].epoch))
            else:
                tenantfloor.put(self.connection, table.gated, table.tenant, _floors(changes))

    def install_floors(self, changes: Sequence[Authority]) -> None:
        """Have the gates ask for the floors of tenants, where they move one by one; it waits for gated statements."""
        for table in self.tables:
            if table.tenant is not None:
                tenantfloor.install(self.connection, table.gated, table.tenant, _floors(changes), server_name(self.dsn))


def _floors(changes: Sequence[Authority]) -> list[TenantEpoch]:
    return [TenantEpoch(held.epoch, tenants) for held, tenants in shares(changes).items()]


@contextmanager
def fenced_stores(spec: Spec) -> Iterator[tuple[FencedStore, FencedStore]]:
    """Open a session with either store: (old, new)."""
    old_dsn, new_dsn = spec.source.dsn.resolve(), reverse.new_dsn(spec)
    name = application_name(spec.name, "fence")
    with connect(old_dsn, name) as old, connect(new_dsn, name) as new:
        yield (
            FencedStore(Origin.OLD, old_dsn, old, tuple(_old_table(spec, old, t) for t in spec.tables)),
            FencedStore(Origin.NEW, new_dsn, new, tuple(_new_table(spec, t) for t in spec.tables)),
        )


def _new_table(spec: Spec, table: Table) -> FencedTable:
    return FencedTable(*table.target_name, table.key, tenancy.new_column(spec, table))


def _old_table(spec: Spec, old: Connection, table: Table) -> FencedTable:
    source = source_table(old, table)
    return FencedTable(*table.source_name, source.identity if source else (), tenancy.old_column(spec))


def position(spec: Spec, side: FencedStore) -> int:
    """Return where a store's log is now: below it stands what is visible, at it or above what commits later."""
    return change_source(spec).position("fence", side.connection) if side.store is Origin.OLD else wal_position(side.connection)
