"""The tour: the steps of the demo, in one table that is walked from top to bottom, each by the product's own function.

A step returns one line that says what came of it; the time of each is taken. Nothing in a step goes on after an error, and
before each one the processes and threads beside it are looked at, so that none can die unseen.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ldclient.migrations.types import Stage

from changeover import pipeline
from changeover.demo.damage import KINDS
from changeover.demo.follow import Follower
from changeover.demo.patience import Patience, tasks_done
from changeover.demo.place import Place
from changeover.demo.processes import ApplicationProcess, Child, capture
from changeover.demo.schema import Shape
from changeover.errors import CouldNotCheck, CouldNotFinish, NotReady, UnsafePlan
from changeover.flags.cutover import commands as cutover
from changeover.jobs import finalize as finalizing
from changeover.jobs import prepare
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.progress import progress
from changeover.jobs.load import copier
from changeover.jobs.preflight.division import examined
from changeover.jobs.source.marker import emit_marker
from changeover.position import format_lsn
from changeover.session import connect, wal_position
from changeover.spec import Spec
from changeover.verifiers.compare.verdict import Difference, Verdict
from changeover.verifiers.verification import verify

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMPARED_READS = 200
"""Compared reads to wait for at shadow and at live: twice what readiness asks for."""

GATE_TRIES = 5
VERIFY_TRIES = 3


@dataclass
class Figures:
    """What the summary tells: rows a second of the backfill, bytes of WAL behind once caught up, and so on."""

    backfilled: int = 0
    rate: float = 0.0
    lag: int = 0
    ghosts_prevented: int = 0
    pause: float | None = None
    leftovers: list[str] | None = None


@dataclass
class Tour:
    """What the steps share."""

    place: Place
    spec: Spec
    spark: SparkSession
    shape: Shape
    application: ApplicationProcess
    replay: Follower
    capture: Child | None = None
    stage: Stage = Stage.OFF
    verdicts: list[Verdict] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    seconds: dict[str, float] = field(default_factory=dict)

    def require_alive(self) -> None:
        """Raise what ended a process or a thread beside the steps."""
        self.application.child.require_alive()
        self.replay.require_alive()
        if self.capture is not None:
            self.capture.require_alive()

    def wait(self, waiting: Callable[[], str | None]) -> None:
        """Wait until nothing is waited for any more, as long as a position or a task of Spark's moves; raises CouldNotFinish."""
        with Ledger.open(self.spec, "demo") as ledger:
            patience = Patience(lambda: (*(load.applied for load in ledger.loads()), *tasks_done(self.spark)))
            while why := waiting():
                self.require_alive()
                patience.require(why)
                time.sleep(0.05)

    def run(self, step: Step) -> str:
        """Run one step and take its time."""
        self.require_alive()
        started = time.monotonic()
        said = step.action(self)
        self.seconds[step.name] = round(time.monotonic() - started, 2)
        return said


@dataclass(frozen=True)
class Step:
    """One step: its name, and what it does."""

    name: str
    action: Callable[[Tour], str]


def check(tour: Tour) -> str:
    """Ask whether the plan is safe."""
    found = examined(tour.spec)
    if found.reasons:
        raise UnsafePlan(tuple(found.reasons))
    return "the plan is safe: key, replica identity, types, rights and targets"


def plan(tour: Tour) -> str:
    """List the steps of the pipeline, as `changeover plan` prints them with their locks."""
    return ", ".join(step.name for step in pipeline.STEPS) + "; then the flag, stage by stage"


def prepare_both(tour: Tour) -> str:
    """Make slot and snapshot, ledger, target tables and gates."""
    made = prepare.prepare(tour.spec, tour.spark)
    return f"slot {made.stream.slot} and snapshot from one command, at {format_lsn(made.stream.l0)}"


def start_capture(tour: Tour) -> str:
    """Start capture, and replay once, so that tombstones stand before the first row is loaded; then go on with both."""
    tour.capture = capture(tour.place.spec_file, tour.place.root)
    tour.replay.start()
    _pass_marker(tour, ["store"])
    return f"process {tour.capture.process.pid} spools the change stream; replay began"


def load_both(tour: Tour) -> str:
    """Load the snapshot into both targets while the application goes on writing."""
    started = time.monotonic()
    with progress(tour.spec, "backfill"):
        loaded = {one.target: one for one in copier.backfill(tour.spec, tour.spark)}
    figures = tour.figures
    figures.backfilled = loaded["store"].rows
    figures.rate = sum(one.rows for one in loaded.values()) / (time.monotonic() - started)
    figures.ghosts_prevented = sum(one.refused + one.swept for one in loaded.values())
    return (
        f"{figures.backfilled:,} rows in {loaded['store'].chunks} chunks to each target, {figures.rate:,.0f} rows/s;"
        f" {figures.ghosts_prevented} ghosts prevented"
    )


