"""The fence: authority over all rows moves from one store to the other, enforced by the store that loses it.

The order is the proof: (1) the losing store refuses whatever is not of the new epoch, and getting that trigger's lock has drained
every older writing transaction; (2) only then its position F is read and a marker emitted; (3) the gaining store has everything
below F; (4) the ledger says that authority has moved; (5) the gaining store's floor goes up to the new epoch, never before, or a
fence that is called off would leave a floor that refuses what the losing store still writes. Until (4) the refusal ends by itself
at a deadline, so a fence that dies gives the writers back; after a hand-over that took longer than `max_pause` it is called off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ldclient.migrations.types import Origin
from psycopg import sql

from changeover import points
from changeover.errors import FenceCalledOff
from changeover.flags.gate import mirrors
from changeover.jobs import reverse, windows
from changeover.jobs.capture import emit_marker
from changeover.jobs.entries import Authority
from changeover.jobs.ledger import Ledger
from changeover.jobs.preflight import source_table
from changeover.jobs.prepare import spool_of
from changeover.jobs.replay import LEASE_SECONDS, lease_of
from changeover.jobs.rewrite import require_same_file
from changeover.jobs.transform import BARE
from changeover.jobs.triggerlog import Log
from changeover.position import epoch_floor, format_lsn, parse_lsn
from changeover.session import Connection, application_name, connect
from changeover.spec import TRIGGER, Spec, Table
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
class Side:
    """One store at a fence: its session, and its tables as the gate knows them."""

    dsn: str
    connection: Connection
    tables: tuple[tuple[str, str, tuple[str, ...]], ...]


def fence(spec: Spec, to: Origin, *, max_pause: float = MAX_PAUSE) -> Fenced:
    """Move authority over all rows to a store (driver); capture and replay must be running.

    Raises FenceCalledOff, with writers back where they were, TableStopped, and SlotBlocked before anything was held up.
    """
    with Ledger.open(spec, "fence") as ledger, ledger.lease("fence"), ExitStack() as held:
        present = ledger.authority()
        if to is Origin.NEW and present.store != to.value:
            reverse.open_path(spec, ledger)  # which waits for open transactions, so it comes before anybody else has to
        held.enter_context(_others_rest(spec, ledger))
        old, new = held.enter_context(_sides(spec))
        losing, gaining = (old, new) if to is Origin.NEW else (new, old)
        if present.store == to.value:
            _finish(gaining, present.epoch)
            return Fenced(present.epoch, present.store, present.from_lsn, present.pause_seconds or 0.0)
        epoch = present.epoch + 1
        lacking = _draw_near(spec, ledger, (old, new), to, NEAR * max_pause)
        _prepare_gates(gaining, losing, epoch)
        with _turn(spec, ledger, to) as turn:
            pause = Pause(time.monotonic(), max_pause)
            try:
                if to is Origin.NEW:
                    places = _hand_over(spec, ledger, (old, new), epoch, pause, turn.close)
                else:
                    places = _hand_back(spec, ledger, (old, new), epoch, pause, turn.close, lacking)
                _pass_the_others(spec, gaining, losing, to)
                _make_final(losing, epoch, pause)
                points.reach("fence-final")
                _record(ledger, Authority(epoch, to.value, places[0], present.at, pause.seconds, places[1]), lacking)
                pause.make(Move.RECORD)
            except BaseException:
                _call_off(spec, losing, epoch)
                raise
        _finish(gaining, epoch)
        pause.make(Move.RAISE_FLOOR)
        log.info(
            "epoch %s: the %s store has authority from %s, after %.3f s", epoch, to.value, format_lsn(places[0]), pause.seconds
        )
        return Fenced(epoch, to.value, places[0], pause.seconds, lacking)


def settle(spec: Spec) -> None:
    """Do what a fence that was killed may have left: the store that has authority takes writes, behind its floor (driver)."""
    with Ledger.open(spec, "fence") as ledger, ledger.lease("fence"), _sides(spec) as (old, new):
        present = ledger.authority()
        _finish(new if present.store == Origin.NEW.value else old, present.epoch)


def _finish(gaining: Side, epoch: int) -> None:
    """Raise the floor of the store that has authority on record, and let it write; safe to repeat."""
    for schema, name, key in gaining.tables:
        table = gate.GatedTable(schema, name, key, ())
        if epoch and gate.installed(gaining.connection, table):
            gate.raise_floor(gaining.connection, table, epoch_floor(epoch))
    _let_write(gaining)


def _let_write(side: Side) -> None:
    for schema, name, _ in side.tables:
        refusal.remove(side.connection, schema, name)


def _call_off(spec: Spec, losing: Side, epoch: int) -> None:
    """Give the writers back, unless the ledger holds the new epoch after all: its own word may have been lost on the way.

    Where the ledger can't be asked the refusal stays as it is: two stores that take writes would be worse than none.
    """
    with Ledger.open(spec, "fence") as again:
        if again.authority().epoch < epoch:
            _let_write(losing)


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
def _turn(spec: Spec, ledger: Ledger, to: Origin) -> Iterator[ExitStack]:
    """Hold replay's turn at the gaining store until it is closed.

    The very next batch then begins with all that was written before the fence. A batch under way would make writers wait for it
    and then for the next one.
    """
    assert spec.flag is not None
    with ExitStack() as turn:
        target = spec.flag.target if to is Origin.NEW else reverse.OLD_STORE
        turn.enter_context(ledger.lease(lease_of(target), wait_seconds=LEASE_SECONDS))
        yield turn


def _make_final(losing: Side, epoch: int, pause: Pause) -> None:
    """Take the deadline off the losing store's refusal."""
    if pause.deadline - time.monotonic() < PERMANENT_SECONDS:
        raise FenceCalledOff(pause.seconds, "the last step, which the deadline left no time for")
    for schema, name, _ in losing.tables:
        refusal.make_permanent(losing.connection, schema, name, epoch)


