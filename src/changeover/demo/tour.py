"""The tour: the steps of the demo, in one table that is walked from top to bottom, each by the product's own function.

A step returns one line that says what came of it, and its time is taken. While it works, the screen says what it waits for.
Nothing goes on after an error. Before each step the processes and threads beside it are looked at, so that none dies unseen.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ldclient.migrations.types import Stage

from changeover import pipeline
from changeover.demo.damage import KINDS
from changeover.demo.follow import Follower
from changeover.demo.looks import Tasks, backfilled
from changeover.demo.patience import Patience, tasks_done
from changeover.demo.place import Place
from changeover.demo.processes import ApplicationProcess, Child, capture
from changeover.demo.schema import Shape
from changeover.demo.screen import Reading, Screen
from changeover.errors import CouldNotFinish, NotReady, UnsafePlan
from changeover.flags.cutover import commands as cutover
from changeover.jobs import finalize as finalizing
from changeover.jobs import prepare
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW, OLD_STORE
from changeover.jobs.load import copier
from changeover.jobs.preflight.division import examined
from changeover.jobs.reverse import path as reversing
from changeover.jobs.source.marker import mark
from changeover.jobs.spool.table import spool_of
from changeover.position import format_lsn
from changeover.session import Connection, connect
from changeover.spec import Spec
from changeover.verifiers.compare.verdict import Difference, Verdict
from changeover.verifiers.verification import verify

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

Result = TypeVar("Result")

COMPARED_READS = 200
"""Compared reads to wait for at shadow and at live: twice what readiness asks for."""

VERIFY_TRIES = 5
"""Verdicts that are asked for before a question counts as left open."""

TRIES = 20
"""Tries of what may be run again, and of one step up.

A fence gives the writers back after ten seconds, however slow the machine, and asks to be run again.
"""

LOOK_SECONDS = 0.5
"""How often it is asked whether a stage is ready: each look opens several sessions."""

MOVES_SECONDS = 2.0
"""How often a wait asks whether anything moves."""

HEALS = ("was heard", " is at ", "bytes of WAL behind", "replayed up to", "reads were compared", "not running", "not captured")
"""What a reason of readiness holds that goes away by itself, while application, capture and replay go on."""

ASKS_TO_VERIFY = ("run `changeover verify`", "the last verdict")
"""What a reason of readiness holds that another verdict may take away."""

COMES_BACK = (2, 1)
"""The reserved row that is changed in the new store by plain SQL."""

CHANGED = "changed in the new store alone"


@dataclass
class Figures:
    """What the summary tells: rows a second of the backfill, bytes of WAL behind once caught up, and so on."""

    backfilled: int = 0
    rate: float = 0.0
    lag: int = 0
    changed_meanwhile: int = 0
    came_back: int = 0
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
    screen: Screen
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

    def wait(self, waiting: Callable[[], str | Reading | None], every: float = 0.1) -> None:
        """Wait until nothing is waited for any more, for as long as anything moves.

        Args:
            waiting: Returns what is being waited for, or None; the screen shows it.
            every: Seconds between two looks.

        Raises:
            CouldNotFinish: No position and no task of Spark's has moved for long.
        """
        with Ledger.open(self.spec, "demo") as ledger:
            patience, looked = Patience(lambda: self._moves(ledger)), 0.0
            while (why := waiting()) is not None:
                reading = why if isinstance(why, Reading) else Reading(why)
                self.screen.at(reading)
                self.require_alive()
                if time.monotonic() - looked >= MOVES_SECONDS:  # a look at the spool reads its log
                    patience.require(reading.waiting)
                    looked = time.monotonic()
                time.sleep(every)

    def _moves(self, ledger: Ledger) -> tuple[int, ...]:
        """Return what changes while capture and replay make progress, in either direction."""
        forward = [load.applied for load in ledger.loads()]
        back = [load.applied for load in ledger.loads(NEW)]
        spooled = spool_of(self.spec, ledger.stream("demo").epoch).end()
        return (*forward, *back, spooled, *tasks_done(self.spark))

    def until(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the application's status fulfils a condition; return that status.

        Args:
            what: What the application has to do, as the screen names it.
            condition: Asked of each status.

        Raises:
            CouldNotFinish: It says nothing new, or has written much since.
        """
        self.screen.at(Reading(f"the application: {what}"))
        return self.application.wait_for(what, condition)

    def working(self, what: str) -> AbstractContextManager[None]:
        """Show Spark's tasks until the block ends."""
        return self.screen.looking(Tasks(self.spark, lambda: what))

    def run(self, step: Step) -> str:
        """Run one step and take its time."""
        self.require_alive()
        started = time.monotonic()
        with self.screen.step(step.name):
            result = step.action(self)
        self.seconds[step.name] = round(time.monotonic() - started, 2)
        return result


