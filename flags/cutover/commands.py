"""The commands: what `changeover flags` does: show, advance, roll back, and follow a flag that is switched elsewhere.

The flag holds the desired stage, the ledger's epoch the observed one. A step that moves authority
takes effect by its fence alone. The flag is switched first, so that every router already knows
where to go. It is switched back when the fence is called off. Every step, and every refusal, is in
the audit log with the hash of its evidence.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ldclient.migrations.types import Origin, Stage

from changeover.errors import ChangeoverError, LeaseHeld, NotReady, Refused
from changeover.flags import flagfile, history, readiness
from changeover.flags.cutover import moves as by_name
from changeover.flags.cutover import rollout, switch
from changeover.flags.cutover.discovery import Astray, Census
from changeover.flags.cutover.moves import Apart, sentence, together
from changeover.flags.cutover.switch import Advanced, desired_stage, everybody, flag_and_file, require_open, require_reverse, stages
from changeover.flags.fence.fence import MAX_PAUSE, fence, settle
from changeover.flags.observed import Observations, observations
from changeover.flags.rights import waits
from changeover.flags.stages import ORDER, TABLE, effective, next_stage, previous_stage
from changeover.interrupt import asked_to_stop
from changeover.jobs.capture.rogue import Rogue, rogue
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.readdifferences import ReadDifference, recorded
from changeover.jobs.ledger.records import Authority, Heartbeat
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.marker import mark
from changeover.session import application_name, connect
from changeover.spec import Spec
from changeover.tenants import Tenant

__all__ = ["Advanced", "Shown", "advance", "desired_stage", "flag_and_file", "rollback", "show", "watch"]

log = logging.getLogger(__name__)

ACKNOWLEDGED_SECONDS = 5.0
"""How long to wait until every router acts at a new stage; the readiness of the next one asks for it in any case."""

FIGURES = re.compile(r"[0-9A-F]*[0-9][0-9A-F,./:]*")


@dataclass(frozen=True)
class Shown:
    """The page for the night: where the migration stands, what speaks against the next step, and what each step costs.

    `stage` is the one at which routers act; `desired` is the flag's, which waits for a fence where the two differ. `loses` is
    how many writes of rows the step down, to `back`, would leave behind, None if every one since authority moved. `apart` are
    the tenants at the other store. `notes` say how it was found out whether the application may write to the new store, and
    which open transactions a fence would wait for now. `reads` is the percentage of contexts to which the flag serves live by a
    rollout, `recorded_reads` the one that is on record: routers act on it where there is one. `mismatched` are the last shadow
    reads that mismatched, newest first.
    """

    stage: Stage
    desired: Stage
    authority: Authority
    next: Stage | None
    reasons: Sequence[str]
    back: Stage | None
    loses: int | None
    heartbeats: Sequence[Heartbeat]
    longest_pause: float
    reverse_path: reverse.State | None
    rogue: Sequence[Rogue]
    apart: Apart | None = None
    notes: Sequence[str] = ()
    reads: int = 0
    recorded_reads: int = 0
    mismatched: Sequence[ReadDifference] = ()

    @property
    def go(self) -> bool:
        """Return whether the next step is open."""
        return self.next is not None and not self.reasons


def show(spec: Spec) -> Shown:
    """Return where the migration stands and what is missing for the next step (driver; starts no JVM).

    Args:
        spec: The migration's spec.

    Returns:
        The stages, every reason against the next one, and what each step costs.

    Raises:
        ServerUnavailable: A store or the ledger can't be reached.
        StepOrder: Prepare did not run.
        SpecError: The spec has no flag, or its flag file can't be read.
    """
    flag, file = flag_and_file(spec)
    with Ledger.open(spec, "flags") as ledger:
        ledger.stream("flags")
        desired, known = desired_stage(spec), observations(ledger.authorities())
        stage = effective(desired, known.rest.store, history.stage(ledger))
        has = stages(spec)
        above = next_stage(stage, has)
        evidence = readiness.collect(spec, ledger, stage, above, stages=has) if above else None
        reasons = readiness.objections(evidence) if evidence else []
        if above and (apart := together(known, above)):
            reasons = [apart, *reasons]
        back = None if history.completed(history.switches(ledger)) else _below(spec, ledger, known)[1]
        loses = switch.expected(spec, ledger, known.epochs(Origin.NEW) if back and TABLE[back].writes is Origin.OLD else ())
        return Shown(
            stage, desired, ledger.authority(), above, reasons, back, loses, ledger.heartbeats(), MAX_PAUSE,
            reverse.state(spec, ledger), rogue(spec, ledger), by_name.apart(known),
            notes=[*evidence.rights.notes, *waits(spec)] if evidence and readiness.takes_over(stage, evidence.after) else [],
            reads=flagfile.read_reads(file, flag.key), recorded_reads=ledger.reads(),
            mismatched=recorded(ledger.connection, spec.name),
        )  # fmt: skip


def advance(
    spec: Spec, *, to: Stage | None = None, override: str | None = None, tenants: Collection[Tenant] | None = None,
    reads: int | None = None,
) -> Advanced:  # fmt: skip
    """Go one stage up if the evidence says that it is ready, or if `override` says why not to ask (driver).

    With `tenants` these alone go from shadow to live, as many as 10,000 at once. With `reads` the
    stage stays, and so many percent of contexts read from the new store before the writes go there.

    Args:
        spec: The migration's spec.
        to: The stage to go to; None is the one above.
        override: Why the evidence is not asked for; it goes on record.
        tenants: The tenants that go alone; None is everybody.
        reads: The percentage of contexts whose reads go alone; None leaves them.

    Returns:
        The step that was done: both stages, the epoch, and the fence's pause in seconds.

    Raises:
        NotReady: The evidence does not hold; every reason is named.
        FenceCalledOff: The handover took too long; the flag is switched back.
        Refused: There is no stage above, or tenants stand in the way.
        LeaseHeld: Another change of stage is under way.
    """
    flag_and_file(spec)
    with Ledger.open(spec, "flags") as ledger, ledger.lease("flags"):
        ledger.stream("flags advance")
        if tenants is not None:
            return by_name.advance(spec, ledger, tenants, override)
        if reads is not None:
            return rollout.advance(spec, ledger, reads, override)
        known = observations(ledger.authorities())
        before = everybody(spec, ledger, known)
        has = stages(spec)
        after = to or next_stage(before, has)
        if after is None:
            raise Refused("flags advance: the migration is complete, there is no stage above")
        if apart := together(known, after):
            raise Refused(f"flags advance: {apart}")
        evidence = readiness.collect(spec, ledger, before, after, stages=has)
        entry = require_open(ledger, evidence, override, {})
        fenced = switch.switch_flag(spec, ledger, before, after)
        _record(spec, ledger, history.ADVANCED, before, after, entry)
        pause, notes = fenced.pause_seconds if fenced else None, tuple(evidence.rights.notes)
        return Advanced(before, after, _epoch(ledger), pause, notes=notes)


def rollback(spec: Spec, *, tenants: Collection[Tenant] | None = None, reads: int | None = None) -> Advanced:
    """Go one stage down; asks for no evidence (driver).

    With `tenants` these alone go from live to shadow. Without, while some are live and the others
    are not, it is those that go. With `reads` the stage stays, and fewer contexts read from the new
    store.

    Args:
        spec: The migration's spec.
        tenants: The tenants that go alone; None is everybody, or those that are live alone.
        reads: The percentage of contexts whose reads stay there; None leaves them.

    Returns:
        The step that was done: both stages, the epoch, and what a fence left behind.

    Raises:
        Refused: The stage is off, complete was reached, or tenants stand in the way.
        FenceCalledOff: The handover took too long; the flag is switched back.
        LeaseHeld: Another change of stage is under way.
    """
    flag_and_file(spec)
    with Ledger.open(spec, "flags") as ledger, ledger.lease("flags"):
        ledger.stream("flags rollback")
        if tenants is not None:
            return by_name.rollback(spec, ledger, tenants)
        if reads is not None:
            return rollout.rollback(spec, ledger, reads)
        known = observations(ledger.authorities())
        before, after = _below(spec, ledger, known)
        require_reverse(ledger, before)
        if after is None:
            raise Refused(f"flags rollback: {before.value} is the first stage, there is none below")
        epochs = known.epochs(Origin.NEW) if TABLE[after].writes is Origin.OLD else frozenset()
        fenced = switch.switch_flag(spec, ledger, before, after)
        lost = switch.lost(spec, ledger, epochs, fenced) if fenced else 0
        lacking = fenced.lacking if fenced else None
        _record(spec, ledger, history.ROLLED_BACK, before, after, {"lost": lost, "lacking": lacking})
        return Advanced(before, after, _epoch(ledger), fenced.pause_seconds if fenced else None, lost, lacking)


def _below(spec: Spec, ledger: Ledger, known: Observations) -> tuple[Stage, Stage | None]:
    """Return from which stage a rollback of all rows leads to which: where tenants are live alone, it is these that go back."""
    stage = everybody(spec, ledger, known)
    if known.rest.store is Origin.OLD and Origin.NEW in known.stores:
        return Stage.LIVE, stage
    return stage, previous_stage(stage, stages(spec))


def _epoch(ledger: Ledger) -> int:
    return observations(ledger.authorities()).epoch


def _record(spec: Spec, ledger: Ledger, outcome: str, before: Stage, after: Stage, entry: Mapping[str, Any]) -> None:
    """Put a switch on record, with the position at which the mirror began if it did."""
    begins = TABLE[after].mirrors and not TABLE[before].mirrors
    history.record(ledger, outcome, before, after, _mirror_lsn(spec, ledger, after) if begins else None, entry)


def _mirror_lsn(spec: Spec, ledger: Ledger, stage: Stage) -> int:
    """Return the old store's position once every router acts at a stage, and have the stream pass it though nobody writes."""
    deadline = time.monotonic() + ACKNOWLEDGED_SECONDS
    while any(b.stage != stage.value for b in ledger.heartbeats() if b.alive(ledger.now())) and time.monotonic() < deadline:
        time.sleep(0.1)
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "flags")) as old:
        return mark(old, f"mirrored from {stage.value}")


