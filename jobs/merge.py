"""The gate's rule as one pure function, and what a batch of offers does to a cell.

The stores state the same rule in their own language (`stores.gate` in SQL, `stores.delta` as a MERGE condition); tests hold
them against this one. Nothing here touches a store.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

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
