"""Cutover: what `changeover flags` does: show, advance, roll back, and follow a wish turned elsewhere.

The flag is the wish, the ledger's epoch the fact. A step that moves authority takes effect by its fence alone; the flag is turned
first, so that every router already knows where to go, and turned back when the fence is called off. Every step, and every
refusal, is in the audit log with the hash of its evidence.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldclient.migrations.types import Origin, Stage

from changeover.errors import ChangeoverError, GateClosed, Refused, SpecError
from changeover.flags import flagfile, gate
from changeover.flags.fence import MAX_PAUSE, Fenced, fence
from changeover.flags.stages import TABLE, next_stage, previous_stage
from changeover.jobs.entries import Authority, Heartbeat
from changeover.jobs.ledger import Ledger
from changeover.spec import Flag, Spec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Advanced:
    """A step that was done; `pause_seconds` is how long the fence held writers up, None without a fence."""

    before: Stage
    after: Stage
    epoch: int
    pause_seconds: float | None


@dataclass(frozen=True)
class Shown:
    """The page for the night: where the migration stands, what speaks against the next step, and what the step costs."""

    stage: Stage
    authority: Authority
    next: Stage | None
    reasons: Sequence[str]
    heartbeats: Sequence[Heartbeat]
    longest_pause: float

    @property
    def go(self) -> bool:
        """Return whether the next step is open."""
        return self.next is not None and not self.reasons


def flag_of(spec: Spec) -> tuple[Flag, Path]:
    """Return the spec's flag and its data file; raises SpecError where the spec has none."""
    if spec.flag is None:
        raise SpecError(spec.path, "flag", "is missing: name the flag's key, its target and its data file")
    return spec.flag, Path(spec.flag.file) if spec.flag.file else spec.work / "flags.json"


def show(spec: Spec) -> Shown:
    """Return where the migration stands and what the gate says of the next step (driver; starts no JVM)."""
    flag, file = flag_of(spec)
    with Ledger.open(spec, "flags") as ledger:
        ledger.stream("flags")
        stage = flagfile.read_stage(file, flag.key)
        above = next_stage(stage)
        reasons = gate.objections(gate.collect(spec, ledger, stage, above)) if above else []
        return Shown(stage, ledger.authority(), above, reasons, ledger.heartbeats(), MAX_PAUSE)


def advance(spec: Spec, *, to: Stage | None = None, override: str | None = None) -> Advanced:
    """Go one stage up if the gate's evidence holds, or if `override` says why not to ask (driver).

    Raises GateClosed with every reason, and FenceCalledOff with the flag turned back.
    """
    flag, file = flag_of(spec)
    with Ledger.open(spec, "flags") as ledger, ledger.lease("flags"):
        ledger.stream("flags advance")
        before = flagfile.read_stage(file, flag.key)
        after = to or next_stage(before)
        if after is None:
            raise Refused("flags advance: the migration is complete, there is no stage above")
        evidence = gate.collect(spec, ledger, before, after)
        reasons = gate.objections(evidence)
        told = {
            "from": before.value,
            "to": after.value,
            "evidence": evidence.digest,
            "reasons": reasons,
            "override": override,
        }
        if reasons and not override:
            ledger.audit("flags", "refused", told)
            raise GateClosed(after.value, tuple(reasons))
        done = _turn(spec, file, flag.key, before, after)
        ledger.audit("flags", "advanced", told)
        return Advanced(before, after, ledger.authority().epoch, done.pause_seconds if done else None)


def rollback(spec: Spec) -> Advanced:
    """Go one stage down; asks no gate (driver). Raises Refused at off and at complete, and FenceCalledOff."""
    flag, file = flag_of(spec)
    with Ledger.open(spec, "flags") as ledger, ledger.lease("flags"):
        ledger.stream("flags rollback")
        before = flagfile.read_stage(file, flag.key)
        after = previous_stage(before)
        if after is None:
            raise Refused(f"flags rollback: there is no way down from {before.value}")
        done = _turn(spec, file, flag.key, before, after)
        ledger.audit("flags", "rolled back", {"from": before.value, "to": after.value, "lost": losses(ledger)})
        return Advanced(before, after, ledger.authority().epoch, done.pause_seconds if done else None)


def losses(ledger: Ledger) -> int:
    """Return how many mirrored writes never reached the old store: what a rollback over the fence would lose."""
    counts = [m for beat in ledger.heartbeats() for m in gate.mirrors(beat, Origin.OLD)]
    return sum(int(c.get("failed", 0)) + int(c.get("dropped", 0)) for c in counts)


def _turn(spec: Spec, file: Path, key: str, before: Stage, after: Stage) -> Fenced | None:
    """Turn the flag, and move authority where the stage asks for it; the flag goes back if that fails."""
    flagfile.write_stage(file, key, after)
    if TABLE[before].writes is TABLE[after].writes:
        return None
    try:
        return fence(spec, TABLE[after].writes)
    except BaseException:
        flagfile.write_stage(file, key, before)
        raise


def watch(spec: Spec, stop: threading.Event, *, every: float = 0.5) -> None:
    """Follow a wish that was turned elsewhere: ask the gate and fence, until `stop` is set (driver).

    A closed gate is logged once and asked again; routers keep to the ledger meanwhile.
    """
    flag, file = flag_of(spec)
    said: str | None = None
    while not stop.wait(every):
        wish = flagfile.read_stage(file, flag.key)
        try:
            said = _follow(spec, wish, said)
        except ChangeoverError as error:
            if str(error) != said:
                said = str(error)
                log.warning("%s", said)


def _follow(spec: Spec, wish: Stage, said: str | None) -> str | None:
    wanted = TABLE[wish].writes
    with Ledger.open(spec, "flags") as ledger:
        if ledger.authority().store == wanted.value:
            return None
        if wanted is Origin.NEW:
            reasons = gate.objections(gate.collect(spec, ledger, Stage.SHADOW, Stage.LIVE))
            if reasons:
                raise GateClosed(Stage.LIVE.value, tuple(reasons))
        with ledger.lease("flags"):
            done = fence(spec, wanted)
            ledger.audit("flags", "followed", {"wish": wish.value, "epoch": done.epoch, "pause": done.pause_seconds})
    return said