def catch_up(tour: Tour) -> str:
    """Wait until replay has caught up, in the lake too, where it began when all chunks were in."""
    tour.figures.lag = _pass_marker(tour, ["store", "lake"])
    return f"both targets follow the stream, {tour.figures.lag:,} bytes of WAL behind"


def first_verify(tour: Tour) -> str:
    """Compare every row of both targets with the old store at one LSN."""
    tour.verdicts = _verified(tour)
    return _said(tour.verdicts)


def dualwrite(tour: Tour) -> str:
    """Let the application write to both, and replay pass what was written to the old store alone."""
    said = _advance(tour, Stage.DUALWRITE)
    _pass_marker(tour, ["store"])
    return f"{said}; replay has passed the last write that was not mirrored"


def shadow(tour: Tour) -> str:
    """Let the application read from both and compare."""
    said = _advance(tour, Stage.SHADOW)
    reads = _compared(tour, Stage.SHADOW)
    return f"{said}; {reads['compared']:,} shadow reads compared, {reads['mismatched']} mismatched"


def _compared(tour: Tour, stage: Stage) -> dict[str, int]:
    """Wait until enough reads were compared at a stage for the next one; return their counts."""
    seen = tour.application.wait_for(
        f"reads compared at {stage.value}",
        lambda status: (
            status["router"]["comparisons"]["at_stage"]["stage"] == stage.value
            and status["router"]["comparisons"]["at_stage"]["compared"] >= COMPARED_READS
        ),
    )
    found: dict[str, int] = seen["router"]["comparisons"]["at_stage"]
    return found


def live(tour: Tour) -> str:
    """Fence: authority moves to the new store."""
    _require_equal(_verified(tour, ["store"]))
    said = _advance(tour, Stage.LIVE)
    _reach_fence(tour)
    wait = tour.application.status()["router"]["longest_wait_seconds"]
    return f"{said}; fenced in {tour.figures.pause or 0:.2f} s, the longest wait of a writer was {wait:.2f} s"


def rampdown(tour: Tour) -> str:
    """Stop comparing, once enough reads were compared under the new authority; the old store is still mirrored to."""
    _compared(tour, Stage.LIVE)
    return _advance(tour, Stage.RAMPDOWN)


def last_verify(tour: Tour) -> str:
    """Compare the old store with the new one as both are, and the lake at the fence's position."""
    tour.verdicts = _verified(tour)
    return _said(tour.verdicts)


def complete(tour: Tour) -> str:
    """Stop mirroring. The application goes on; it takes back what it writes from here, so that anyone can compare."""
    tour.application.child.signal(signal.SIGUSR1)
    tour.application.wait_for("an empty mirror", lambda seen: seen["traceless"] and not seen["router"]["mirror_old"]["depth"])
    return _advance(tour, Stage.COMPLETE)


def finalize(tour: Tour) -> str:
    """Remove what is ours, end the application last, and list what is left in the old store."""
    tour.replay.stop()
    if tour.capture is not None:
        tour.capture.end()
        tour.capture = None
    removed = finalizing.finalize(tour.spec)
    writes = tour.application.status()["writes"]
    tour.application.wait_for("writes after finalize", lambda seen: seen["writes"] > writes)
    tour.application.end()
    tour.figures.leftovers = leftovers(tour.spec)
    left = ", ".join(tour.figures.leftovers) or "nothing"
    return f"removed {len(removed)} things; left of ours in the old store: {left}"


STEPS = (
    Step("check", check),
    Step("plan", plan),
    Step("prepare", prepare_both),
    Step("capture", start_capture),
    Step("backfill", load_both),
    Step("replay", catch_up),
    Step("verify", first_verify),
    Step("dualwrite", dualwrite),
    Step("shadow", shadow),
    Step("live", live),
    Step("rampdown", rampdown),
    Step("last verify", last_verify),
    Step("complete", complete),
    Step("finalize", finalize),
)
"""The whole way, in order."""


def steps(broken: Sequence[str]) -> tuple[Step, ...]:
    """Return the steps of a run: the whole way, or up to the first verdict and then damage and another verdict."""
    if not broken:
        return STEPS
    broken = tuple(dict.fromkeys(broken))  # what is done already can't be done again
    upto = next(place for place, step in enumerate(STEPS) if step.action is first_verify)
    return (*STEPS[: upto + 1], Step(f"break {', '.join(broken)}", lambda tour: damage(tour, broken)))


