"""Offers: what the events of a batch offer to which key, as pure functions.

Replay says the same of whole tables (`batch.last_of_each_key`, `batch.completed`, `transform.changes`); tests hold it against
these, and the model checker runs these. A key change is a delete of the old key and, half a step later, a put of the new one. A
large value that an UPDATE left alone is not in the stream: it is neither NULL nor the target's, it is the source row's, read in
one snapshot that shows the whole batch. Such a row may be newer than its event, and whatever made it so is later in the stream;
it is never older, so no order among offers is needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from changeover.position import Version


class Unsent(Enum):
    """The one mark that stands for a value that the stream left out."""

    UNSENT = "unsent"

    def __repr__(self) -> str:
        return "unsent"


UNSENT = Unsent.UNSENT

Key = Hashable
Image = tuple[Hashable, ...]
"""A row's values in the table's order of columns."""


class Change(NamedTuple):
    """An offer to one key: an image, or None for a delete; `old_key` is what a put's row was called before, if it has a new key."""

    key: Key
    version: Version
    image: Image | None
    old_key: Key | None = None


def apart(version: Version, key: Key, image: Image | None, old_key: Key | None = None) -> tuple[Change, ...]:
    """Return what an insert, update or delete offers, by target keys; `version` has the event's even ordinal.

    The two changes of a key change have ordinals of their own, since old and new key may be one and the same in the target.
    """
    if old_key is None:
        return (Change(key, version, image),)
    put = Change(key, version._replace(ordinal=version.ordinal + 1), image, old_key)
    return Change(old_key, version, None), put


def after_truncate(changes: Iterable[Change], at: Version | None) -> list[Change]:
    """Return the changes that the last TRUNCATE of a batch leaves to be offered: those before it have nothing to say any more."""
    return [change for change in changes if at is None or change.version > at]


def filled(image: Image, row: Image) -> Image:
    """Return an image whose unsent values, and only those, are another row's."""
    return tuple(value if sent is UNSENT else sent for sent, value in zip(image, row, strict=True))


def completed(changes: Iterable[Change], rows: Mapping[Key, Image]) -> list[Change]:
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


def last_of_each_key(changes: Iterable[Change]) -> list[Change]:
    """Return one change a key, the one with the highest version: a cell is the maximum of what it is offered."""
    return list({change.key: change for change in sorted(changes, key=lambda one: one.version)}.values())
