"""The fence: authority over all rows, or some tenants', moves from one store to the other, enforced by the one that loses it.

The order is the proof. (1) The losing store refuses whatever is not of the new epoch; getting that
trigger's lock has drained every older writing transaction. (2) Only then its position F is read and
a marker emitted. (3) The stream is still the one that was prepared. (4) The gaining store has
everything below F. (5) The ledger says that authority has moved. (6) The gaining store's floor goes
up to the new epoch. It never does before: a fence that is called off would leave a floor that
refuses what the losing store still writes. Until (5) the refusal ends by itself at a deadline, so a
fence that dies lets the writers go on. A handover that takes longer than `max_pause` is called off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime

from ldclient.migrations.types import Origin
from psycopg import sql

from changeover import failpoints
from changeover.errors import FenceCalledOff, Refused, TableStopped
from changeover.flags.fence.drain import draw_near, hand_back, hand_over
from changeover.flags.fence.endpoints import FencedStore, fenced_stores
from changeover.flags.fence.handover import Handover, Pause, advance_sequences, pass_the_others
from changeover.flags.rights import held_up_by
from changeover.jobs.access import privileges
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.lease import LEASE_SECONDS, lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import OLD_STORE, Authority
from changeover.jobs.preflight.division import indivisible
from changeover.jobs.reverse import path as reverse
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.transform.tenancy import flag_of
from changeover.position import epoch_floor, format_lsn
from changeover.spec import Spec
from changeover.stores.base.statements import Move
from changeover.stores.postgres import gate

log = logging.getLogger(__name__)

MAX_PAUSE = 10.0
"""Seconds after which a fence is called off and writers go on where they were."""

NEAR = 6.0
"""How many times the pause's limit the gaining store may take to come near the losing one, before writers are held up at all."""

PERMANENT_SECONDS = 1.0
"""What must be left of the pause when the refusal is made permanent: the deadline may not pass in between."""

MOST_TENANTS = 10_000
"""How many tenants a move may name: the losing store compares each row that is written with all of them."""


@dataclass(frozen=True)
class Fenced:
    """A fence that was done: the new epoch, the store that has authority, and how long writers waited at most.

    `lacking` is why, on a rollback, the old store got no more than the mirror brought; None where it got everything.
    """

    epoch: int
    store: str
    from_lsn: int
    pause_seconds: float
    lacking: str | None = None


def fence(spec: Spec, to: Origin, *, max_pause: float = MAX_PAUSE, tenants: Collection[str] | None = None) -> Fenced:
    """Move authority to a store, over all rows that it has none over yet, or those of some tenants (driver).

    Capture and replay must be running.

    Args:
        spec: The migration's spec.
        to: The store that gets authority.
        max_pause: For how many seconds writers may be held up.
        tenants: The tenants that move; None moves all rows that it has no authority over.

    Returns:
        The new epoch, the store, from which LSN in bytes, and the pause in seconds.

    Raises:
        FenceCalledOff: It took longer than `max_pause`; writers are back where they were.
        TableStopped: A table is stopped, so nothing moves to the new store.
        SlotBlocked: Open transactions keep the reverse path's slot from being made; nothing was
            held up.
        Refused: Tenants can't move one by one here.
        LeaseHeld: Another fence is under way.
    """
    _require_nameable(spec, to, tenants)
    with Ledger.open(spec, "fence") as ledger, ledger.lease("fence"), ExitStack() as held:
        before = ledger.authorities()
        moving = epochs.moving(before, to.value, tenants)
        if moving is not None:
            _name_holders(spec, to)
        if to is Origin.NEW and moving is not None:
            for source, why in ledger.stopped().items():
                raise TableStopped(source, why)
        if to is Origin.NEW and moving is not None:
            path = reverse_setup.open_path(
                spec, ledger
            )  # which waits for open transactions, so it comes before anybody else has to
            if path is None and tenants is not None:
                raise Refused("no tenant moves alone without reverse replication: `changeover check` says what stands in it")
        held.enter_context(_others_rest(spec, ledger))
        old, new = held.enter_context(fenced_stores(spec))
        if moving is None:
            _finish(new if to is Origin.NEW else old, old, new, before)
            present = next((row for row in reversed(before) if row.store == to.value), ledger.authority())
            return Fenced(present.epoch, to.value, present.from_lsn, present.pause_seconds or 0.0)
        names = frozenset(tenants) if tenants is not None else None
        epoch = max((row.epoch for row in before), default=0) + 1
        return _move(Handover(spec, ledger, to, epoch, moving, names, before, old, new), max_pause)


