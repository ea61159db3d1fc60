"""The gate's rule as pure functions: what is taken, what a batch of offers does to a cell, and what moves a table's floor.

The stores state the same rules in their own language (`stores.postgres.gate` in SQL, `stores.delta.store` as a MERGE condition);
tests hold them against these, and the model checker runs these. Nothing here touches a store. Each table has one floor, first v0,
never lowered; a key without a cell has the floor's version.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from changeover.position import DUAL_WRITE_ORDINAL, Version


class Cell(NamedTuple):
    """What a target holds for one key: a version, and the row's image, or None for a tombstone."""

    version: Version
    image: object | None


def applies(offered: Version, cell: Version | None, floor: Version) -> bool:
    """Return whether a change is taken: above the floor, and above the cell where there is one."""
    return offered > floor and (cell is None or offered > cell)


def image_applies(cell: Version | None, floor: Version, image: Version) -> bool:
    """Return whether a backfill image is taken: only where no cell is, and only while the floor is v0."""
    return cell is None and floor == image


def merged(cell: Cell | None, offers: Iterable[Cell], floor: Version) -> Cell | None:
    """Return the cell after all offers: the maximum by version, whatever their order, number or batches."""
    for offer in offers:
        if applies(offer.version, cell.version if cell else None, floor):
            cell = offer
    return cell


def truncated_floor(at: Version) -> Version:
    """Return the floor that a TRUNCATE raises: right below its own version, at which the deletes that follow are offered."""
    return at._replace(ordinal=at.ordinal - 1)


def collectable(closed: bool, applied: int, upto: Version) -> bool:
    """Return whether row versions up to a version may go: the table is swept, and every event up to there was offered.

    Before the sweep images are pending, which the raised floor would refuse. `applied` says that every event with a smaller
    commit LSN was offered. Time is no reason: a change may come late by any time.
    """
    return closed and upto < caught_up_floor(upto.epoch, applied)


def collection_bound(epoch: int, applied: int) -> Version:
    """Return the highest version up to which `collectable` allows collection where a position is reached."""
    return caught_up_floor(epoch, applied)._replace(ordinal=DUAL_WRITE_ORDINAL - 1)


def collected(cell: Version, upto: Version) -> bool:
    """Return whether collection up to a version removes a row version: the floor then answers for its key."""
    return cell <= upto


def caught_up_floor(epoch: int, applied: int) -> Version:
    """Return the floor of a table where every event below a position was applied in order and nothing else is under way.

    No event of the stream has exactly this version, and every later one lies above it. A batch that
    raises the floor to it in its own transaction has recorded its position. It needs no version per
    key (`stores.base.statements.CATCH_UP`).
    """
    return Version(epoch, applied, DUAL_WRITE_ORDINAL)


class Unsent(Enum):
    """The one mark that stands for a value that the stream left out."""

    UNSENT = "unsent"

    def __repr__(self) -> str:
        return "unsent"


UNSENT = Unsent.UNSENT

Key = Hashable
Image = tuple[Hashable, ...]
"""A row's values in the table's order of columns."""


class KeyChange(NamedTuple):
    """An offer to one key: an image, or None for a delete; `old_key` is what a put's row was called before, if it has a new key."""

    key: Key
    version: Version
    image: Image | None
    old_key: Key | None = None


def apart(version: Version, key: Key, image: Image | None, old_key: Key | None = None) -> tuple[KeyChange, ...]:
    """Return what an insert, update or delete offers, by target keys; `version` has the event's even ordinal.

    The two changes of a key change have ordinals of their own, since old and new key may be one and the same in the target.
    """
    if old_key is None:
        return (KeyChange(key, version, image),)
    put = KeyChange(key, version._replace(ordinal=version.ordinal + 1), image, old_key)
    return KeyChange(old_key, version, None), put


def after_truncate(changes: Iterable[KeyChange], at: Version | None) -> list[KeyChange]:
    """Return the changes that the last TRUNCATE of a batch leaves to be offered: those before it have nothing to say any more."""
    return [change for change in changes if at is None or change.version > at]


def filled(image: Image, row: Image) -> Image:
    """Return an image whose unsent values, and only those, are another row's."""
    return tuple(value if sent is UNSENT else sent for sent, value in zip(image, row, strict=True))


def completed(changes: Iterable[KeyChange], rows: Mapping[Key, Image]) -> list[KeyChange]:
    """Return the changes with whole images; `rows` are the source's, in a snapshot that shows all of the changes.

    A row that is gone by then is deleted later in the stream, so its put is left out.
    """
    whole = []
    for change in changes:
        if change.image is None or UNSENT not in change.image:
            whole.append(change)
        elif (row := rows.get(change.key)) is not None:
            whole.append(change._replace(image=filled(change.image, row)))
    return whole


def last_of_each_key(changes: Iterable[KeyChange]) -> list[KeyChange]:
    """Return one change a key, the one with the highest version: a cell is the maximum of what it is offered."""
    return list({change.key: change for change in sorted(changes, key=lambda one: one.version)}.values())
