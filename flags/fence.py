"""The fence: authority over all rows, or some cohorts', moves from one store to the other, enforced by the one that loses it.

The order is the proof: (1) the losing store refuses whatever is not of the new epoch, and getting that trigger's lock has drained
every older writing transaction; (2) only then its position F is read and a marker emitted; (3) the gaining store has everything
below F; (4) the ledger says that authority has moved; (5) the gaining store's floor goes up to the new epoch, never before, or a
fence that is called off would leave a floor that refuses what the losing store still writes. Until (4) the refusal ends by itself
at a deadline, so a fence that dies gives the writers back; after a hand-over that took longer than `max_pause` it is called off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from ldclient.migrations.types import Origin
from psycopg import sql

from changeover import points
from changeover.cohorts import Cohorts
from changeover.errors import FenceCalledOff, Refused
from changeover.flags.facts import facts
from changeover.flags.gate import mirrors
from changeover.flags.sides import Side, position, sides
from changeover.jobs import reverse, tenure
from changeover.jobs.capture import emit_marker
from changeover.jobs.division import indivisible
from changeover.jobs.entries import Authority
from changeover.jobs.ledger import Ledger
from changeover.jobs.prepare import spool_of
from changeover.jobs.replay import LEASE_SECONDS, lease_of
from changeover.jobs.rewrite import require_same_file
from changeover.jobs.transform import BARE
from changeover.position import epoch_floor, format_lsn
from changeover.spec import Spec, Table
from changeover.stores import gate, refusal, sequences
from changeover.stores.statements import HAND_OVER, Move

log = logging.getLogger(__name__)

MAX_PAUSE = 10.0
"""Seconds after which a fence is called off and writers go on where they were."""

NEAR = 6.0
"""How many times the pause's limit the gaining store may take to come near the losing one, before writers are held up at all."""

LOOK_SECONDS = 1.0
"""How often to ask the new store meanwhile whether its stream is still whole."""

PERMANENT_SECONDS = 1.0
"""What must be left of the pause when the refusal is made permanent: the deadline may not pass in between."""

MOST_COHORTS = 10_000
"""How many cohorts a move may name: the losing store compares each row that is written with all of them."""

SEQUENCE_MARGIN = 10_000
"""How far a gaining store's sequences go past the other's: rows that arrive during the hand-over find their place below."""


@dataclass(frozen=True)
class Fenced:
    """A fence that was done: the new epoch, the store that has authority, and how long writers waited at most.

    `lacking` is why, on the way back, the old store got no more than the mirror brought; None where it got everything.
    """

    epoch: int
    store: str
    from_lsn: int
    pause_seconds: float
    lacking: str | None = None


@dataclass(frozen=True)
class Transfer:
    """What one fence moves: which rows, to which store, under which epoch; `before` is the authority log without it.

    `names` are the cohorts as they are put on record, None for all rows.
    """

    spec: Spec
    ledger: Ledger
    to: Origin
    epoch: int
    whose: Cohorts
    names: frozenset[str] | None
    before: Sequence[Authority]
    old: Side
    new: Side

    @property
    def losing(self) -> Side:
        """Return the side that loses authority."""
        return self.old if self.to is Origin.NEW else self.new

    @property
    def gaining(self) -> Side:
        """Return the side that gains it."""
        return self.new if self.to is Origin.NEW else self.old


def fence(spec: Spec, to: Origin, *, max_pause: float = MAX_PAUSE, cohorts: Collection[str] | None = None) -> Fenced:
    """Move authority to a store, over all rows that it has none over yet, or those of some cohorts (driver).

    Capture and replay must be running. Raises FenceCalledOff, with writers back where they were, TableStopped, and SlotBlocked
    before anything was held up; Refused for cohorts where they can't move one by one.
    """
    _require_nameable(spec, to, cohorts)
    with Ledger.open(spec, "fence") as ledger, ledger.lease("fence"), ExitStack() as held:
        before = ledger.authorities()
        whose = tenure.moving(before, to.value, cohorts)
        if to is Origin.NEW and whose is not None:
            path = reverse.open_path(spec, ledger)  # which waits for open transactions, so it comes before anybody else has to
            if path is None and cohorts is not None:
                raise Refused("no cohort moves alone without a way back: `changeover check` says what stands in it")
        held.enter_context(_others_rest(spec, ledger))
        old, new = held.enter_context(sides(spec))
        if whose is None:
            _finish(new if to is Origin.NEW else old, old, new, before)
            present = next((one for one in reversed(before) if one.store == to.value), ledger.authority())
            return Fenced(present.epoch, to.value, present.from_lsn, present.pause_seconds or 0.0)
        names = frozenset(cohorts) if cohorts is not None else None
        epoch = max((one.epoch for one in before), default=0) + 1
        return _move(Transfer(spec, ledger, to, epoch, whose, names, before, old, new), max_pause)


