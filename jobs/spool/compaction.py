"""Compaction: which of the spool's small files become one, and how their rows are put together.

Each event comes to a file at least twice as large as the one that it was in. So it is written as
often as the logarithm of the number of merges, and large files never again. What one merge takes is
bounded, because the stream waits for it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

SMALL_EVENTS, SMALL_BYTES = 20_000, 4 << 20
"""A file with fewer of both is merged with others like it."""

MERGED_EVENTS, MERGED_BYTES = 200_000, 64 << 20
"""What one merge takes at most, so that the stream waits for it a fraction of a second."""


def mergeable(files: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the newest small files, in stream order: as many as a merge at least doubles, or none (pure)."""
    small = [file for file in files if file["num_records"] < SMALL_EVENTS and file["size_bytes"] < SMALL_BYTES]
    newest = sorted(small, key=lambda file: (file["max.lsn"], file["min.lsn"], file["modification_time"]), reverse=True)
    events = size = largest = chosen = 0
    for number, file in enumerate(newest, 1):
        events, size = events + file["num_records"], size + file["size_bytes"]
        largest = max(largest, file["num_records"])
        if events > MERGED_EVENTS or size > MERGED_BYTES:
            break
        if 2 * largest <= events:
            chosen = number
    return newest[:chosen][::-1]


def grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Put small tables together, as row groups that fit into memory."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(one.num_rows for one in held) >= SMALL_EVENTS or sum(one.nbytes for one in held) >= MERGED_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)
