"""The gate's rule and the rule of chunks as pure functions, which the model runs and every store is held against.

The product states the same in its own languages: `stores.postgres.gate` in SQL, `stores.delta.merges` as a comparison of columns,
`ledger.mark_loaded` and `Ledger.claim` in SQL. Versions alone decide what is taken. Each table has one floor, first v0, which only
rises; a key without a cell has the floor's version.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from changeover.jobs.ledger.chunks import same_file
from changeover.position import Version


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


def collected(cell: Version, upto: Version) -> bool:
    """Return whether collection up to a version removes a row version: the floor then answers for its key."""
    return cell <= upto


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


# -- chunks


class Chunk(NamedTuple):
    """A chunk's state: the token of the latest attempt, 0 before the first, and whether its rows are in."""

    token: int = 0
    loaded: bool = False


def claimed(chunks: Sequence[Chunk]) -> tuple[int, tuple[Chunk, ...]]:
    """Return a new attempt's token, above every earlier one, and the chunks with the open ones claimed for it."""
    token = max((chunk.token for chunk in chunks), default=0) + 1
    return token, tuple(chunk if chunk.loaded else chunk._replace(token=token) for chunk in chunks)


def markable(chunk: Chunk, token: int) -> bool:
    """Return whether an attempt may mark a chunk: nobody has loaded it or claimed it since. Else it rolls back."""
    return chunk.token == token and not chunk.loaded


def closable(chunks: Sequence[Chunk], prepared: int, file: int | None, truncated: bool) -> bool:
    """Return whether a table may be closed: every chunk is in, and no chunk can have read a file that its rows had left.

    Another file than the prepared one is right only where the stream tells of a TRUNCATE since: then every row that the snapshot
    would have shown is gone.
    """
    return all(chunk.loaded for chunk in chunks) and (same_file(prepared, file) or (file is not None and truncated))