def _require_nameable(spec: Spec, to: Origin, cohorts: Collection[str] | None) -> None:
    if cohorts is None:
        return
    if spec.flag is None or spec.flag.context is None:
        raise Refused("cohorts move one by one where the spec names `flag.context`, the column that holds them")
    if not cohorts or not all(cohorts):
        raise Refused("a cohort's name is empty: those without a name move with all rows")
    if len(cohorts) > MOST_COHORTS:
        raise Refused(f"{len(cohorts):,} cohorts are more than {MOST_COHORTS:,} at once: every write compares itself with them")
    if to is Origin.NEW and (why := indivisible(spec)):
        raise Refused(f"no cohort moves alone: {why[0]}")


def _move(transfer: Transfer, max_pause: float) -> Fenced:
    """Make the moves in their order."""
    ledger, to = transfer.ledger, transfer.to
    lacking = _draw_near(transfer, NEAR * max_pause)
    _prepare_gates(transfer, max_pause)
    with _turn(transfer) as turn:
        pause = Pause(time.monotonic(), max_pause)
        try:
            places = (_hand_over if to is Origin.NEW else _hand_back)(transfer, pause, turn.close, lacking)
            _pass_the_others(transfer)
            _make_final(transfer, pause)
            points.reach("fence-final")
            made = Authority(transfer.epoch, to.value, places[0], datetime.min, pause.seconds, places[1], transfer.names)
            _record(ledger, made, lacking)
            pause.make(Move.RECORD)
        except BaseException:
            _call_off(transfer)
            raise
    _finish(transfer.gaining, transfer.old, transfer.new, ledger.authorities())
    pause.make(Move.RAISE_FLOOR)
    log.info(
        "epoch %s: the %s store has authority over %s from %s, after %.3f s", transfer.epoch, to.value,
        "all rows" if transfer.names is None else f"{len(transfer.names)} cohorts", format_lsn(places[0]), pause.seconds,
    )  # fmt: skip
    return Fenced(transfer.epoch, to.value, places[0], pause.seconds, lacking)


def settle(spec: Spec) -> None:
    """Do what a fence that was killed may have left: the store that has authority takes writes, behind its floor (driver)."""
    with Ledger.open(spec, "fence") as ledger, ledger.lease("fence"), sides(spec) as (old, new):
        _finish(new if ledger.authority().store == Origin.NEW.value else old, old, new, ledger.authorities())


def _finish(gaining: Side, old: Side, new: Side, changes: Sequence[Authority]) -> None:
    """Raise the floors of what has authority on record, and let it write; safe to repeat."""
    apart = any(table.cohort for table in gaining.tables)
    for side in (gaining, *(one for one in (old, new) if apart and one is not gaining)):
        side.raise_floors(changes)
        side.settle(changes)


def _call_off(transfer: Transfer) -> None:
    """Give the writers back, unless the ledger holds the new epoch after all: its own word may have been lost on the way.

    Where the ledger can't be asked the refusal stays as it is: two stores that take writes would be worse than none.
    """
    with Ledger.open(transfer.spec, "fence") as again:
        if all(one.epoch < transfer.epoch for one in again.authorities()):
            transfer.losing.settle(transfer.before)


@dataclass(frozen=True)
class Pause:
    """How long writers have been held up, and how long they may be; seconds on the monotonic clock."""

    started: float
    limit: float
    made: list[Move] = field(default_factory=list)

    def make(self, move: Move) -> None:
        """Note that a move is made; none comes before its turn in `statements.HAND_OVER`, whose order is the proof."""
        assert move is HAND_OVER[len(self.made)], f"{move} after {self.made}"
        self.made.append(move)
        points.reach(f"fence-{move.name.lower().replace('_', '-')}")

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