@contextmanager
def _sides(spec: Spec) -> Iterator[tuple[Side, Side]]:
    assert spec.flag is not None
    old_dsn, new_dsn = spec.source.dsn.resolve(), spec.targets[spec.flag.target].dsn_value
    name = application_name(spec.name, "fence")
    with connect(old_dsn, name) as old, connect(new_dsn, name) as new:
        yield (
            Side(old_dsn, old, tuple((*t.source_name, _identity(old, t)) for t in spec.tables)),
            Side(new_dsn, new, tuple((*t.target_name, t.key) for t in spec.tables)),
        )


def _identity(old: Connection, table: Table) -> tuple[str, ...]:
    seen = source_table(old, table)
    return seen.identity if seen else ()


def _prepare_gates(gaining: Side, losing: Side, epoch: int) -> None:
    """Before the pause: the losing store, mirrored to from now on, gets its gate; the gaining one statistics and sequences."""
    for schema, name, key in losing.tables:
        gate.install_gate(losing.connection, schema, name, key, epoch_floor(0))
        gate.raise_floor(losing.connection, gate.GatedTable(schema, name, key, ()), epoch_floor(epoch))
    for schema, name, _ in gaining.tables:
        gaining.connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(schema, name)))
    _advance_sequences(gaining)


def _advance_sequences(gaining: Side) -> None:
    """Before the pause, for this may read whole tables: past every row that has arrived, and past those under way."""
    for schema, name, _ in gaining.tables:
        for sequence in sequences.sequences(gaining.connection, schema, name):
            held = sequences.held(gaining.connection, schema, name, sequence)
            ahead = held + SEQUENCE_MARGIN * sequence.increment if held is not None else None
            sequences.move_past(gaining.connection, sequence, ahead)


def _pass_the_others(spec: Spec, gaining: Side, losing: Side, to: Origin) -> None:
    """In the pause, when nothing is drawn any more: past what the losing store drew, used or not, and past the last rows."""
    for table, (schema, name, _), (lost_schema, lost_name, _) in zip(spec.tables, gaining.tables, losing.tables, strict=True):
        drawn = {
            one.column: sequences.drawn(losing.connection, one)
            for one in sequences.sequences(losing.connection, lost_schema, lost_name)
        }
        for sequence in sequences.sequences(gaining.connection, schema, name):
            others = [drawn.get(column) for column in _same_column(table, sequence.column, to)]
            held = sequences.held(gaining.connection, schema, name, sequence) if sequence.indexed else None
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


def _hand_over(
    spec: Spec, ledger: Ledger, sides: tuple[Side, Side], epoch: int, pause: Pause, go_on: Callable[[], None]
) -> tuple[int, int]:
    """Have the old store refuse, drain, and wait until the new one has everything; return where both stores' logs were then.

    `go_on` lets replay have its turn.
    """
    old, new = sides
    position = _frozen(spec, old, epoch, pause)
    spool = spool_of(spec, ledger.stream("fence").epoch)
    pause.wait(lambda: None if spool.end() >= position else "capture to spool the last writes")
    for table in spec.tables:
        require_same_file(ledger, spool, old.connection, table)
    go_on()
    pause.wait(lambda: _behind(spec, ledger, position))
    pause.make(Move.AWAIT)
    return position, _position(spec, new)


