"""The world of a Delta target: appends that look at no row, an application id each, then MERGEs; attempts that nobody can stop.

A table is a bag of rows. An append adds rows whatever is there; a MERGE matches on key and compares versions. A chunk is appended
and then marked in the ledger, by any of several attempts, each of which may be slow or dead at any point; replay starts where the
product's rule lets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

from changeover.position import Version
from changeover.stores.base.statements import Part
from tests.model.gate import Cell, Chunk, Image
from tests.model.rules import RULES, Rules
from tests.model.script import Script


class LakeState(NamedTuple):
    """A moment: the bag of rows per key, what the table records per application id, and who is where."""

    bags: tuple[tuple[Cell, ...], ...]
    applications: tuple[tuple[str, int], ...]
    chunks: tuple[Chunk, ...]
    attempts: tuple[tuple[int, tuple[int, ...]], ...]
    """Attempts: token, and how many transactions each chunk's task has done."""
    closed: bool
    offered: int
    applied: int
    kills: int
    truncating: int = 0
    """The end of a batch whose TRUNCATE is done and whose changes are not."""


@dataclass(frozen=True)
class Lake:
    """A Delta target's world; every source key is a chunk of its own."""

    name: str
    script: Script
    rules: Rules = RULES
    attempts: int = 2
    kills: int = 1

    def start(self) -> LakeState:
        """Return the state right after prepare."""
        keys = self.script.keys
        n = self.script.prepared
        return LakeState(tuple(() for _ in keys), (), tuple(Chunk() for _ in keys), (), False, n, n, self.kills)

    def steps(self, state: LakeState) -> Iterator[tuple[str, LakeState]]:
        """Yield every process's next steps."""
        yield from self._claims(state)
        for place, (token, done) in enumerate(state.attempts):
            for chunk, count in enumerate(done):
                if count < len(self.rules.append_load):
                    yield self._task(state, place, token, chunk)
        if not state.closed and self.rules.closable(state.chunks, 0, 0, False):
            yield "the table is closed", state._replace(closed=True)
        yield from self._replay(state)

    def _claims(self, state: LakeState) -> Iterator[tuple[str, LakeState]]:
        if len(state.attempts) == self.attempts or all(chunk.loaded for chunk in state.chunks):
            return
        token, chunks = self.rules.claimed(state.chunks)
        waits = tuple(len(self.rules.append_load) if chunk.loaded else 0 for chunk in state.chunks)
        yield f"attempt {token} claims the chunks", state._replace(chunks=chunks, attempts=(*state.attempts, (token, waits)))

    def _task(self, state: LakeState, place: int, token: int, chunk: int) -> tuple[str, LakeState]:
        """Do the next transaction of a task: append, or mark."""
        done = state.attempts[place][1]
        part = self.rules.append_load[done[chunk]][0][0]
        after = self._append(state, token, chunk) if part is Part.APPEND else self._mark(state, token, chunk)
        moved = (token, (*done[:chunk], done[chunk] + 1, *done[chunk + 1 :]))
        attempts = (*state.attempts[:place], moved, *state.attempts[place + 1 :])
        return f"attempt {token} {part.value} {chunk}", after._replace(attempts=attempts)

    def _append(self, state: LakeState, token: int, chunk: int) -> LakeState:
        application, version = self.rules.application(chunk, token)
        recorded = dict(state.applications)
        if self.rules.appended(recorded.get(application), version):
            return state
        image = self.script.target(self.script.prepared).get(self.script.keys[chunk])
        bags = state.bags
        if image is not None:
            bags = (*bags[:chunk], (*bags[chunk], Cell(self.script.v0, image)), *bags[chunk + 1 :])
        return state._replace(bags=bags, applications=tuple(sorted({**recorded, application: version}.items())))

    def _mark(self, state: LakeState, token: int, chunk: int) -> LakeState:
        if not self.rules.markable(state.chunks[chunk], token):
            return state
        marked = state.chunks[chunk]._replace(loaded=True)
        return state._replace(chunks=(*state.chunks[:chunk], marked, *state.chunks[chunk + 1 :]))

    def _replay(self, state: LakeState) -> Iterator[tuple[str, LakeState]]:
        if state.offered > state.applied:
            yield f"replay records {state.offered}", state._replace(applied=state.offered)
            if state.kills:
                yield "replay dies", state._replace(offered=state.applied, kills=state.kills - 1)
        elif state.truncating:
            merged = state._replace(bags=self._merge(state, state.truncating), offered=state.truncating, truncating=0)
            yield f"replay merges what the TRUNCATE up to {state.truncating} leaves", merged
            if state.kills:
                yield "replay dies", state._replace(truncating=0, kills=state.kills - 1)
        elif self.rules.mergeable(self.rules.lake_merges_while_loading, state.closed):
            for until in range(state.applied + 1, len(self.script.transactions) + 1):
                at = self._truncate_at(state, until)
                if at is not None:
                    yield f"replay truncates before {until}", state._replace(bags=_emptied(state.bags, at), truncating=until)
                else:
                    yield (
                        f"replay merges {state.applied + 1} to {until}",
                        state._replace(bags=self._merge(state, until), offered=until),
                    )

    def _truncate_at(self, state: LakeState, until: int) -> Version | None:
        """Return the version of the last TRUNCATE of a batch."""
        found = (
            self.script.version(number, index)
            for number in range(state.applied + 1, until + 1)
            for index, write in enumerate(self.script.transactions[number - 1].writes)
            if write.key is None
        )
        return max(found, default=None)

    def _merge(self, state: LakeState, until: int) -> tuple[tuple[Cell, ...], ...]:
        """MERGE one row a key: whatever matches is replaced where the rule says so, what matches nothing is inserted."""
        changes = [
            change
            for n in range(state.applied + 1, until + 1)
            for index, write in enumerate(self.script.transactions[n - 1].writes)
            if write.key is not None
            for change in self.rules.apart(self.script.version(n, index), write.key, write.image, write.old_key)
        ]
        changes = self.rules.after_truncate(changes, self._truncate_at(state, until))
        bags = list(state.bags)
        for change in self.rules.batch(changes, {}, True, {}):
            place = self.script.keys.index(cast(str, change.key))
            offer = Cell(change.version, change.image)
            rows = [cast(Cell, self.rules.merged(row, [offer], self.script.v0)) for row in bags[place]]
            bags[place] = tuple(rows) if rows else (offer,)
        return tuple(bags)

    def wrong(self, state: LakeState) -> str | None:
        """Judge a state: at rest the table is the source, one row a key, and whatever a slow attempt does keeps it so."""
        if not state.closed or state.applied < len(self.script.transactions):
            return None
        wanted = self.script.target(len(self.script.transactions))
        for key, bag in zip(self.script.keys, state.bags, strict=True):
            live: list[Image] = [cast(Image, row.image) for row in bag if row.image is not None]
            if live != ([wanted[key]] if key in wanted else []):
                return f"I1: {key} is {live or 'absent'} and {wanted.get(key, 'absent')} in the source"
        return None

    def wrong_end(self, state: LakeState) -> str | None:
        """Judge an end: all must be done."""
        done = state.closed and state.applied == len(self.script.transactions)
        return None if done else "nothing can happen, and work is left"


def _emptied(bags: tuple[tuple[Cell, ...], ...], at: Version) -> tuple[tuple[Cell, ...], ...]:
    """Make a tombstone of every older row, as the store's UPDATE does."""
    return tuple(tuple(Cell(at, None) if row.version < at else row for row in bag) for bag in bags)