@dataclass(frozen=True)
class Step:
    """One step: its name, and what it does."""

    name: str
    action: Callable[[Tour], str]


def check(tour: Tour) -> str:
    """Ask whether the plan is safe."""
    preflight = examined(tour.spec)
    if preflight.reasons:
        raise UnsafePlan(tuple(preflight.reasons))
    return "the plan is safe: key, replica identity, types, rights and targets"


def plan(tour: Tour) -> str:
    """List the steps of the pipeline, as `changeover plan` prints them with their locks."""
    return ", ".join(step.name for step in pipeline.STEPS) + "; then the flag, stage by stage"


def prepare_both(tour: Tour) -> str:
    """Make slot and snapshot, ledger, target tables and gates."""
    with tour.working("slot, snapshot, tables and gates"):
        made = _again(lambda: prepare.prepare(tour.spec, tour.spark), _logged)
    return f"slot {made.stream.slot} and snapshot from one command, at {format_lsn(made.stream.l0)}"


def _again(action: Callable[[], Result], heard: Callable[[CouldNotFinish], None], tries: int = TRIES) -> Result:
    """Do what the product says may be run again, such as where writers held a lock for longer than it waits for one.

    Args:
        action: One try.
        heard: Gets what ended a try that is not the last.
        tries: How many there are; what ends the last one is raised.
    """
    for _ in range(tries - 1):
        try:
            return action()
        except CouldNotFinish as error:
            if not error.transient:
                raise
            heard(error)
    return action()


def _logged(error: CouldNotFinish) -> None:
    log.info("once more: %s", error)


def start_capture(tour: Tour) -> str:
    """Start capture, and replay once, so that tombstones stand before the first row is loaded; then go on with both."""
    tour.capture = capture(tour.place.spec_file, tour.place.root)
    tour.replay.start()
    _pass_marker(tour, ["store"])
    return f"process {tour.capture.process.pid} spools the change stream; replay began"