@contextmanager
def _turn(transfer: Transfer) -> Iterator[ExitStack]:
    """Hold replay's turn at the gaining store until it is closed.

    The very next batch then begins with all that was written before the fence. A batch under way would make writers wait for it
    and then for the next one.
    """
    assert transfer.spec.flag is not None
    with ExitStack() as turn:
        target = transfer.spec.flag.target if transfer.to is Origin.NEW else reverse.OLD_STORE
        turn.enter_context(transfer.ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
        yield turn


def _make_final(transfer: Transfer, pause: Pause) -> None:
    """Take the deadline off the losing store's refusal."""
    if pause.deadline - time.monotonic() < PERMANENT_SECONDS:
        raise FenceCalledOff(pause.seconds, "the last step, which the deadline left no time for")
    after = Authority(transfer.epoch, transfer.to.value, 0, datetime.min, pause.seconds, 0, transfer.names)
    transfer.losing.settle([*transfer.before, after])


def _prepare_gates(transfer: Transfer, seconds: float) -> None:
    """Before the pause: the losing store, mirrored to from now on, gets its gate; the gaining one statistics and sequences.

    Where cohorts move one by one, the gaining store refuses from here on what it has not got.
    """
    losing, gaining = transfer.losing, transfer.gaining
    for table in losing.tables:
        gate.install_gate(losing.connection, table.schema, table.name, table.key, epoch_floor(0))
        if table.cohort is None:
            gate.raise_floor(losing.connection, table.gated, epoch_floor(transfer.epoch))
    apart = any(table.cohort for table in gaining.tables)
    if apart and (waiting := gaining.freeze(transfer.before, None, time.monotonic() + seconds)):
        raise FenceCalledOff(seconds, f"the lock on {waiting}, before anybody is held up")
    for table in gaining.tables:
        gaining.connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(table.schema, table.name)))
    _advance_sequences(gaining)


def _advance_sequences(gaining: Side) -> None:
    """Before the pause, for this may read whole tables: past every row that has arrived, and past those under way."""
    for table in gaining.tables:
        for sequence in sequences.sequences(gaining.connection, table.schema, table.name):
            held = sequences.held(gaining.connection, table.schema, table.name, sequence)
            ahead = held + SEQUENCE_MARGIN * sequence.increment if held is not None else None
            sequences.move_past(gaining.connection, sequence, ahead)


def _pass_the_others(transfer: Transfer) -> None:
    """In the pause, when nothing is drawn any more: past what the losing store drew, used or not, and past the last rows.

    Where cohorts move one by one the others go on drawing; then no row of theirs has a key of these.
    """
    gaining, losing = transfer.gaining, transfer.losing
    for table, got, lost in zip(transfer.spec.tables, gaining.tables, losing.tables, strict=True):
        drawn = {
            one.column: sequences.drawn(losing.connection, one)
            for one in sequences.sequences(losing.connection, lost.schema, lost.name)
        }
        for sequence in sequences.sequences(gaining.connection, got.schema, got.name):
            others = [drawn.get(column) for column in _same_column(table, sequence.column, transfer.to)]
            held = sequences.held(gaining.connection, got.schema, got.name, sequence) if sequence.indexed else None
            sequences.move_past(gaining.connection, sequence, held, *others)


def _same_column(table: Table, column: str, to: Origin) -> list[str]:
    """Return the columns of the losing store's table that hold what this column of the gaining one's holds (pure)."""
    if table.function is not None:
        return []
    if to is Origin.NEW:
        match = BARE.fullmatch(table.columns.get(column, column).strip())
        return [match[1]] if match else []
    renamed = [name for name, text in table.columns.items() if (match := BARE.fullmatch(text.strip())) and match[1] == column]
    return [*renamed, *([column] if column not in table.columns else [])]


def _hand_over(transfer: Transfer, pause: Pause, go_on: Callable[[], None], lacking: str | None) -> tuple[int, int]:
    """Have the old store refuse, drain, and wait until the new one has everything; return where both stores' logs were then.

    `go_on` lets replay have its turn.
    """
    spec, ledger = transfer.spec, transfer.ledger
    place = _frozen(transfer, pause)
    spool = spool_of(spec, ledger.stream("fence").epoch)
    pause.wait(lambda: None if spool.end() >= place else "capture to spool the last writes")
    for table in spec.tables:
        require_same_file(ledger, spool, transfer.old.connection, table)
    go_on()
    pause.wait(lambda: _behind(spec, ledger, place))
    pause.make(Move.AWAIT)
    return place, position(spec, transfer.new)


def _hand_back(transfer: Transfer, pause: Pause, go_on: Callable[[], None], lacking: str | None) -> tuple[int, int]:
    """Have the new store refuse, drain, and wait until the old one has everything; return where both stores' logs were then.

    Where there is no whole reverse path, that is what the routers' mirrors have brought, as each says after the refusal.
    """
    spec, ledger = transfer.spec, transfer.ledger
    place = _frozen(transfer, pause)
    if lacking is None:
        if gap := reverse.parted(spec, ledger, transfer.new.connection):
            raise FenceCalledOff(pause.seconds, f"a whole stream: {gap}")
        spool = reverse.spool_of(spec)
        pause.wait(lambda: None if spool.end() >= place else "capture to spool the new store's last writes")
        go_on()
        pause.wait(lambda: _not_back(ledger, place, pause))
    else:
        log.warning("back by the mirror alone, which loses what it dropped: %s", lacking)
        now, epochs = ledger.now(), facts(transfer.before).epochs(Origin.NEW, transfer.names)
        pause.wait(lambda: _unmirrored(ledger, now, epochs))
    pause.make(Move.AWAIT)
    return position(spec, transfer.old), place


