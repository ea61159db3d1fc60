"""Cutover: what `changeover flags` does: show, advance, roll back, and follow a wish turned elsewhere.

The flag is the wish, the ledger's epoch the fact. A step that moves authority takes effect by its fence alone; the flag is turned
first, so that every router already knows where to go, and turned back when the fence is called off. Every step, and every
refusal, is in the audit log with the hash of its evidence.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldclient.migrations.types import Origin, Stage

from changeover.errors import ChangeoverError, GateClosed, LeaseHeld, Refused, SpecError
from changeover.flags import flagfile, gate, turns
from changeover.flags.fence import MAX_PAUSE, Fenced, fence, settle
from changeover.flags.stages import ORDER, TABLE, effective, next_stage, previous_stage
from changeover.interrupt import asked_to_stop
from changeover.jobs import reverse
from changeover.jobs.capture import emit_marker
from changeover.jobs.entries import Authority, Heartbeat
from changeover.jobs.ledger import Ledger
from changeover.jobs.rogue import Rogue, rogue
from changeover.position import parse_lsn
from changeover.session import application_name, connect
from changeover.spec import Flag, Spec

log = logging.getLogger(__name__)

ACKNOWLEDGED_SECONDS = 5.0
"""How long to wait until every router acts at a new stage; the gate of the next one asks for it in any case."""

FIGURES = re.compile(r"[0-9A-F]*[0-9][0-9A-F,./:]*")


@dataclass(frozen=True)
class Advanced:
    """A step that was done, up or down.

    `pause_seconds` is how long the fence held writers up, None without a fence; `lost` how many writes of rows a step down left
    behind in the new store, which never reached the old one, as far as routers know; `lacking` is why the old store got what their
    mirrors brought alone, None where it got everything.
    """

    before: Stage
    after: Stage
    epoch: int
    pause_seconds: float | None
    lost: int = 0
    lacking: str | None = None


@dataclass(frozen=True)
class Shown:
    """The page for the night: where the migration stands, what speaks against the next step, and what each step costs.

    `stage` is the one at which routers act; `wish` is the flag's, which waits for a fence where the two differ. `loses` is how
    many writes of rows the step down, to `back`, would leave behind.
    """

    stage: Stage
    wish: Stage
    authority: Authority
    next: Stage | None
    reasons: Sequence[str]
    back: Stage | None
    loses: int
    heartbeats: Sequence[Heartbeat]
    longest_pause: float
    way_back: reverse.State | None
    rogue: Sequence[Rogue]

    @property
    def go(self) -> bool:
        """Return whether the next step is open."""
        return self.next is not None and not self.reasons


def flag_of(spec: Spec) -> tuple[Flag, Path]:
    """Return the spec's flag and its data file; raises SpecError where the spec has none."""
    if spec.flag is None:
        raise SpecError(spec.path, "flag", "is missing: name the flag's key, its target and its data file")
    return spec.flag, Path(spec.flag.file) if spec.flag.file else spec.work / "flags.json"


def wished(spec: Spec) -> Stage:
    """Return the stage that the flag's data file asks for."""
    flag, file = flag_of(spec)
    return flagfile.read_stage(file, flag.key)


def show(spec: Spec) -> Shown:
    """Return where the migration stands and what the gate says of the next step (driver; starts no JVM)."""
    flag_of(spec)
    with Ledger.open(spec, "flags") as ledger:
        ledger.stream("flags")
        wish, authority = wished(spec), ledger.authority()
        stage = effective(wish, Origin(authority.store))
        above = next_stage(stage)
        reasons = gate.objections(gate.collect(spec, ledger, stage, above)) if above else []
        back = None if turns.completed(turns.turns(ledger)) else previous_stage(stage)
        return Shown(
            stage, wish, authority, above, reasons, back, losses(ledger, stage, back), ledger.heartbeats(), MAX_PAUSE,
            reverse.state(spec, ledger), rogue(spec, ledger),
        )  # fmt: skip


