"""The version axis: every image and every event has one place on it.

A version is `(epoch, lsn, ordinal)`, compared in that order. Events of the change stream carry the
commit LSN of their transaction and an even or odd ordinal from 0 up. A backfill image carries
`(epoch, L0, -1)`, of the epoch in which the copy began. So it lies below every event of its stream,
whatever snapshot it was read under. A direct dual write carries the LSN read in its own source
transaction and ordinal -1. An LSN is an `int` in Python and Spark and `pg_lsn` in PostgreSQL.
"""

from __future__ import annotations

from typing import NamedTuple

DUAL_WRITE_ORDINAL = -1
"""Ordinal of backfill images and of direct dual writes: on a tie with an event of the stream the event wins."""

ZERO_LSN = 0


class Version(NamedTuple):
    """A place on the axis; tuples compare in the order that correctness needs."""

    epoch: int
    lsn: int
    ordinal: int

    def __str__(self) -> str:
        return f"{self.epoch}:{format_lsn(self.lsn)}:{self.ordinal}"


def image_version(l0: int, epoch: int = 0) -> Version:
    """Return v0, the version of every backfill image, given the slot's consistent point in bytes and the copy's epoch.

    Args:
        l0: The slot's consistent point, an LSN in bytes.
        epoch: The copy's epoch.

    Returns:
        The version.
    """
    return Version(epoch, l0, DUAL_WRITE_ORDINAL)


def epoch_floor(epoch: int) -> Version:
    """Return the floor of a tenant from the switch to `epoch` on: below all of its versions, above all earlier ones.

    Args:
        epoch: The epoch that the switch began.

    Returns:
        The floor, a version that no row bears.
    """
    return Version(epoch, ZERO_LSN, 0)


def parse_lsn(text: str) -> int:
    """Return the LSN in bytes from PostgreSQL's text form, such as ``16/B374D848``.

    Args:
        text: The text, two hexadecimal numbers around a slash.

    Returns:
        The LSN in bytes.
    """
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def format_lsn(lsn: int) -> str:
    """Return PostgreSQL's text form of an LSN in bytes.

    Args:
        lsn: The LSN in bytes.

    Returns:
        The text.
    """
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