def _draw_near(transfer: Transfer, seconds: float) -> str | None:
    """Wait, before the pause, until the gaining store has what the losing one holds now; return why it will not have it all.

    Writers go on meanwhile, and the first batch of a replay that has just begun is no part of their pause. Raises FenceCalledOff
    where replay does not come near.
    """
    spec, ledger, back = transfer.spec, transfer.ledger, transfer.to is Origin.OLD
    if back and (lacking := reverse.lacking(spec, ledger)):
        return lacking
    place, deadline = position(spec, transfer.losing), time.monotonic() + seconds
    emit_marker(transfer.losing.connection, "fence ahead")
    look_at = time.monotonic() + LOOK_SECONDS
    while waiting := _not_back(ledger, place) if back else _behind(spec, ledger, place):
        if back and time.monotonic() > look_at:
            if lacking := reverse.lacking(spec, ledger):
                return lacking
            look_at = time.monotonic() + LOOK_SECONDS
        if time.monotonic() > deadline:
            raise FenceCalledOff(seconds, f"{waiting}, before anybody is held up")
        time.sleep(0.1)
    return None


def _frozen(transfer: Transfer, pause: Pause) -> int:
    """Have a store refuse and drain; return its position then, behind which a marker hurries its stream on."""
    losing = transfer.losing
    if waiting := losing.freeze(transfer.before, refusal.Refused(transfer.epoch, transfer.whose), pause.deadline):
        raise FenceCalledOff(pause.seconds, f"the lock on {waiting}")
    pause.make(Move.FREEZE)
    place = position(transfer.spec, losing)
    emit_marker(losing.connection, f"fence {transfer.epoch}")
    pause.make(Move.POSITION)
    return place


def _not_back(ledger: Ledger, position: int, pause: Pause | None = None) -> str | None:
    """Return what is missing in the old store; in a pause what stands in the way ends the wait: the next try goes without it."""
    late = [load for load in reverse.loads(ledger) if load.target == reverse.OLD_STORE and load.applied < position]
    for load in late:
        if load.stopped and pause is not None:
            raise FenceCalledOff(pause.seconds, f"{load.source} to come back to the old store, which stands still: {load.stopped}")
    return f"replay to bring {late[0].source} back to the old store, up to {format_lsn(position)}" if late else None


@contextmanager
def _others_rest(spec: Spec, ledger: Ledger) -> Iterator[None]:
    """Keep the batches of the other targets out of the pause: they would take the machine from the one that writers wait for."""
    assert spec.flag is not None
    with ExitStack() as held:
        for target in sorted(set(spec.targets) - {spec.flag.target}):
            held.enter_context(ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
        yield


def _behind(spec: Spec, ledger: Ledger, position: int) -> str | None:
    assert spec.flag is not None
    late = [load for load in ledger.loads() if load.target == spec.flag.target and load.applied < position]
    return f"replay to reach {format_lsn(position)} in {late[0].target}" if late else None


def _unmirrored(ledger: Ledger, since: object, epochs: Collection[int]) -> str | None:
    """On the way back the routers' mirrors must have nothing more of what goes back, as each says after the refusal.

    What they still have of other cohorts, which go on, is of other epochs.
    """
    row = ledger.connection.execute("SELECT now() - interval '10 seconds'").fetchone()
    assert row is not None
    for beat in ledger.heartbeats():
        if beat.at < row[0]:
            continue  # not alive: its queue died with it, and what it lost is in its last counters
        if beat.at <= since:  # type: ignore[operator]
            return f"process {beat.process} to say that its mirror is empty"
        for mirror in mirrors(beat, Origin.OLD):
            if any(mirror.get("queued", {}).get(str(epoch)) for epoch in epochs):
                return f"the mirror of process {beat.process}"
    return None


def _record(ledger: Ledger, authority: Authority, lacking: str | None) -> None:
    """Record, by one commit, that authority moves, and that the path back is of no use where it did not bring everything."""
    with ledger.connection.transaction():
        ledger.connection.execute(
            "INSERT INTO changeover.authority (migration, epoch, store, from_lsn, pause_seconds, new_lsn, cohorts)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [ledger.migration, authority.epoch, authority.store, format_lsn(authority.from_lsn), authority.pause_seconds,
             format_lsn(authority.new_lsn), None if authority.cohorts is None else sorted(authority.cohorts)],
        )  # fmt: skip
        if lacking is not None:
            reverse.break_off(ledger, f"authority went back without it: {lacking}")
