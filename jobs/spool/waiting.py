"""Waiting for capture: until a spool has reached a position, for as long as capture makes progress.

How fast the machine is decides nothing: a wait ends early only where no capture is alive, or where one that is alive has brought
nothing for a long while. The position was read before a marker was written (`marker`), so an idle store's stream reaches it, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from changeover.errors import CouldNotFinish
from changeover.jobs.ledger.lease import is_held
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.spool.table import Spool
from changeover.position import format_lsn

DEAD_SECONDS = 10.0
"""How long no capture may be alive: one that is started again needs a second."""

STILL_SECONDS = 60.0
"""How long a capture that is alive may bring nothing; it brings parts of what is large."""


def await_spool(
    ledger: Ledger, spool: Spool, position: int, what: str, *, step: str = "capture", enough: Callable[[], bool] = lambda: False
) -> None:
    """Wait until a spool has reached a position, or `enough` is there (driver).

    Args:
        ledger: The migration's ledger, open.
        spool: The spool that is waited for.
        position: The LSN that its end has to reach.
        what: What is waited for, as a part of the error's sentence.
        step: The lease of the capture that fills it.
        enough: Ends the wait sooner.

    Raises:
        CouldNotFinish: No capture is alive, or it makes no progress.
    """
    held, moved, alive = spool.held(), time.monotonic(), time.monotonic()
    while spool.end() < position and not enough():
        now = time.monotonic()
        if (at := spool.held()) != held:
            held, moved = at, now
        if is_held(ledger.connection, ledger.migration, step):
            alive = now
        where = f"it has {what} up to {format_lsn(spool.end())} and not {format_lsn(position)}"
        if now - alive > DEAD_SECONDS:
            raise CouldNotFinish(f"capture is not running: {where}; start `changeover capture SPEC`, then run this again")
        if now - moved > STILL_SECONDS:
            raise CouldNotFinish(f"capture runs and has brought nothing for {STILL_SECONDS:g} s: {where}; its log says why")
        time.sleep(0.05)
