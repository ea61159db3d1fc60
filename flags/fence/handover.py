"""A handover: what one fence moves between two stores, how long writers have waited for it, and the sequences that go along.

The pause has a limit, and makes the moves in the one order that is proved (`statements.HAND_OVER`). A gaining store's sequences go
past both stores' values before anybody writes to it. Everything runs where `changeover flags` runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ldclient.migrations.types import Origin

from changeover import failpoints
from changeover.errors import CouldNotFinish, FenceCalledOff
from changeover.flags.fence.endpoints import FencedStore
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.jobs.transform.derivation import origin
from changeover.spec import Spec, Table
from changeover.stores.base.statements import HAND_OVER, Move
from changeover.stores.tables import sequences
from changeover.tenants import Tenants


@dataclass(frozen=True)
class Handover:
    """What one fence moves: which rows, to which store, under which epoch; `before` is the authority log without it.

    `names` are the tenants as they are put on record, None for all rows.
    """

    spec: Spec
    ledger: Ledger
    to: Origin
    epoch: int
    moving: Tenants
    names: frozenset[str] | None
    before: Sequence[Authority]
    old: FencedStore
    new: FencedStore

    @property
    def losing(self) -> FencedStore:
        """Return the store that loses authority."""
        return self.old if self.to is Origin.NEW else self.new

    @property
    def gaining(self) -> FencedStore:
        """Return the store that gains it."""
        return self.new if self.to is Origin.NEW else self.old


@dataclass(frozen=True)
class Pause:
    """How long writers have been held up, and how long they may be; seconds on the monotonic clock."""

    started: float
    limit: float
    made: list[Move] = field(default_factory=list)

    def make(self, move: Move) -> None:
        """Note that a move is made; none comes before its turn in `statements.HAND_OVER`, whose order is the proof."""
        if move is not HAND_OVER[len(self.made)]:
            raise CouldNotFinish(f"the fence would make {move.name} after {[earlier.name for earlier in self.made]}")
        self.made.append(move)
        failpoints.reach(f"fence-{move.name.lower().replace('_', '-')}")

    @property
    def seconds(self) -> float:
        """Return how long it has been."""
        return time.monotonic() - self.started

    @property
    def deadline(self) -> float:
        """Return when it is over, come what may."""
        return self.started + self.limit

    def wait(self, what: Callable[[], str | None]) -> None:
        """Wait until `what` has nothing more to wait for; raises FenceCalledOff at the deadline."""
        while (waiting := what()) is not None:
            if time.monotonic() > self.deadline:
                raise FenceCalledOff(self.seconds, waiting)
            time.sleep(0.02)


def advance_sequences(gaining: FencedStore) -> None:
    """Before the pause, for this may read whole tables: past every row that is there, and past those under way."""
    for table in gaining.tables:
        for sequence in sequences.sequences(gaining.connection, table.schema, table.name):
            held = sequences.held(gaining.connection, table.schema, table.name, sequence)
            sequences.move_past(gaining.connection, sequence, sequences.ahead(sequence, held))


def pass_the_others(handover: Handover) -> None:
    """In the pause, when nothing is drawn any more: past what the losing store drew, used or not, and past the last rows.

    Where tenants move one by one the others go on drawing; then no row of theirs has a key of these.
    """
    gaining, losing = handover.gaining, handover.losing
    for table, got, lost in zip(handover.spec.tables, gaining.tables, losing.tables, strict=True):
        drawn = {
            one.column: sequences.drawn(losing.connection, one)
            for one in sequences.sequences(losing.connection, lost.schema, lost.name)
        }
        for sequence in sequences.sequences(gaining.connection, got.schema, got.name):
            others = [drawn.get(column) for column in _same_column(table, sequence.column, handover.to)]
            held = sequences.held(gaining.connection, got.schema, got.name, sequence) if sequence.indexed else None
            sequences.move_past(gaining.connection, sequence, held, *others)


def _same_column(table: Table, column: str, to: Origin) -> list[str]:
    """Return the columns of the losing store's table that hold what this column of the gaining one's holds (pure)."""
    if table.function is not None:
        return []
    if to is Origin.NEW:
        own = origin(table, column)
        return [] if own is None else [own]
    renamed = [name for name in table.columns if origin(table, name) == column]
    return [*renamed, *([column] if column not in table.columns else [])]
