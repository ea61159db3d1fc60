"""Rights: whether the application's roles can use the store that takes over, asked of the server and tried where it does no harm.

Every privilege of each role is asked for. In the new store that is the table, its columns, its
sequences and their schemas. In the old store it is the table, for what is mirrored back. In both it
is what of ours a router touches. Where our role may become the application's one row is written
besides, and undone. It says which of the two was done. Runs where `changeover flags` runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from changeover.jobs.access import holders, privileges
from changeover.jobs.access.grants import Lack
from changeover.jobs.access.trial import Tried, trial
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.catalog import SourceTable, source_table
from changeover.jobs.transform.derivation import derivations
from changeover.session import Connection, application_name, connect
from changeover.spec import Spec, Table
from changeover.stores.postgres import gate
from changeover.stores.tables import defaults

UNNAMED = "no [application] roles stand in the spec, so nobody asked whether the application may write to the new store"


@dataclass(frozen=True)
class Rights:
    """What stands against the application in the store that takes over, and what was done to find out."""

    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stores:
    """The sessions by which rights are asked for, and the roles that each server has."""

    spec: Spec
    old: Connection
    new: Connection
    in_old: list[str]
    in_new: list[str]


def rights(spec: Spec) -> Rights:
    """Return what stands against the application's roles before the new store takes over (driver)."""
    if not spec.roles:
        return Rights(notes=[UNNAMED])
    answer, name = Rights(), application_name(spec.name, "readiness")
    with ExitStack() as stack:
        old = stack.enter_context(connect(spec.source.dsn.resolve(), name))
        new = stack.enter_context(connect(reverse.new_dsn(spec), name))
        stores = Stores(spec, old, new, privileges.present(old, spec.roles), privileges.present(new, spec.roles))
        if not stores.in_new:
            answer.reasons.append(f"the new store has none of the application's roles ({', '.join(spec.roles)}): create them")
        for role in stores.in_new:
            answer.reasons.extend(f"new store: {lack}" for lack in privileges.lacking(new, privileges.of_ledger(role)))
        for table in spec.tables:
            if (source := source_table(old, table)) is not None:
                for role in stores.in_new:
                    _ask(stores, table, source, role, answer)
    return answer


def _ask(stores: Stores, table: Table, source: SourceTable, role: str, answer: Rights) -> None:
    """Ask for every privilege of a role on one table, and have it write a row where that can be."""
    carried = {
        name: column.origin for name, column in derivations(table, source.store_columns).items() if column.origin is not None
    }
    known = role in stores.in_old
    used = privileges.uses(stores.old, role, *table.source_name) if known else privileges.FULL
    lacks = [f"new store: {lack}" for lack in _new(stores, table, role, used, carried)]
    mirrors = known and stores.spec.mirrors
    lacks += [f"old store: {lack}" for lack in (_old(stores.old, table, source, role, used) if mirrors else ())]
    answer.reasons.extend(lacks)
    own_old, own_new = defaults.of_table(stores.old, *table.source_name), defaults.of_table(stores.new, *table.target_name)
    if not set(privileges.USES[:4]) <= used.whole:
        answer.notes.append(f"{role} in the new store: asked, and not tried: it does not do everything to {source.source}")
        return
    fills = {name for name, origin in carried.items() if own_old[origin].filled}
    left_out = fills | {name for name, own in own_new.items() if own.filled and name not in carried}
    trial_run = trial(stores.new, role, Tried(*table.target_name, own_new, table.key, left_out))
    if trial_run.failure is not None:
        answer.reasons.append(
            f"new store: the role {role} can't write to {table.target} as it does to {source.source}: {trial_run.failure}"
        )
    how = f"asked, not tried: {trial_run.untried}"
    if trial_run.untried is None:
        how = "tried: a row inserted, updated, deleted and rolled back"
    answer.notes.append(f"{role} on {table.target} in the new store: {how}")


def _new(stores: Stores, table: Table, role: str, used: privileges.Uses, carried: dict[str, str]) -> Iterator[Lack]:
    new, gated = stores.new, gate.GatedTable(*table.target_name, table.key, ())
    yield from privileges.lacking(new, privileges.of_table(new, role, *table.target_name, used, carried))
    if stores.spec.mirrors and used.writes and gate.installed(new, gated):
        yield from privileges.lacking(new, privileges.of_gate(role, gated))


def _old(old: Connection, table: Table, source: SourceTable, role: str, used: privileges.Uses) -> Iterator[Lack]:
    """The old store's gate is not there before the first fence, which lets the roles pass it."""
    gated = gate.GatedTable(*table.source_name, source.identity, ())
    yield from privileges.lacking(old, privileges.of_mirror(role, *table.source_name, used))
    if used.writes and gate.installed(old, gated):
        yield from privileges.lacking(old, privileges.of_gate(role, gated))


def held_up_by(losing: Connection, tables: list[tuple[str, str]], new: Connection | None) -> list[str]:
    """Return the long transactions that a fence will wait for: for its lock, and for a slot where a reverse path may be opened.

    Args:
        losing: A session with the store that loses authority.
        tables: Its tables, as (schema, name).
        new: A session with the new store where a reverse path may be opened, else None.

    Returns:
        A sentence for each transaction.
    """
    waits = [f"the fence waits for {holder}" for holder in holders.of_tables(losing, tables)]
    later = holders.of_slot(new) if new is not None else []
    return waits + [f"the reverse path waits for {holder}, on the new store's server" for holder in later]


def waits(spec: Spec) -> list[str]:
    """Return the long transactions that the fence to the new store would wait for now (driver).

    Args:
        spec: The migration's spec.

    Returns:
        A sentence for each transaction.

    Raises:
        ServerUnavailable: A store can't be reached.
        SecretMissing: The environment variable of a DSN is not set.
    """
    name = application_name(spec.name, "readiness")
    with connect(spec.source.dsn.resolve(), name) as old, connect(reverse.new_dsn(spec), name) as new:
        return held_up_by(old, [table.source_name for table in spec.tables], new)
