"""Scripts: what the application does in the source, transaction by transaction, and the versions that this gives.

The n-th transaction commits at LSN 10 n; a direct write of it has the LSN right before. A row has two columns, of which an update
may leave the second, large one out of the stream. What a script says is the oracle of the worlds: no rule of the product is
asked for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from changeover.position import DUAL_WRITE_ORDINAL, Version, image_version
from tests.model.gate import UNSENT, Image

Rows = Mapping[str, Image]


class Write(NamedTuple):
    """One row's change by source key; an image's unsent values stay as they were. No key at all is a TRUNCATE."""

    key: str | None
    image: Image | None
    old_key: str | None = None


class Transaction(NamedTuple):
    """Writes that commit together, or (aborted) never; a rewrite gives the table a new file."""

    writes: tuple[Write, ...]
    aborted: bool = False
    rewrite: bool = False

    @property
    def new_file(self) -> bool:
        """Return whether the table has another file from then on, so that an older snapshot reads it as empty."""
        return self.rewrite or TRUNCATE in self.writes


def put(key: str, first: str, large: Hashable = UNSENT) -> Write:
    """Insert a row, or update it; without a large value that one is unchanged."""
    return Write(key, (first, large))


def gone(key: str) -> Write:
    """Delete a row."""
    return Write(key, None)


def move(old_key: str, key: str, first: str, large: Hashable = UNSENT) -> Write:
    """Give a row another key."""
    return Write(key, (first, large), old_key)


TRUNCATE = Write(None, None)
REWRITE = Transaction((), rewrite=True)


def tx(*writes: Write) -> Transaction:
    """Return a transaction that commits."""
    return Transaction(writes)


def aborted(*writes: Write) -> Transaction:
    """Return a transaction that writes and then rolls back."""
    return Transaction(writes, aborted=True)


def told(writes: Iterable[Write]) -> str:
    """Return what writes do, in words."""
    return ", ".join(_words(*write) for write in writes)


def _words(key: str | None, image: Image | None, old_key: str | None) -> str:
    if key is None:
        return "TRUNCATE"
    if image is None:
        return f"deletes {key}"
    return f"{old_key} becomes {key} = {image}" if old_key else f"puts {key} = {image}"


def shown_as(transactions: int) -> str:
    """Return the text, as PostgreSQL's, of a snapshot that shows so many transactions; their numbers are their ids."""
    return f"{transactions + 1}:{transactions + 1}:"


@dataclass(frozen=True)
class Script:
    """All transactions; the first `prepared` of them are in the exported snapshot."""

    transactions: tuple[Transaction, ...]
    prepared: int = 1
    target_key: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def l0(self) -> int:
        """Return the slot's consistent point: right after the last transaction in the snapshot."""
        return 10 * self.prepared + 5

    @cached_property
    def v0(self) -> Version:
        """Return the version of the images."""
        return image_version(self.l0)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return every target key."""
        writes = [write for one in self.transactions for write in one.writes]
        named = {key for write in writes for key in (write.key, write.old_key) if key is not None}
        return tuple(sorted({self.key(name) for name in named}))

    def key(self, source_key: str) -> str:
        """Return the target key of a source key."""
        return self.target_key.get(source_key, source_key)

    @cached_property
    def tables(self) -> tuple[Rows, ...]:
        """Return the source's rows, by source key, after each number of transactions."""
        tables: list[dict[str, Image]] = [{}]
        for one in self.transactions:
            rows = dict(tables[-1])
            for write in () if one.aborted else one.writes:
                before = rows.pop(write.old_key or write.key or "", None)
                if write.key is None:
                    rows.clear()
                elif write.image is not None:
                    sent = zip(write.image, before or write.image, strict=True)
                    rows[write.key] = tuple(old if new is UNSENT else new for new, old in sent)
            tables.append(rows)
        return tuple(tables)

    def target(self, table: int) -> dict[str, Image]:
        """Return the rows as the target must have them after some transactions."""
        return {self.key(key): image for key, image in self.tables[table].items()}

    def version(self, number: int, index: int) -> Version:
        """Return the version of a change of the stream: the index-th of a transaction, counted from 1."""
        return Version(0, 10 * number, 2 * index)

    def direct(self, number: int) -> Version:
        """Return the version of a transaction's direct writes."""
        return Version(0, 10 * number - 1, DUAL_WRITE_ORDINAL)

    def direct_writes(self, number: int) -> dict[str, Image | None]:
        """Return what a transaction's own code writes directly: whole rows as RETURNING gives them, one a target key."""
        one = self.transactions[number - 1]
        rows = dict(self.tables[number - 1])
        found: dict[str, Image | None] = {}
        for write in one.writes:
            if write.key is None:
                continue
            before = rows.pop(write.old_key or write.key, None)
            if write.old_key is not None:
                found[self.key(write.old_key)] = None
            if write.image is not None:
                rows[write.key] = tuple(
                    old if new is UNSENT else new for new, old in zip(write.image, before or write.image, strict=True)
                )
            found[self.key(write.key)] = rows.get(write.key)
        return found