def watch(spec: Spec, stop: threading.Event, *, every: float = 0.5, say: Callable[[str], object] = lambda line: None) -> bool:
    """Follow a flag that is switched elsewhere until `stop`, Ctrl-C or SIGTERM: ask for readiness, fence, write the epoch (driver).

    What is not ready is asked again. Where the spec names a column of tenants, those of which the
    flag asks something else than of everybody move by name, together. A fence that is under way at
    the end is brought to its own end.

    Args:
        spec: The migration's spec.
        stop: What ends it when it is set.
        every: For how many seconds it waits between two looks at the flag.
        say: What gets a sentence for each switch, and for each reason against one.

    Returns:
        Whether a signal ended it.

    Raises:
        StepOrder: Prepare did not run.
        SpecError: The spec has no flag, or its flag file can't be read at the start.
    """
    with Ledger.open(spec, "flags watch") as ledger:
        ledger.stream("flags watch")
    desired_stage(spec)
    census = Census(spec) if spec.flag is not None and spec.flag.context is not None else None
    with suppress(LeaseHeld):  # a fence that is under way leaves things in order by itself
        settle(spec)
    last: str | None = None
    with asked_to_stop(stop) as asked:
        while not stop.is_set():
            try:
                message = _follow(spec, census)
            except LeaseHeld:
                message = last  # a command of ours switches the flag at this moment
            except ChangeoverError as error:
                message = str(error)
                if isinstance(error, NotReady) and _is_new(message, last):
                    _record_refusal(spec, error)
            if message is not None and _is_new(message, last):
                log.info("%s", message)
                say(message)
            last = message
            stop.wait(every)
        return asked()