def load_both(tour: Tour) -> str:
    """Load the snapshot into both targets while the application goes on writing."""
    started = time.monotonic()
    with Ledger.open(tour.spec, "demo") as ledger, tour.screen.looking(lambda: backfilled(ledger)):
        loaded = {one.target: one for one in copier.backfill(tour.spec, tour.spark)}
    figures = tour.figures
    figures.backfilled = loaded["store"].rows
    figures.rate = sum(one.rows for one in loaded.values()) / (time.monotonic() - started)
    figures.changed_meanwhile = sum(one.refused + one.swept for one in loaded.values())
    return (
        f"{figures.backfilled:,} rows in {loaded['store'].chunks} chunks to each target, {figures.rate:,.0f} rows/s;"
        f" {figures.changed_meanwhile} rows of it were changed or deleted meanwhile, and came right"
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
    """From here on both stores get every write, the new one by the stream, which is to show that it keeps up."""
    step = _advance(tour, Stage.DUALWRITE)
    behind = _pass_marker(tour, ["store"])
    return f"{step}; the stream brings every write, {behind:,} bytes of WAL behind"


def shadow(tour: Tour) -> str:
    """Let the application read from both and compare."""
    step = _advance(tour, Stage.SHADOW)
    reads = _compared(tour, Stage.SHADOW)
    return f"{step}; {reads['compared']:,} shadow reads compared, {reads['mismatched']} mismatched"


def _compared(tour: Tour, stage: Stage) -> dict[str, int]:
    """Wait until enough reads were compared at a stage for the next one; return their counts."""
    what = f"reads compared at {stage.value}"

    def enough(status: dict[str, Any]) -> bool:
        at_stage = status["router"]["comparisons"]["at_stage"]
        compared = at_stage["compared"] if at_stage["stage"] == stage.value else 0
        tour.screen.at(Reading(f"the application: {what}", min(compared, COMPARED_READS), COMPARED_READS, "reads"))
        return bool(compared >= COMPARED_READS)

    reads_at_stage: dict[str, int] = tour.until(what, enough)["router"]["comparisons"]["at_stage"]
    return reads_at_stage


def live(tour: Tour) -> str:
    """Fence: authority moves to the new store."""
    _require_equal(_verified(tour, ["store"]), Stage.LIVE)
    step = _advance(tour, Stage.LIVE)
    _reach_fence(tour)
    wait = tour.application.status()["router"]["longest_wait_seconds"]
    return f"{step}; fenced in {tour.figures.pause or 0:.2f} s, the longest wait of a writer was {wait:.2f} s"


def come_back(tour: Tour) -> str:
    """Change a row in the new store by plain SQL, and see it come back to the old one."""
    started = time.monotonic()
    key, answer = list(COMES_BACK), f"user {COMES_BACK[0]}, channel {COMES_BACK[1]}"
    with connect(tour.place.dsns["old"], "demo:reverse") as old, connect(tour.place.dsns["new"], "demo:reverse") as new:
        new.execute("UPDATE associations SET note = %s WHERE (entity_a, entity_b) = (%s, %s)", [CHANGED, *key])
        tour.wait(lambda: None if _note(old, key) == CHANGED else f"a row of the new store has not come back yet ({answer})")
    took = time.monotonic() - started
    shown = cutover.show(tour.spec).reverse_path
    line = shown.line if shown is not None else "there is none"
    return f"flags show: {line}; {_came_back(tour):,} changes came back, the row of {answer} among them, in {took:.1f} s"


def _note(old: Connection, key: list[int]) -> str | None:
    row = old.execute("SELECT note FROM follows WHERE (from_user, to_channel) = (%s, %s)", key).fetchone()
    return row[0] if row is not None else None


def _came_back(tour: Tour) -> int:
    """Return how many changes of the new store were offered to the old one so far."""
    with Ledger.open(tour.spec, "demo") as ledger:
        loads = ledger.loads(NEW)
    tour.figures.came_back = sum(load.events for load in loads if load.target == OLD_STORE)
    return tour.figures.came_back


def rampdown(tour: Tour) -> str:
    """Stop comparing, once enough reads were compared under the new authority; the old store still gets every write."""
    _compared(tour, Stage.LIVE)
    return _advance(tour, Stage.RAMPDOWN)


def last_verify(tour: Tour) -> str:
    """Compare the old store with the new one and with the lake, which both follow the new one by now."""
    tour.verdicts = _verified(tour)
    return _said(tour.verdicts)


def complete(tour: Tour) -> str:
    """Let the old store stay as it is. The application goes on, and takes back what it writes from here: anyone can compare."""
    tour.application.child.signal(signal.SIGUSR1)
    tour.until("it takes back what it writes", lambda status: bool(status["traceless"]))
    _pass_back(tour)
    step = _advance(tour, Stage.COMPLETE)
    return f"{step}; until then {_came_back(tour):,} changes of the new store came back to the old one"


def finalize(tour: Tour) -> str:
    """Remove what is ours, end the application last, and list what is left in the old store."""
    tour.screen.at(Reading("the last batch of replay, and the end of capture"))
    tour.replay.stop()
    if tour.capture is not None:
        tour.capture.end()
        tour.capture = None
    tour.screen.at(Reading("slots, publications, triggers and gates are removed"))
    removed = _again(lambda: finalizing.finalize(tour.spec), _logged)
    writes = tour.application.status()["writes"]
    tour.until("writes after finalize", lambda status: status["writes"] > writes)
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
    Step("reverse", come_back),
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
    upto = next(index for index, step in enumerate(STEPS) if step.action is first_verify)
    return (*STEPS[: upto + 1], Step(f"break {', '.join(broken)}", lambda tour: damage(tour, broken)))


def damage(tour: Tour, kinds: Sequence[str]) -> str:
    """Damage the new store behind its back and verify.

    Raises CouldNotFinish where the verdict does not name all that was done, or names anything else.
    """
    with connect(tour.place.dsns["old"], "demo:damage") as old, connect(tour.place.dsns["new"], "demo:damage") as new:
        damages = [KINDS[kind](old, new, tour.wait) for kind in kinds]
    tour.verdicts = _verified(tour)
    differences = [d for v in tour.verdicts if v.target == "store" for d in v.sample]
    named = [next(filter(one.is_told, differences), None) for one in damages]
    unexplained = [d for d in differences if not any(one.is_told(d) for one in damages)]
    if None in named or unexplained:
        wrong = (
            f"verify did not name it: {damages[named.index(None)].done}"
            if None in named
            else f"verify named {_named(unexplained[0])}"
        )
        raise CouldNotFinish(f"{wrong}: this is a defect of changeover, please report it")
    return "; ".join(f"{one.done}: {_named(d)}" for one, d in zip(damages, named, strict=True) if d is not None)


def _named(difference: Difference) -> str:
    key = ", ".join(f"{name}={value}" for name, value in difference.key.items())
    columns = f" in column {', '.join(difference.columns)}" if difference.columns else ""
    return f"class {difference.kind}, key ({key}){columns}"


def _said(verdicts: list[Verdict]) -> str:
    return "; ".join(f"{v.target}: {v.word}, {v.source_rows:,} rows, {v.positions}" for v in verdicts)


def _verified(tour: Tour, targets: list[str] | None = None) -> list[Verdict]:
    """Verify, and again where the product says that a question is open; a verdict is taken as it is."""

    def heard(error: CouldNotFinish) -> None:
        tour.screen.line(f"{'':<12}           verify goes on: {error}")

    return _again(lambda: _verify_once(tour, targets), heard, VERIFY_TRIES)


def _verify_once(tour: Tour, targets: list[str] | None) -> list[Verdict]:
    """Verify, with the verdicts that are there already on the screen."""
    verdicts: list[str] = []

    def waiting() -> str:
        return "; ".join(["every row is compared", *verdicts])

    def tell(verdict: Verdict) -> None:
        verdicts.append(f"{verdict.target}: {verdict.word}")

    with tour.screen.looking(Tasks(tour.spark, waiting)):
        return verify(tour.spec, tour.spark, targets=targets, on_verdict=tell)


def _require_equal(verdicts: list[Verdict], stage: Stage) -> None:
    """Raise NotReady for the stage that was asked for, with what is different."""
    different = [v for v in verdicts if not v.equal]
    if different:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in different[0].counts.items() if count)
        raise NotReady(stage.value, (f"{different[0].target} is different: {counts}",))


