"""The other way to complete partial images, which the product does not take: from the batch and the target's own cell.

A batch carries values forward; what it does not have comes from the cell that the row had before, under its old key too, and only
where no such cell is from a read of the source. It is right as long as a key's order is kept, which is what its mutants break; the
product reads every unsent value from a snapshot that shows the whole batch, and needs no order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from changeover.position import Version
from tests.model.gate import UNSENT, Image, Key, KeyChange, filled


class Origin(NamedTuple):
    """The key that a row had before, and the version at which it left it: whatever lives there later is another row."""

    key: Key
    left: Version


class Held(NamedTuple):
    """What the target holds for a key: its image, and the version that a live write gave it, or None for an image of v0."""

    image: Image
    version: Version | None


Carried = tuple[KeyChange, Origin | None]
"""A change, and where its unsent values come from if not from its own key."""


def origin_of(change: KeyChange) -> Origin | None:
    """Return where a put's row was before, if it has another key now."""
    return None if change.old_key is None else Origin(change.old_key, change.version)


def collapsed(changes: Iterable[KeyChange]) -> list[Carried]:
    """Return one change a key, the last by version, with the unsent values that earlier changes of the batch have."""
    last: dict[Key, Carried] = {}
    left: dict[Key, Carried | None] = {}
    for change in sorted(changes, key=lambda one: one.version):
        origin = origin_of(change)
        if change.image is None:
            left[change.key] = last.get(change.key)
        elif UNSENT in change.image:
            before = last.get(change.key) if origin is None else left.get(origin.key)
            if before is not None and before[0].image is not None:
                origin = before[1] if origin is None else before[1] or origin
                change = change._replace(image=filled(change.image, before[0].image))
        last[change.key] = (change, origin)
    return list(last.values())


def supplies(held: Held, origin: Origin | None, exact: bool) -> bool:
    """Return whether a cell may supply unsent values.

    For its own key any may: what is newer than the change refuses it. Under its old key a row is the change's own only while
    nothing newer lives there: neither a direct write from after it left nor, unless every image was read under the prepared
    snapshot (`exact`), an image that may be younger than that.
    """
    if origin is None:
        return True
    return exact if held.version is None else held.version < origin.left


def completed(change: KeyChange, origin: Origin | None, held: Mapping[Key, Held], exact: bool, read: Image | None) -> KeyChange:
    """Return a change with every value; where the source has no row either, it is a delete until its real one comes."""
    if change.image is None or UNSENT not in change.image:
        return change
    known = held.get(change.key if origin is None else origin.key)
    image = known.image if known is not None and supplies(known, origin, exact) else read
    return change._replace(image=None if image is None else filled(change.image, image))


def batch(changes: Iterable[KeyChange], held: Mapping[Key, Held], exact: bool, read: Mapping[Key, Image]) -> list[KeyChange]:
    """Return what a batch offers."""
    return [completed(change, origin, held, exact, read.get(change.key)) for change, origin in collapsed(changes)]
