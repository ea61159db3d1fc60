"""The drain: what a fence waits for, so that the gaining store has everything which the losing one was ever written.

Before the pause it draws near, while writers go on. In the pause the losing store refuses, and all
below its position at that moment must reach the other one. Its stream brings it. On a rollback
whose stream is not whole, only mirrors of routers may. Everything runs where `changeover flags` runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from ldclient.migrations.types import Origin

from changeover.errors import FenceCalledOff, TableStopped
from changeover.flags.fence.endpoints import position
from changeover.flags.fence.handover import Handover, Pause
from changeover.flags.observed import observations
from changeover.flags.readiness import mirrors
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW, OLD_STORE
from changeover.jobs.reverse import path as reverse
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import spool_of
from changeover.jobs.transform.tenancy import flag_of
from changeover.position import format_lsn
from changeover.session import one_row
from changeover.spec import Spec
from changeover.stores.base.statements import Move
from changeover.stores.postgres import refusal

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often to ask meanwhile whether the stream is still whole."""


def hand_over(handover: Handover, pause: Pause, go_on: Callable[[], None], lacking: str | None) -> tuple[int, int]:
    """Have the old store refuse, drain, and wait until the new one has everything; return where both stores' logs were then.

    `go_on` gives replay its lease.
    """
    spec, ledger = handover.spec, handover.ledger
    written = _frozen(handover, pause)
    spool = spool_of(spec, ledger.stream("fence").epoch)
    pause.wait(lambda: None if spool.end() >= written else "capture to spool the last writes")
    assumptions.require(Moment.FENCE, Asked(spec, handover.old.connection, ledger))
    pause.make(Move.COMPARE)
    go_on()
    pause.wait(lambda: _behind(spec, ledger, written))
    pause.make(Move.AWAIT)
    return written, position(spec, handover.new)


def hand_back(handover: Handover, pause: Pause, go_on: Callable[[], None], lacking: str | None) -> tuple[int, int]:
    """Have the new store refuse, drain, and wait until the old one has everything; return where both stores' logs were then.

    Where there is no whole reverse path, that is what routers that mirror have brought, as each says after the refusal.
    """
    spec, ledger = handover.spec, handover.ledger
    written = _frozen(handover, pause)
    if lacking is None and (gap := reverse_setup.gap_in(spec, ledger, handover.new.connection)):
        raise FenceCalledOff(pause.seconds, f"a whole stream: {gap}")
    pause.make(Move.COMPARE)
    if lacking is None:
        spool = reverse.spool_of(spec)
        pause.wait(lambda: None if spool.end() >= written else "capture to spool the new store's last writes")
        go_on()
        pause.wait(lambda: _not_back(ledger, written, pause))
    else:
        log.warning("back without the stream, and %s: %s", spec.without_stream, lacking)
        now, epochs = ledger.now(), observations(handover.before).epochs(Origin.NEW, handover.names)
        pause.wait(lambda: unmirrored(ledger, now, epochs))
    pause.make(Move.AWAIT)
    return position(spec, handover.old), written


def draw_near(handover: Handover, seconds: float) -> str | None:
    """Wait, before the pause, until the gaining store has what the losing one holds now; return why it will not have it all.

    Writers go on meanwhile, and the first batch of a replay that has just begun is no part of their pause. Raises FenceCalledOff
    where replay does not come near, and what a watch of capture raises where it can't: the stream is not whole any more.
    """
    spec, ledger, back = handover.spec, handover.ledger, handover.to is Origin.OLD
    if back and (lacking := reverse_setup.lacking(spec, ledger)):
        return lacking
    written, deadline = position(spec, handover.losing), time.monotonic() + seconds
    emit_marker(handover.losing.connection, "fence ahead")
    look_at = time.monotonic() + LOOK_SECONDS
    while waiting := _not_back(ledger, written) if back else _behind(spec, ledger, written):
        if time.monotonic() > look_at:
            if not back:  # capture may have ended over it
                assumptions.require(Moment.WATCH, Asked(spec, handover.old.connection, ledger))
            elif lacking := reverse_setup.lacking(spec, ledger):
                return lacking
            look_at = time.monotonic() + LOOK_SECONDS
        if time.monotonic() > deadline:
            raise FenceCalledOff(seconds, f"{waiting}, before anybody is held up")
        time.sleep(0.1)
    return None


def _frozen(handover: Handover, pause: Pause) -> int:
    """Have a store refuse and drain; return its position then, behind which a marker hurries its stream on."""
    losing = handover.losing
    if waiting := losing.freeze(handover.before, refusal.TenantEpoch(handover.epoch, handover.moving), pause.deadline):
        raise FenceCalledOff(pause.seconds, f"the lock on {waiting}")
    pause.make(Move.FREEZE)
    written = position(handover.spec, losing)
    emit_marker(losing.connection, f"fence {handover.epoch}")
    pause.make(Move.POSITION)
    return written


def _not_back(ledger: Ledger, position: int, pause: Pause | None = None) -> str | None:
    """Return what is missing in the old store; in a pause what stands in the way ends the wait: the next try goes without it."""
    late = [load for load in ledger.loads(NEW) if load.target == OLD_STORE and load.applied < position]
    for load in late:
        if load.stopped and pause is not None:
            raise FenceCalledOff(pause.seconds, f"{load.source} to come back to the old store, which stands still: {load.stopped}")
    return f"replay to bring {late[0].source} back to the old store, up to {format_lsn(position)}" if late else None


def _behind(spec: Spec, ledger: Ledger, position: int) -> str | None:
    """Return which table the gaining store lacks changes of; raises TableStopped for one that never will."""
    for source, why in ledger.stopped().items():
        raise TableStopped(source, why)
    target = flag_of(spec).target
    late = [load for load in ledger.loads() if load.target == target and load.applied < position]
    return f"replay to reach {format_lsn(position)} in {late[0].target}" if late else None


def unmirrored(ledger: Ledger, since: object, epochs: Collection[int]) -> str | None:
    """On a rollback the routers' mirrors must have nothing more of what goes back, as each says after the refusal.

    What they still have of other tenants, which go on, is of other epochs.
    """
    row = one_row(ledger.connection.execute("SELECT now() - interval '10 seconds'"))
    for beat in ledger.heartbeats():
        if beat.at < row[0]:
            continue  # not alive: its queue died with it, and what it lost is in its last counters
        if beat.at <= since:  # type: ignore[operator]
            return f"process {beat.process} to say that its mirror is empty"
        for mirror in mirrors(beat, Origin.OLD):
            if any(mirror.get("queued", {}).get(str(epoch)) for epoch in epochs):
                return f"the mirror of process {beat.process}"
    return None
