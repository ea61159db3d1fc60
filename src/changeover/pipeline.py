"""The pipeline: the steps of a migration in their order, as one list that `plan` prints and `run` walks.

Because both go over the same objects, what is shown beforehand is what is done. A step that finds its work done does nothing, so
`run` may be killed and repeated at any point. Capture is a service of its own: `run` starts it where none is alive and leaves it.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from ldclient.migrations.types import Stage

from changeover.errors import ChangeoverError, CouldNotFinish, LeaseHeld, UnsafePlan
from changeover.files import folders
from changeover.files.trouble import working
from changeover.flags import flagfile
from changeover.flags.cutover import commands as cutover
from changeover.jobs import prepare as preparing
from changeover.jobs import restart as restarting
from changeover.jobs.apply import rounds as replaying
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.progress import progress
from changeover.jobs.load import copier as backfilling
from changeover.jobs.load import prepared
from changeover.spec import Spec
from changeover.verifiers.compare.verdict import Verdict
from changeover.verifiers.rehearsal import rehearsed
from changeover.verifiers.verification import verify

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

CAPTURE_SECONDS = 60.0


@dataclass
class Run:
    """One walk over the steps: what they share, and what they found."""

    spec: Spec
    spark: Callable[[], SparkSession]
    seconds: dict[str, float] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    say: Callable[[str], None] = lambda line: None
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step: what it does, which locks it takes in the old store, and the function that does it."""

    name: str
    does: str
    locks: str
    act: Callable[[Run], None]


def _check(run: Run) -> None:
    checked = rehearsed(run.spec, run.spark)
    run.results["estimate"] = sum(table.rows for table in checked.tables.values())
    if checked.reasons and not _prepared(run.spec):
        raise UnsafePlan(tuple(checked.reasons))


def _prepared(spec: Spec) -> bool:
    with Ledger.open(spec, "run") as ledger:
        return ledger.exists()


def prepare(spec: Spec, spark: SparkSession, *, anew: bool = False, rehearse: bool = True) -> prepared.Prepared:
    """Prepare, and have the flag's data file ask for the lowest stage where there is no such file yet (driver).

    With `anew` a prepared migration begins a new epoch: its target tables are emptied, and every chunk is pending again. One that
    was begun so and did not come to its end is brought there in any case. Without `rehearse` the caller has done so.
    """
    with Ledger.open(spec, "prepare") as ledger:
        exists = ledger.exists()
        again = exists and (anew or ledger.begun() is not None)
    if rehearse and not exists and (reasons := rehearsed(spec, lambda: spark).reasons):
        raise UnsafePlan(tuple(reasons))
    made = restarting.restart(spec, spark) if again else preparing.prepare(spec, spark)
    if spec.flag is not None:
        flag, file = cutover.flag_and_file(spec)
        if not file.exists():
            with working(file.parent):
                folders.made(file.parent, spec.mode)
                flagfile.write_stage(file, flag.key, Stage.OFF)
    return made


def _prepare(run: Run) -> None:
    prepare(run.spec, run.spark(), rehearse=False)


def _capture(run: Run) -> None:
    run.results["capture_pid"] = start_capture(run.spec)


def _backfill(run: Run) -> None:
    """Load with replay beside it; the first round of replay comes before the first chunk, so that tombstones are there."""
    with replay_beside(run.spec, run.spark()), progress(run.spec, run.spec.name):
        run.results["loads"] = backfilling.backfill(run.spec, run.spark())


def _replay(run: Run) -> None:
    run.results["replayed"] = replaying.replay(run.spec, run.spark())


def _verify(run: Run) -> None:
    def report(verdict: Verdict) -> None:
        run.say(f"verify: {verdict.table} in {verdict.target}: {verdict.word}, {verdict.source_rows:,} rows")

    run.verdicts = verify(run.spec, run.spark(), on_verdict=report)


STEPS: tuple[Step, ...] = (
    Step("check", "look at both sides and change nothing", "none", _check),
    Step(
        "prepare",
        "publication and replication slot (or triggers and their log) with a snapshot, ledger, target tables and gates",
        "SHARE UPDATE EXCLUSIVE on each table for the publication, asked for 2 s at a time; the slot waits for open transactions;"
        " SHARE ROW EXCLUSIVE in place of both where capture is by triggers",
        _prepare,
    ),
    Step("capture", "spool all changes, as a service of its own", "none: it reads the write-ahead log or a log", _capture),
    Step("backfill", "load the snapshot chunk by chunk, with replay beside it", "ACCESS SHARE on each table", _backfill),
    Step("replay", "offer what was spooled until caught up", "none: it reads the spool", _replay),
    Step("verify", "compare every row at one position", "ACCESS SHARE on each table; a temporary slot", _verify),
)


def run(spec: Spec, spark: Callable[[], SparkSession], *, say: Callable[[str], None] = lambda line: None) -> Run:
    """Walk all steps (driver); whatever is done is not repeated. `say` gets a line as each step begins and ends."""
    walk = Run(spec, spark, say=say)
    for step in STEPS:
        say(f"{step.name}: {step.does}")
        started = time.monotonic()
        step.act(walk)
        walk.seconds[step.name] = round(time.monotonic() - started, 3)
        say(f"{step.name}: done in {walk.seconds[step.name]:.1f} s")
    return walk


def start_capture(spec: Spec) -> int | None:
    """Start capture as a process of its own unless one is alive; return its pid, None when it was there (driver).

    It outlives this process, as a service does; its output goes to a log under the work folder.
    """
    with Ledger.open(spec, "run") as ledger:
        ledger.stream("capture")
        try:
            with ledger.lease("capture"):
                pass
        except LeaseHeld:
            return None
    with working(spec.work), _opened(spec) as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "changeover.jobs.capture.service", spec.path],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=dict(os.environ),
        )  # fmt: skip
    threading.Thread(target=child.wait, daemon=True, name="capture-reaper").start()
    _wait_for_capture(spec, child)
    return child.pid


@contextmanager
def _opened(spec: Spec) -> Iterator[IO[bytes]]:
    """Open the file to which capture's output goes."""
    with open(folders.work(spec, "logs") / "capture.out", "ab") as out:
        yield out


def _wait_for_capture(spec: Spec, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + CAPTURE_SECONDS
    with Ledger.open(spec, "run") as ledger:
        while time.monotonic() < deadline:
            try:
                with ledger.lease("capture"):
                    pass
            except LeaseHeld:
                return
            if child.poll() is not None:
                break
            time.sleep(0.2)
    raise CouldNotFinish(f"capture did not start: see {spec.work / 'logs' / 'capture.out'}")


@contextmanager
def replay_beside(spec: Spec, spark: SparkSession) -> Iterator[None]:
    """Replay into the targets that allow it while the block runs; its error ends the block's run as well."""
    stop = threading.Event()
    failed: list[ChangeoverError] = []
    replaying.replay(spec, spark)

    def follow() -> None:
        try:
            replaying.replay(spec, spark, follow=True, stop=stop)
        except ChangeoverError as error:
            failed.append(error)

    beside = threading.Thread(target=follow, name="replay")
    beside.start()
    try:
        yield
    finally:
        stop.set()
        beside.join()
    if failed:
        raise failed[0]
