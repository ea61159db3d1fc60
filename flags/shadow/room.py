"""Room: how many bytes of answers a process keeps for comparisons, and an estimate of what one answer takes.

Callers put answers down faster than they are compared, and an answer may be thousands of rows. So their bytes are bounded, and
what finds no room is dropped and counted. The estimate looks at a few elements of each container and takes the others to be like
them, since it runs on the caller's thread. One huge value among thousands of small ones may escape it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import UUID

WIDTHS = (24, 24, 4, 4)
"""Elements that are looked at, evenly spread, of a container, of the containers in it, and so on: rows, columns, JSON, arrays."""

PLAIN = frozenset({int, str, float, bool, bytes, type(None), Decimal, datetime, date, UUID})
"""Most values of rows, which hold no others."""


def size_of(value: Any, depth: int = 0) -> int:
    """Return about how many bytes a value takes, with what is in it.

    The names of a row's columns are left out: all rows share them.

    Args:
        value: The value.
        depth: In how many containers it is.

    Returns:
        The bytes.
    """
    size = sys.getsizeof(value)
    if depth == len(WIDTHS) or type(value) in PLAIN:
        return size
    if isinstance(value, (list, tuple, set, frozenset)):
        inside: Any = value
    elif isinstance(value, (dict, Mapping)):  # in this order: the second is slow to ask
        inside = value.values()
    elif (own := getattr(value, "__dict__", None)) is not None and not isinstance(value, type):
        return size + size_of(own, depth)
    else:
        return size
    count = len(inside)
    if not count:
        return size
    step = -(-count // WIDTHS[depth])
    if step == 1:
        return size + sum([size_of(one, depth + 1) for one in inside])
    looked = inside[::step] if isinstance(inside, (list, tuple)) else list(islice(inside, 0, None, step))
    return size + sum([size_of(one, depth + 1) for one in looked]) * count // len(looked)


class Room:
    """Bytes that are taken and given back; thread-safe, and its lock is held for an addition alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Return how many bytes are taken."""
        return self._taken

    def take(self, size: int) -> bool:
        """Take room, if there is enough.

        Args:
            size: How many bytes.

        Returns:
            Whether they were taken.
        """
        with self._lock:
            if self._taken + size > self.limit:
                return False
            self._taken += size
            return True

    def give(self, size: int) -> None:
        """Give room back.

        Args:
            size: How many bytes.
        """
        with self._lock:
            self._taken -= size