def advance(spec: Spec, *, to: Stage | None = None, override: str | None = None) -> Advanced:
    """Go one stage up if the gate's evidence holds, or if `override` says why not to ask (driver).

    Raises GateClosed with every reason, and FenceCalledOff with the flag turned back.
    """
    flag_of(spec)
    with Ledger.open(spec, "flags") as ledger, ledger.lease("flags"):
        ledger.stream("flags advance")
        before = effective(wished(spec), Origin(ledger.authority().store))
        after = to or next_stage(before)
        if after is None:
            raise Refused("flags advance: the migration is complete, there is no stage above")
        evidence = gate.collect(spec, ledger, before, after)
        reasons = gate.objections(evidence)
        told = {"evidence": evidence.digest, "reasons": reasons, "override": override}
        if reasons and not override:
            ledger.audit(turns.STEP, "refused", {"from": before.value, "to": after.value, **told})
            raise GateClosed(after.value, tuple(reasons))
        done = _turn(spec, ledger, before, after)
        _record(spec, ledger, turns.ADVANCED, before, after, told)
        return Advanced(before, after, ledger.authority().epoch, done.pause_seconds if done else None)


def rollback(spec: Spec) -> Advanced:
    """Go one stage down; asks no gate (driver). Raises Refused at off and once complete was reached, and FenceCalledOff."""
    flag_of(spec)
    with Ledger.open(spec, "flags") as ledger, ledger.lease("flags"):
        ledger.stream("flags rollback")
        before = effective(wished(spec), Origin(ledger.authority().store))
        _require_way_back(ledger, before)
        after = previous_stage(before)
        if after is None:
            raise Refused(f"flags rollback: {before.value} is the first stage, there is none below")
        expected = losses(ledger, before, after)
        lost_in = ledger.authority()
        done = _turn(spec, ledger, before, after)
        lost = _lost(ledger, lost_in, done) if done else expected
        lacking = done.lacking if done else None
        _record(spec, ledger, turns.ROLLED_BACK, before, after, {"lost": lost, "lacking": lacking})
        return Advanced(before, after, ledger.authority().epoch, done.pause_seconds if done else None, lost, lacking)


def losses(ledger: Ledger, before: Stage, after: Stage | None) -> int:
    """Return how many writes a step down would lose: those that never reached the store to which authority goes back."""
    if after is None or TABLE[before].writes is TABLE[after].writes:
        return 0
    if reverse.whole(ledger) is None:
        return 0
    return gate.lost(ledger.heartbeats(), ledger.authority(), ledger.now())


def _lost(ledger: Ledger, authority: Authority, done: Fenced) -> int:
    """Return how many writes a fence back has lost: none where the reverse path brought them all."""
    return gate.lost(ledger.heartbeats(), authority, ledger.now()) if done.lacking is not None else 0


def _require_way_back(ledger: Ledger, before: Stage) -> None:
    """Refuse once complete was reached, wherever the flag points by now: since then the old store got no write."""
    if before is Stage.COMPLETE or turns.completed(turns.turns(ledger)):
        raise Refused("flags rollback: complete was reached, there is no way back: the old store lacks every write since")


def _turn(spec: Spec, ledger: Ledger, before: Stage, after: Stage) -> Fenced | None:
    """Turn the flag, and move authority where the stage asks for it; the flag goes back if that fails."""
    flag, file = flag_of(spec)
    wish = flagfile.read_stage(file, flag.key)
    if TABLE[before].writes is TABLE[after].writes:
        settle(spec)
        flagfile.write_stage(file, flag.key, after)
        return None
    try:
        flagfile.write_stage(file, flag.key, after)
        return fence(spec, TABLE[after].writes)
    except BaseException:
        # the ledger's word counts: what broke off may have done so after authority had moved
        if ledger.authority().store != TABLE[after].writes.value:
            flagfile.write_stage(file, flag.key, wish)
        raise


def _record(spec: Spec, ledger: Ledger, outcome: str, before: Stage, after: Stage, told: Mapping[str, Any]) -> None:
    """Put a turn on record, with the position at which the mirror began if it did."""
    begins = TABLE[after].mirrors and not TABLE[before].mirrors
    turns.record(ledger, outcome, before, after, _mirror_lsn(spec, ledger, after) if begins else None, told)