def damage(tour: Tour, kinds: Sequence[str]) -> str:
    """Damage the new store behind its back and verify.

    Raises CouldNotFinish where the verdict does not name all that was done, or names anything else.
    """
    with connect(tour.place.dsns["old"], "demo:damage") as old, connect(tour.place.dsns["new"], "demo:damage") as new:
        done = [KINDS[kind](old, new, tour.wait) for kind in kinds]
    tour.verdicts = _verified(tour)
    found = [d for v in tour.verdicts if v.target == "store" for d in v.sample]
    told = [next(filter(one.is_told, found), None) for one in done]
    others = [d for d in found if not any(one.is_told(d) for one in done)]
    if None in told or others:
        wrong = f"verify did not name it: {done[told.index(None)].done}" if None in told else f"verify named {_named(others[0])}"
        raise CouldNotFinish(f"{wrong}: this is a defect of changeover, please report it")
    return "; ".join(f"{one.done}: {_named(d)}" for one, d in zip(done, told, strict=True) if d is not None)


def _named(difference: Difference) -> str:
    key = ", ".join(f"{name}={value}" for name, value in difference.key.items())
    columns = f" in column {', '.join(difference.columns)}" if difference.columns else ""
    return f"class {difference.kind}, key ({key}){columns}"


def _said(verdicts: list[Verdict]) -> str:
    return "; ".join(f"{v.target}: {v.word}, {v.source_rows:,} rows, {v.positions}" for v in verdicts)


def _verified(tour: Tour, targets: list[str] | None = None) -> list[Verdict]:
    """Verify, and again where rows that were written all the while left the question open."""
    for _ in range(VERIFY_TRIES - 1):
        with suppress(CouldNotCheck):
            return verify(tour.spec, tour.spark, targets=targets)
    return verify(tour.spec, tour.spark, targets=targets)


def _require_equal(verdicts: list[Verdict]) -> None:
    different = [v for v in verdicts if not v.equal]
    if different:
        raise NotReady("live", (f"{different[0].target} is different: {different[0].counts}",))


def _advance(tour: Tour, stage: Stage) -> str:
    """Go one stage up, with a fresh verdict where readiness asks for one, and wait for the application to be there."""
    asked: tuple[str, ...] = ()
    for _ in range(GATE_TRIES):
        try:
            done = cutover.advance(tour.spec, to=stage)
            break
        except NotReady as closed:
            asked = closed.reasons
            _require_equal(_verified(tour, ["store"]))
    else:
        raise NotReady(stage.value, asked)
    tour.stage = stage
    tour.figures.pause = done.pause_seconds if done.pause_seconds is not None else tour.figures.pause
    tour.application.wait_for(f"stage {stage.value}", lambda seen: seen["stage"] == stage.value)
    gate = f"first not ready: {'; '.join(asked)}; then ready" if asked else "ready"
    return f"{done.before.value} → {done.after.value}, {gate}"


def _pass_marker(tour: Tour, targets: list[str]) -> int:
    """Write a marker into the source's log and wait until replay has passed it; return the bytes that it is behind then."""
    with connect(tour.place.dsns["old"], "demo:marker") as old, Ledger.open(tour.spec, "demo") as ledger:
        marked = wal_position(old)
        emit_marker(old, "demo")
        tour.wait(lambda: _behind(ledger, targets, marked))
        return max(0, wal_position(old) - _applied(ledger, targets))


def _applied(ledger: Ledger, targets: list[str]) -> int:
    return min(load.applied for load in ledger.loads() if load.target in targets)


def _behind(ledger: Ledger, targets: list[str], position: int) -> str | None:
    applied = _applied(ledger, targets)
    return f"replay reached {format_lsn(applied)} and not {format_lsn(position)}" if applied < position else None


def _reach_fence(tour: Tour) -> None:
    """Let the lake arrive where the old store's authority ended; from there on it stands still."""
    with Ledger.open(tour.spec, "demo") as ledger:
        fence = ledger.authority().from_lsn
        tour.wait(lambda: _behind(ledger, ["lake"], fence))


def end(tour: Tour) -> None:
    """End threads and processes, whatever state they are in."""
    with suppress(Exception):  # the error that ended it has been raised, or another one is on its way
        tour.replay.stop()
    for child in (tour.capture, tour.application.child):
        if child is not None:
            child.end()