def _name_holders(spec: Spec, to: Origin) -> None:
    """Say which long transactions everything that follows will wait for, so that somebody can end them."""
    with fenced_stores(spec) as (old, new):
        losing = old if to is Origin.NEW else new
        tables = [(table.schema, table.name) for table in losing.tables]
        for reason in held_up_by(losing.connection, tables, new.connection if to is Origin.NEW else None):
            log.warning("%s", reason)


def _require_nameable(spec: Spec, to: Origin, tenants: Collection[str] | None) -> None:
    if tenants is None:
        return
    if spec.flag is None or spec.flag.context is None:
        raise Refused("tenants move one by one where the spec names `flag.context`, the column that holds them")
    if not tenants or not all(tenants):
        raise Refused("a tenant's name is empty: those without a name move with all rows")
    if len(tenants) > MOST_TENANTS:
        raise Refused(f"{len(tenants):,} tenants are more than {MOST_TENANTS:,} at once: every write compares itself with them")
    if to is Origin.NEW and (why := indivisible(spec)):
        raise Refused(f"no tenant moves alone: {why[0]}")


def _move(handover: Handover, max_pause: float) -> Fenced:
    """Make the moves in their order."""
    ledger, to = handover.ledger, handover.to
    lacking = draw_near(handover, NEAR * max_pause)
    _prepare_gates(handover, NEAR * max_pause)
    with _replay_held(handover) as switch:
        pause = Pause(time.monotonic(), max_pause)
        try:
            places = (hand_over if to is Origin.NEW else hand_back)(handover, pause, switch.close, lacking)
            pass_the_others(handover)
            _make_final(handover, pause)
            failpoints.reach("fence-final")
            made = Authority(handover.epoch, to.value, places[0], datetime.min, pause.seconds, places[1], handover.names)
            _record(handover, made, lacking)
            pause.make(Move.RECORD)
        except BaseException:
            _call_off(handover)
            raise
    _finish(handover.gaining, handover.old, handover.new, ledger.authorities())
    pause.make(Move.RAISE_FLOOR)
    log.info(
        "epoch %s: the %s store has authority over %s from %s, after %.3f s", handover.epoch, to.value,
        "all rows" if handover.names is None else f"{len(handover.names)} tenants", format_lsn(places[0]), pause.seconds,
    )  # fmt: skip
    return Fenced(handover.epoch, to.value, places[0], pause.seconds, lacking)


def settle(spec: Spec) -> None:
    """Do what a fence that was killed may have left: the store that has authority takes writes, behind its floor (driver).

    Args:
        spec: The migration's spec.

    Raises:
        ServerUnavailable: A store or the ledger can't be reached.
        LeaseHeld: Another fence is under way.
    """
    with Ledger.open(spec, "fence") as ledger, ledger.lease("fence"), fenced_stores(spec) as (old, new):
        _finish(new if ledger.authority().store == Origin.NEW.value else old, old, new, ledger.authorities())


def _finish(gaining: FencedStore, old: FencedStore, new: FencedStore, changes: Sequence[Authority]) -> None:
    """Raise the floors of what has authority on record, and let it write; safe to repeat."""
    apart = any(table.tenant for table in gaining.tables)
    for side in (gaining, *(store for store in (old, new) if apart and store is not gaining)):
        side.raise_floors(changes)
        side.settle(changes)


def _call_off(handover: Handover) -> None:
    """Give the writers back, unless the ledger holds the new epoch after all: its own word may have been lost on the way.

    Where the ledger can't be asked the refusal stays as it is: two stores that take writes would be worse than none.
    """
    with Ledger.open(handover.spec, "fence") as again:
        if all(row.epoch < handover.epoch for row in again.authorities()):
            handover.losing.settle(handover.before)