def _mirror_lsn(spec: Spec, ledger: Ledger, stage: Stage) -> int:
    """Return the old store's position once every router acts at a stage, and have the stream pass it though nobody writes."""
    deadline = time.monotonic() + ACKNOWLEDGED_SECONDS
    while any(b.stage != stage.value for b in ledger.heartbeats() if gate.alive(b, ledger.now())) and time.monotonic() < deadline:
        time.sleep(0.1)
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "flags")) as old:
        row = old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
        emit_marker(old, f"mirrored from {stage.value}")
        return parse_lsn(row[0])


def watch(spec: Spec, stop: threading.Event, *, every: float = 0.5, say: Callable[[str], object] = lambda line: None) -> bool:
    """Follow a flag that is turned elsewhere: ask the gate, fence, write the epoch, until `stop`, Ctrl-C or SIGTERM (driver).

    `say` gets a sentence for each turn, and for each reason against one; a closed gate is asked again. Returns whether a signal
    ended it; a fence that is under way then is brought to its end. Raises what is wrong at the start: StepOrder, SpecError.
    """
    with Ledger.open(spec, "flags watch") as ledger:
        ledger.stream("flags watch")
    wished(spec)
    with suppress(LeaseHeld):  # a fence that is under way leaves things in order by itself
        settle(spec)
    said: str | None = None
    with asked_to_stop(stop) as asked:
        while not stop.is_set():
            try:
                told = _follow(spec)
            except LeaseHeld:
                told = said  # a command of ours turns the flag at this moment
            except ChangeoverError as error:
                told = str(error)
                if isinstance(error, GateClosed) and _is_new(told, said):
                    _record_refusal(spec, error)
            if told is not None and _is_new(told, said):
                log.info("%s", told)
                say(told)
            said = told
            stop.wait(every)
        return asked()


def _is_new(told: str, said: str | None) -> bool:
    """Return whether a sentence says more than the one before, its counts and positions left out: those move all the time."""
    return said is None or FIGURES.sub("", told) != FIGURES.sub("", said)


def _record_refusal(spec: Spec, closed: GateClosed) -> None:
    with Ledger.open(spec, "flags watch") as ledger:
        told = {"from": _on_record(ledger).value, "to": closed.stage, "reasons": closed.reasons, "override": None}
        ledger.audit(turns.STEP, "refused", told)


def _follow(spec: Spec) -> str | None:
    """Make one look; return what was done, None where the wish is the fact already. Raises GateClosed and FenceCalledOff."""
    with Ledger.open(spec, "flags watch") as ledger:
        if _is_fact(ledger, wished(spec)):
            return None
        with ledger.lease("flags"):
            wish, before = wished(spec), _on_record(ledger)
            if _is_fact(ledger, wish):
                return None
            wanted, authority = TABLE[wish].writes, ledger.authority()
            if authority.store == wanted.value:
                _record(spec, ledger, turns.FOLLOWED, before, wish, {})
                return f"the flag was turned from {before.value} to {wish.value}"
            if wanted is Origin.NEW:
                _ask(spec, ledger, wish)
            else:
                _require_way_back(ledger, before)
            done = fence(spec, wanted)
            lost = _lost(ledger, authority, done)
            _record(spec, ledger, turns.FOLLOWED, before, wish, {"epoch": done.epoch, "pause": done.pause_seconds, "lost": lost})
        left = f"; lost: {lost} writes that never reached the old store" if lost else ""
        return (
            f"the flag was turned from {before.value} to {wish.value}: the {done.store} store has authority (epoch {done.epoch}),"
            f" writers were held up {done.pause_seconds:.2f} s at most{left}"
        )


def _on_record(ledger: Ledger) -> Stage:
    found = turns.turns(ledger)
    return found[0].after if found else ORDER[0]


def _is_fact(ledger: Ledger, wish: Stage) -> bool:
    return _on_record(ledger) is wish and ledger.authority().store == TABLE[wish].writes.value


def _ask(spec: Spec, ledger: Ledger, wish: Stage) -> None:
    """Ask the gate to where authority moves; until then every router acts at the stage below it, whatever the flag says."""
    before = effective(wish, Origin.OLD)
    evidence = gate.collect(spec, ledger, before, wish)
    reasons = gate.objections(evidence)
    if reasons:
        raise GateClosed(wish.value, tuple(reasons))