def _advance(tour: Tour, stage: Stage) -> str:
    """Go one stage up once it is ready, and wait for the application to be there; return what was said of it."""
    asked: list[str] = []
    advanced = _switched(tour, stage, asked)
    tour.stage = stage
    tour.figures.pause = advanced.pause_seconds if advanced.pause_seconds is not None else tour.figures.pause
    tour.until(f"stage {stage.value}", lambda status: status["stage"] == stage.value)
    ready = f"first not ready: {'; '.join(asked)}; then ready" if asked else "ready"
    return f"{advanced.before.value} → {advanced.after.value}, {ready}"


def _switched(tour: Tour, stage: Stage, asked: list[str]) -> cutover.Advanced:
    """Switch the flag, and again where the product says that another try may do; `asked` gets what stood against it at first."""

    def attempt() -> cutover.Advanced:
        _become_ready(tour, stage, asked)
        tour.screen.at(Reading(f"the flag is switched to {stage.value}"))
        try:
            return cutover.advance(tour.spec, to=stage)
        except NotReady as error:  # it was ready a moment ago
            raise CouldNotFinish(str(error)) from error

    return _again(attempt, lambda error: asked.extend([] if asked else [str(error)]))


def what_helps(reasons: Sequence[str]) -> tuple[list[str], bool]:
    """Return the reasons that neither time nor a verdict takes away, and whether a verdict is asked for (pure).

    Args:
        reasons: What `flags show` says against the next step.
    """
    lasting = [reason for reason in reasons if not any(sign in reason for sign in (*HEALS, *ASKS_TO_VERIFY))]
    return lasting, any(sign in reason for reason in reasons for sign in ASKS_TO_VERIFY)