def _hand_back(
    spec: Spec, ledger: Ledger, sides: tuple[Side, Side], epoch: int, pause: Pause, go_on: Callable[[], None], lacking: str | None
) -> tuple[int, int]:
    """Have the new store refuse, drain, and wait until the old one has everything; return where both stores' logs were then.

    Where there is no whole reverse path, that is what the routers' mirrors have brought, as each says after the refusal.
    """
    old, new = sides
    position = _frozen(spec, new, epoch, pause)
    if lacking is None:
        if gap := reverse.parted(spec, ledger, new.connection):
            raise FenceCalledOff(pause.seconds, f"a whole stream: {gap}")
        spool = reverse.spool_of(spec)
        pause.wait(lambda: None if spool.end() >= position else "capture to spool the new store's last writes")
        go_on()
        pause.wait(lambda: _not_back(ledger, position, pause))
    else:
        log.warning("back by the mirror alone, which loses what it dropped: %s", lacking)
        now = ledger.now()
        pause.wait(lambda: _unmirrored(ledger, now))
    pause.make(Move.AWAIT)
    return _position(spec, old), position


def _draw_near(spec: Spec, ledger: Ledger, sides: tuple[Side, Side], to: Origin, seconds: float) -> str | None:
    """Wait, before the pause, until the gaining store has what the losing one holds now; return why it will not have it all.

    Writers go on meanwhile, and the first batch of a replay that has just begun is no part of their pause. Raises FenceCalledOff
    where replay does not come near.
    """
    if to is Origin.OLD and (lacking := reverse.lacking(spec, ledger)):
        return lacking
    losing = sides[to is Origin.OLD]
    position, deadline = _position(spec, losing), time.monotonic() + seconds
    emit_marker(losing.connection, "fence ahead")
    look_at = time.monotonic() + LOOK_SECONDS
    while waiting := _behind(spec, ledger, position) if to is Origin.NEW else _not_back(ledger, position):
        if to is Origin.OLD and time.monotonic() > look_at:
            if lacking := reverse.lacking(spec, ledger):
                return lacking
            look_at = time.monotonic() + LOOK_SECONDS
        if time.monotonic() > deadline:
            raise FenceCalledOff(seconds, f"{waiting}, before anybody is held up")
        time.sleep(0.1)
    return None


def _frozen(spec: Spec, losing: Side, epoch: int, pause: Pause) -> int:
    """Have a store refuse and drain; return its position then, behind which a marker hurries its stream on."""
    for schema, name, _ in losing.tables:
        if not refusal.install(losing.connection, schema, name, epoch, pause.deadline):
            raise FenceCalledOff(pause.seconds, f"the lock on {schema}.{name}")
    pause.make(Move.FREEZE)
    position = _position(spec, losing)
    emit_marker(losing.connection, f"fence {epoch}")
    pause.make(Move.POSITION)
    return position


def _not_back(ledger: Ledger, position: int, pause: Pause | None = None) -> str | None:
    """Return what is missing in the old store; in a pause what stands in the way ends the wait: the next try goes without it."""
    late = [load for load in reverse.loads(ledger) if load.target == reverse.OLD_STORE and load.applied < position]
    for load in late:
        if load.stopped and pause is not None:
            raise FenceCalledOff(pause.seconds, f"{load.source} to come back to the old store, which stands still: {load.stopped}")
    return f"replay to bring {late[0].source} back to the old store, up to {format_lsn(position)}" if late else None


def _position(spec: Spec, side: Side) -> int:
    """Return where a store's log is now: below it stands what is visible, at it or above what commits later."""
    if spec.source.capture == TRIGGER and side.dsn == spec.source.dsn.resolve():
        with windows.log_session(side.dsn, application_name(spec.name, "fence")) as session:
            return windows.cut(session, Log(spec.name))
    row = side.connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return parse_lsn(row[0])


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


def _unmirrored(ledger: Ledger, since: object) -> str | None:
    """On the way back the routers' mirrors must be empty, as each says after the refusal, and must not have lost a write."""
    row = ledger.connection.execute("SELECT now() - interval '10 seconds'").fetchone()
    assert row is not None
    for beat in ledger.heartbeats():
        if beat.at < row[0]:
            continue  # not alive: its queue died with it, and what it lost is in its last counters
        if beat.at <= since:  # type: ignore[operator]
            return f"process {beat.process} to say that its mirror is empty"
        for mirror in mirrors(beat, Origin.OLD):
            if mirror.get("depth"):
                return f"the mirror of process {beat.process}"
    return None


def _record(ledger: Ledger, authority: Authority, lacking: str | None) -> None:
    """Record, by one commit, that authority moves, and that the path back is of no use where it did not bring everything."""
    with ledger.connection.transaction():
        ledger.connection.execute(
            "INSERT INTO changeover.authority (migration, epoch, store, from_lsn, pause_seconds, new_lsn)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            [ledger.migration, authority.epoch, authority.store, format_lsn(authority.from_lsn), authority.pause_seconds,
             format_lsn(authority.new_lsn)],
        )  # fmt: skip
        if lacking is not None:
            reverse.break_off(ledger, f"authority went back without it: {lacking}")
