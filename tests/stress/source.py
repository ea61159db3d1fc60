"""A simulated source: transactions under row locks, in the order of a log, and the rows that every key must end with.

The oracle knows nothing of a gate: it is the last row that the source gave a key, by the order of commits. Positions are drawn as a
server draws them: a write's own position before its commit's, and the row's lock held in between, so that transactions of different
keys commit in another order than they wrote in.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from changeover.position import DUAL_WRITE_ORDINAL, Version, image_version

L0 = 1_000
V0 = image_version(L0)


class Write(NamedTuple):
    """One row's change: its place in the change stream, the version of a direct write of it, the key, and the row or None."""

    event: Version
    direct: Version
    key: int
    note: str | None


@dataclass
class Source:
    """What a trial's source did: rows in the snapshot, writes in commit order, TRUNCATEs, and writes from before the snapshot."""

    images: dict[int, str] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    truncates: list[Version] = field(default_factory=list)
    older: list[Write] = field(default_factory=list)
    rows: dict[int, str] = field(default_factory=dict)
    lsn: int = L0

    @classmethod
    def run(cls, chance: random.Random, keys: int, transactions: int, truncates: int) -> Source:
        """Let the source live."""
        source = cls()
        for key in range(keys):
            if chance.random() < 0.7:
                source.images[key] = f"image {key}"
            old = Version(0, L0 - chance.randrange(1, 500), DUAL_WRITE_ORDINAL)
            source.older.append(Write(old, old, key, None if chance.random() < 0.5 else f"older {key}"))
        source.rows = dict(source.images)
        life = _Life(source, chance, keys)
        truncated = chance.sample(range(transactions // 4, transactions - 4), truncates)
        for place in range(transactions):
            life.step()
            if place in truncated:
                life.truncate()
        life.end()
        return source

    def next_lsn(self) -> int:
        """Return the next place in the log."""
        self.lsn += 10
        return self.lsn


@dataclass
class _Life:
    """Open transactions: for each the keys that it has locked, with the position and the row of each write."""

    source: Source
    chance: random.Random
    keys: int
    open: list[dict[int, tuple[int, str | None]]] = field(default_factory=list)
    written: int = 0

    def step(self) -> None:
        """Begin a transaction of a few keys that nobody holds, and perhaps commit some that are open."""
        held = {key for one in self.open for key in one}
        free = [key for key in range(self.keys) if key not in held]
        begun = {}
        for key in self.chance.sample(free, min(len(free), self.chance.choice((1, 1, 2, 4)))):
            self.written += 1
            gone = key in self.source.rows and self.chance.random() < 0.5
            # a position may be below L0 where the transaction began before the slot and committed after it
            early = self.written <= 3 and self.source.lsn == L0
            at = L0 - self.written if early else self.source.next_lsn()
            begun[key] = (at, None if gone else f"write {self.written}")
        if begun:
            self.open.append(begun)
        while self.open and self.chance.random() < 0.55:
            self._commit()

    def _commit(self) -> None:
        transaction = self.open.pop(self.chance.randrange(len(self.open)))
        commit = self.source.next_lsn()
        for place, (key, (at, note)) in enumerate(transaction.items()):
            event, direct = Version(0, commit, 2 * place), Version(0, at, DUAL_WRITE_ORDINAL)
            self.source.writes.append(Write(event, direct, key, note))
            if note is None:
                self.source.rows.pop(key, None)
            else:
                self.source.rows[key] = note

    def truncate(self) -> None:
        """TRUNCATE waits for every open transaction."""
        self.end()
        self.source.truncates.append(Version(0, self.source.next_lsn(), 0))
        self.source.rows.clear()

    def end(self) -> None:
        """Commit what is open."""
        while self.open:
            self._commit()