def _become_ready(tour: Tour, stage: Stage, asked: list[str]) -> None:
    """Wait until nothing speaks against a stage, and verify where a verdict is asked for.

    Raises NotReady for a reason that neither goes away by itself nor by a verdict.
    """
    verified = 0

    def waiting() -> str | None:
        nonlocal verified
        reasons = cutover.show(tour.spec).reasons
        lasting, to_verify = what_helps(reasons)
        if lasting or (to_verify and verified == VERIFY_TRIES):
            raise NotReady(stage.value, tuple(reasons))
        if reasons and not asked:
            asked.extend(reasons)
        if to_verify:
            verified += 1
            _require_equal(_verified(tour, ["store"]), stage)
        return f"not ready for {stage.value}: {'; '.join(reasons)}" if reasons else None

    tour.wait(waiting, LOOK_SECONDS)


def _pass_marker(tour: Tour, targets: list[str]) -> int:
    """Write a marker into the source's log and wait until replay has passed it; return the bytes that it is behind then."""
    with connect(tour.place.dsns["old"], "demo:marker") as old, Ledger.open(tour.spec, "demo") as ledger:
        _reach(tour, mark(old, "demo"), lambda: _applied(ledger, targets), f"replay into {' and '.join(targets)}")
        return max(0, mark(old, "demo") - _applied(ledger, targets))


def _pass_back(tour: Tour) -> None:
    """Write a marker into the new store's log, and wait until all that was written before has come back; raises CouldNotFinish."""
    with connect(tour.place.dsns["new"], "demo:marker") as new, Ledger.open(tour.spec, "demo") as ledger:
        if lacking := reversing.whole(ledger):
            raise CouldNotFinish(f"what is written to the new store does not come back: {lacking}")

        def applied() -> int:
            return min(load.applied for load in ledger.loads(NEW))

        _reach(tour, mark(new, "demo"), applied, "reverse replication")


def _reach_fence(tour: Tour) -> None:
    """Let the lake arrive where the old store's authority ended; from there on it follows the new store."""
    with Ledger.open(tour.spec, "demo") as ledger:
        _reach(tour, ledger.authority().from_lsn, lambda: _applied(ledger, ["lake"]), "replay into lake")


def _reach(tour: Tour, position: int, applied: Callable[[], int], who: str) -> None:
    """Wait until a position is reached; the screen shows how many bytes of the log are left."""
    begun = applied()

    def waiting() -> Reading | None:
        at = applied()
        where = f"{who} reached {format_lsn(at)} and not {format_lsn(position)}"
        return Reading(where, max(0, at - begun), max(0, position - begun), "bytes") if at < position else None

    tour.wait(waiting)


def _applied(ledger: Ledger, targets: list[str]) -> int:
    return min(load.applied for load in ledger.loads() if load.target in targets)


def end(tour: Tour) -> None:
    """End threads and processes, whatever state they are in."""
    with suppress(Exception):  # the error that ended it has been raised, or another one is on its way
        tour.replay.stop()
    for child in (tour.capture, tour.application.child):
        if child is not None:
            child.end()