def _is_new(message: str, last: str | None) -> bool:
    """Return whether a sentence says more than the one before, its counts and positions left out: those move all the time."""
    return last is None or FIGURES.sub("", message) != FIGURES.sub("", last)


def _record_refusal(spec: Spec, closed: NotReady) -> None:
    with Ledger.open(spec, "flags watch") as ledger:
        entry = {"from": _on_record(ledger).value, "to": closed.stage, "reasons": closed.reasons, "override": None}
        ledger.audit(history.STEP, "refused", entry)


def _follow(spec: Spec, census: Census | None = None) -> str | None:
    """Make one look; return what was done, None where the desired stage is the observed one. Raises NotReady and FenceCalledOff.

    Who goes back to the old store goes first: nothing that keeps others from going up may keep these.
    """
    with Ledger.open(spec, "flags watch") as ledger:
        desired, known = desired_stage(spec), observations(ledger.authorities())
        if _is_observed(ledger, desired, known) and _astray(census, known) == Astray():
            return None
        with ledger.lease("flags"):
            desired, known = desired_stage(spec), observations(ledger.authorities())
            astray = _astray(census, known)
            all_back = known.rest.store is Origin.NEW and TABLE[desired].writes is Origin.OLD
            if astray.back and not all_back:
                return by_name.follow(spec, ledger, astray.back, Origin.OLD)
            if not _is_observed(ledger, desired, known):
                return _follow_everybody(spec, ledger, desired, known)
            return by_name.follow(spec, ledger, astray.up, Origin.NEW) if astray.up else None


def _astray(census: Census | None, known: Observations) -> Astray:
    return census.look(known) if census is not None else Astray()


def _follow_everybody(spec: Spec, ledger: Ledger, desired: Stage, known: Observations) -> str:
    """Follow the flag's switch for everybody."""
    before, to = _on_record(ledger), TABLE[desired].writes
    if known.rest.store is to:
        if waits := together(known, desired):
            raise Refused(waits)
        if to is Origin.NEW and ORDER.index(desired) > ORDER.index(before):
            # one at a time: each has evidence of its own, and the last is for good
            desired = next_stage(before, stages(spec)) or desired
            readiness.require(readiness.collect(spec, ledger, before, desired, stages=stages(spec)))
        _record(spec, ledger, history.FOLLOWED, before, desired, {})
        return f"the flag was switched from {before.value} to {desired.value}"
    if to is Origin.NEW:
        readiness.require(readiness.collect(spec, ledger, effective(desired, Origin.OLD, None), desired, stages=stages(spec)))
    else:
        require_reverse(ledger, before)
    fenced = fence(spec, to)
    lost = switch.lost(spec, ledger, known.epochs(Origin.NEW), fenced) if to is Origin.OLD else 0
    _record(spec, ledger, history.FOLLOWED, before, desired, {"epoch": fenced.epoch, "pause": fenced.pause_seconds, "lost": lost})
    return sentence(f"the flag was switched from {before.value} to {desired.value}", fenced, lost)


def _on_record(ledger: Ledger) -> Stage:
    switches = history.switches(ledger)
    return switches[0].after if switches else ORDER[0]


def _is_observed(ledger: Ledger, desired: Stage, known: Observations) -> bool:
    return _on_record(ledger) is desired and known.rest.store is TABLE[desired].writes
