"""Floors: which one stands for a position of the stream, and up to which versions rows' versions may go, as pure functions.

The model checker runs these. Nothing here touches a store.
"""

from __future__ import annotations

from changeover.position import DUAL_WRITE_ORDINAL, Version


def collectable(closed: bool, applied: int, upto: Version) -> bool:
    """Return whether row versions up to a version may go: the table is swept, and every event up to there was offered.

    Before the sweep images are pending, which the raised floor would refuse. `applied` says that every event with a smaller
    commit LSN was offered. Time is no reason: a change may come late by any time.
    """
    return closed and upto < caught_up_floor(upto.epoch, applied)


def collection_bound(epoch: int, applied: int) -> Version:
    """Return the highest version up to which `collectable` allows collection where a position is reached."""
    return caught_up_floor(epoch, applied)._replace(ordinal=DUAL_WRITE_ORDINAL - 1)


def caught_up_floor(epoch: int, applied: int) -> Version:
    """Return the floor of a table where every event below a position was applied in order and nothing else is under way.

    No event of the stream has exactly this version, and every later one lies above it. A batch that
    raises the floor to it in its own transaction has recorded its position. It needs no version per
    key (`stores.base.statements.CATCH_UP`).
    """
    return Version(epoch, applied, DUAL_WRITE_ORDINAL)