@contextmanager
def _replay_held(handover: Handover) -> Iterator[ExitStack]:
    """Hold replay's lease on the gaining store until it is closed.

    The very next batch then begins with all that was written before the fence. A batch under way would make writers wait for it
    and then for the next one.
    """
    with ExitStack() as switch:
        target = flag_of(handover.spec).target if handover.to is Origin.NEW else OLD_STORE
        switch.enter_context(handover.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
        yield switch


def _make_final(handover: Handover, pause: Pause) -> None:
    """Take the deadline off the losing store's refusal."""
    if pause.deadline - time.monotonic() < PERMANENT_SECONDS:
        raise FenceCalledOff(pause.seconds, "the last step, which the deadline left no time for")
    after = Authority(handover.epoch, handover.to.value, 0, datetime.min, pause.seconds, 0, handover.names)
    handover.losing.settle([*handover.before, after])


def _prepare_gates(handover: Handover, seconds: float) -> None:
    """Before the pause: the losing store, mirrored to from now on, gets its gate; the gaining one statistics and sequences.

    Where tenants move one by one, the gaining store refuses from here on what it has not got.
    """
    losing, gaining = handover.losing, handover.gaining
    for table in losing.tables:
        gate.install_gate(losing.connection, table.schema, table.name, table.key, epoch_floor(0))
        if table.tenant is None:
            gate.raise_floor(losing.connection, table.gated, epoch_floor(handover.epoch))
    _allow(handover)
    for side in (losing, gaining):
        side.install_floors(handover.before)
    apart = any(table.tenant for table in gaining.tables)
    if apart and (waiting := gaining.freeze(handover.before, None, time.monotonic() + seconds)):
        raise FenceCalledOff(seconds, f"the lock on {waiting}, before anybody is held up")
    for table in gaining.tables:
        gaining.connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table.schema, table.name)))
    advance_sequences(gaining)


def _allow(handover: Handover) -> None:
    """Let the application's roles use the ledger and both gates: the losing store's is new, and mirrored to from now on."""
    privileges.allow_ledger(handover.spec, handover.ledger.connection)
    for side in (handover.losing, handover.gaining):
        for table in side.tables:
            privileges.allow_gate(handover.spec, side.connection, table.gated)


@contextmanager
def _others_rest(spec: Spec, ledger: Ledger) -> Iterator[None]:
    """Keep the batches of the other targets out of the pause: they would take the machine from the one that writers wait for."""
    with ExitStack() as held:
        for target in sorted(set(spec.targets) - {flag_of(spec).target}):
            held.enter_context(ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
        yield


def _record(handover: Handover, made: Authority, lacking: str | None) -> None:
    """Record, by one commit, that authority moves, and that the path back is of no use where it did not bring everything."""
    ledger = handover.ledger
    with ledger.connection.transaction():
        ledger.connection.execute(
            "INSERT INTO changeover.authority (migration, epoch, store, from_lsn, pause_seconds, new_lsn, tenants)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [ledger.migration, made.epoch, made.store, format_lsn(made.from_lsn), made.pause_seconds, format_lsn(made.new_lsn),
             None if made.tenants is None else sorted(made.tenants)],
        )  # fmt: skip
        if lacking is not None:
            reverse.break_off(ledger, f"authority went back without it: {lacking}")
            _offer_again(handover)


def _offer_again(handover: Handover) -> None:
    """Have a lake take the old store's stream again from where tenants have left: it learns by the echo what they wrote meanwhile.

    While the others stayed it went on past there. What it took already it refuses a second time.
    """
    begun = max((number for number, row in enumerate(handover.before) if row.anew), default=0)
    left = [row.from_lsn for row in handover.before[begun:] if row.store == Origin.NEW.value]
    handover.ledger.connection.execute(
        "UPDATE changeover.load SET applied = least(applied, %s) WHERE migration = %s AND store = 'old' AND target <> %s",
        [format_lsn(min(left)), handover.spec.name, flag_of(handover.spec).target],
    )
