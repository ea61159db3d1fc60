"""The world of orders: every permutation, repetition and batching of a script's changes leaves the same cells.

Each change of the stream is offered up to twice or more, in any order and alone or in a batch with another, in one target where
nothing else writes. Rules that need a key's order get only those orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, cast

from tests.model.carried import Held
from tests.model.gate import Cell, Image, Key, KeyChange
from tests.model.rules import RULES, Rules
from tests.model.script import Script


class OrderState(NamedTuple):
    """The cells, and how often each change was offered."""

    cells: tuple[Cell | None, ...]
    offered: tuple[int, ...]


@dataclass(frozen=True)
class Orders:
    """A world of orders; offers are single changes, or (`together`) all changes of a transaction."""

    name: str
    script: Script
    rules: Rules = RULES
    together: bool = False
    times: int = 2

    @property
    def units(self) -> list[list[KeyChange]]:
        """Return what is offered at a time."""
        script, units = self.script, []
        for number in range(script.prepared + 1, len(script.transactions) + 1):
            for index, write in enumerate(script.transactions[number - 1].writes):
                old = None if write.old_key is None else script.key(write.old_key)
                changes = self.rules.apart(script.version(number, index), script.key(cast(str, write.key)), write.image, old)
                units += [list(changes)] if self.together else [[change] for change in changes]
        return units

    def start(self) -> OrderState:
        """Return the loaded target before the first offer."""
        rows = self.script.target(self.script.prepared)
        cells = tuple(Cell(self.script.v0, rows[key]) if key in rows else None for key in self.script.keys)
        return OrderState(cells, tuple(0 for _ in self.units))

    def steps(self, state: OrderState) -> Iterator[tuple[str, OrderState]]:
        """Yield every batch of one or two offers."""
        units = self.units
        open_units = [place for place, times in enumerate(state.offered) if times < self.times]
        for batch in [*combinations(open_units, 1), *combinations(open_units, 2)]:
            if self.rules.keeps_order and not self._keeps_order(state.offered, batch):
                continue
            offered = tuple(times + (place in batch) for place, times in enumerate(state.offered))
            changes = [change for place in batch for change in units[place]]
            told = ", ".join(f"{change.key} at {change.version.lsn}:{change.version.ordinal}" for change in changes)
            yield f"offers {told}", OrderState(self._apply(state.cells, changes), offered)

    def _keeps_order(self, offered: tuple[int, ...], batch: tuple[int, ...]) -> bool:
        """Replay goes on where it was, or begins again from an earlier place: nothing is offered before what precedes it."""
        return all(offered[place] or place in batch for place in range(max(batch)))

    def _apply(self, cells: tuple[Cell | None, ...], changes: list[KeyChange]) -> tuple[Cell | None, ...]:
        held: dict[Key, Held] = {
            key: Held(cast(Image, cell.image), None if cell.version == self.script.v0 else cell.version)
            for key, cell in zip(self.script.keys, cells, strict=True)
            if cell is not None and cell.image is not None
        }
        after = list(cells)
        rows = self.script.target(len(self.script.transactions))
        for whole in self.rules.batch(changes, held, True, dict(rows.items())):
            place = self.script.keys.index(cast(str, whole.key))
            after[place] = self.rules.merged(after[place], [Cell(whole.version, whole.image)], self.script.v0)
        return tuple(after)

    def wrong(self, state: OrderState) -> str | None:
        """Judge a state: once everything was offered, every key has the source's last row (I4)."""
        if not all(state.offered):
            return None
        wanted = self.script.target(len(self.script.transactions))
        for key, cell in zip(self.script.keys, state.cells, strict=True):
            found = None if cell is None else cell.image
            if found != wanted.get(key):
                return f"I4: {key} is {found or 'absent'} and {wanted.get(key) or 'absent'} in the source"
        return None

    def wrong_end(self, state: OrderState) -> str | None:
        """Judge an end: `wrong` has said it all."""
        return None
