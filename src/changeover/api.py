"""The Python face: one function for each command, with the command's own words.

Whoever moves a table from Python imports this module and no other. It imports nothing of Spark by itself, so an application that
has the base install alone can import it for the router. Every function raises the errors of `changeover.errors`. Each runs on the
driver, and those that take a Spark session are the only ones that start a JVM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from changeover.flags.router.router import (
    Change,
    Experiment,
    Limits,
    MirroredTable,
    PgEndpoint,
    Place,
    RoutedStore,
    Router,
    TableMapping,
    returned,
)
from changeover.spec import Spec, load

if TYPE_CHECKING:
    from ldclient.migrations.types import Stage
    from pyspark.sql import SparkSession

    from changeover.flags.cutover.commands import Shown
    from changeover.flags.cutover.switch import Advanced
    from changeover.jobs.apply.rounds import Replayed
    from changeover.jobs.ledger.readdifferences import ReadDifference
    from changeover.jobs.load.copier import Loaded
    from changeover.jobs.load.prepared import Prepared
    from changeover.jobs.preflight.rules import Preflight
    from changeover.jobs.purge import Kept
    from changeover.jobs.spool.writer import CaptureResult
    from changeover.jobs.status import Status
    from changeover.pipeline import Run, Step
    from changeover.tenants import Tenant
    from changeover.verifiers.compare.verdict import Verdict
    from changeover.verifiers.explain import Story
    from changeover.verifiers.races import Outcome

__all__ = [
    "Change",
    "Experiment",
    "Limits",
    "MirroredTable",
    "PgEndpoint",
    "Place",
    "RoutedStore",
    "Router",
    "Spec",
    "TableMapping",
    "abort",
    "advance",
    "backfill",
    "capture",
    "check",
    "explain",
    "finalize",
    "history",
    "init",
    "kept",
    "leftovers",
    "load",
    "notes",
    "plan",
    "prepare",
    "problems",
    "prove",
    "purge",
    "read_differences",
    "replay",
    "returned",
    "rollback",
    "run",
    "show",
    "spark_session",
    "status",
    "verify",
    "watch",
    "write_report",
]


def spark_session(name: str, *, cores: int | None = None, memory: str = "2g", scratch: Path | None = None) -> SparkSession:
    """Return the Spark session that the other functions take, with Delta and the settings that correctness needs.

    Runs on the driver.

    Args:
        name: The application's name in Spark.
        cores: Cores of a local Spark, all unless given; under spark-submit the cluster's count.
        memory: Memory of a local driver, in Java's notation.
        scratch: The folder to which Spark spills, which are rows; Spark's own default unless given.

    Returns:
        The session, the present one where there is one.

    Raises:
        JavaMissing: No Java that Spark can run on was found.
    """
    from changeover.spark.launch import spark_session as act

    return act(name, cores=cores, memory=memory, scratch=scratch)


# -- before a migration


def init(dsn: str, table: str) -> str:
    """Return a spec for a live table, ready to be edited.

    Runs on the driver, without Spark.

    Args:
        dsn: `env:NAME`, the environment variable that holds the DSN, or a DSN without a password.
        table: The table, as `schema.name`.

    Returns:
        The spec's text, which holds no secret.

    Raises:
        Refused: The table is not there, or has no key.
        SpecError: The DSN has a password.
    """
    from changeover.jobs.init import draft

    return draft(dsn, table)


def check(spec: Spec, spark: Callable[[], SparkSession]) -> Preflight:
    """Look at both sides, bring no row the whole way, and say whether the plan is safe; nothing is changed.

    Runs on the driver.

    Args:
        spec: The spec.
        spark: Gives the Spark session; it is asked only where nothing stands against the plan so far.

    Returns:
        The reasons against the plan, none where it is safe, with the grants that are missing and what a person should know.

    Raises:
        ServerUnavailable: A server can't be reached.
        SpecError: A column that the spec names is not there.
    """
    from changeover.verifiers.rehearsal import rehearsed

    return rehearsed(spec, spark)


def notes(spec: Spec) -> list[str]:
    """Return what a person should know of reverse replication of each table.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        Sentences: why a table has no reverse replication, and what acts on its rows.

    Raises:
        ServerUnavailable: A server can't be reached.
    """
    from changeover.jobs.preflight import obstacles

    return obstacles.notes(spec)


def prove(spec: Spec) -> list[Outcome]:
    """Replay the races on both servers, in a scratch schema, with tombstones and without; no table of yours is touched.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        One outcome a race; `with_tombstones` is empty wherever the gate holds.

    Raises:
        UsageError: No target of the spec is PostgreSQL.
        DatabaseFailed: A role may not create a schema.
    """
    from changeover.verifiers.races import prove as act

    return act(spec)


def plan() -> tuple[Step, ...]:
    """Return the steps that `run` walks, with the locks that each takes in the old store.

    Runs anywhere: no store is asked.

    Returns:
        The steps in their order.
    """
    from changeover.pipeline import STEPS

    return STEPS


# -- the way to the verdict


def run(spec: Spec, spark: Callable[[], SparkSession], *, say: Callable[[str], None] = lambda line: None) -> Run:
    """Do everything from check to verify; run it again after whatever stopped it, and nothing is done twice.

    Runs on the driver.

    Args:
        spec: The spec.
        spark: Gives the Spark session.
        say: Gets a line as each step begins and ends.

    Returns:
        The seconds of each step, and the verdicts.

    Raises:
        UnsafePlan: The plan is not safe.
        ChangeoverError: What a step raises; the steps before it are done.
    """
    from changeover.pipeline import run as act

    return act(spec, spark, say=say)


def prepare(spec: Spec, spark: SparkSession, *, anew: bool = False) -> Prepared:
    """Make publication, slot, kept snapshot, ledger, target tables and gates; a second call changes nothing.

    Runs on the driver.

    Args:
        spec: The spec.
        spark: The Spark session, by which the expressions are analysed.
        anew: Begin a new epoch: the target tables are emptied, and every chunk is pending.

    Returns:
        The change stream, and the transform of each load.

    Raises:
        UnsafePlan: The plan is not safe; the error has every reason.
        TargetNotEmpty: A target table has rows.
        UsageError: The spec was changed since.
    """
    from changeover.pipeline import prepare as act

    return act(spec, spark, anew=anew)


def capture(
    spec: Spec, *, until: Callable[[], bool] | None = None, stop: threading.Event | None = None, patience: float = 30.0
) -> CaptureResult:
    """Bring the change stream into the spool until stopped: the one long-lived service.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.
        until: Is asked after each append and five times a second, and ends the service when it is true.
        stop: Ends the service when it is set, as Ctrl-C and SIGTERM do.
        patience: For how many seconds a server that is gone is tried again.

    Returns:
        How many changes and transactions came, and up to which LSN the spool is durable.

    Raises:
        StepOrder: Nothing was prepared.
        LeaseHeld: Another capture runs.
        SpoolGap: The slot is ahead of the spool.
        SourceChanged: The stream is not the prepared one.
    """
    from changeover.jobs.capture.service import capture as act

    return act(spec, until=until, stop=stop, patience=patience)


def backfill(spec: Spec, spark: SparkSession, targets: Sequence[str] | None = None) -> list[Loaded]:
    """Load all pending chunks and close the tables.

    Runs on the driver; the chunks are loaded in tasks.

    Args:
        spec: The spec.
        spark: The Spark session.
        targets: Names of targets, all unless given.

    Returns:
        What was loaded, one entry a table and target.

    Raises:
        StepOrder: Nothing was prepared.
        RowRefused: A row can't be carried over; the other rows are loaded.
        LeaseHeld: Another backfill runs.
    """
    from changeover.jobs.load.copier import backfill as act

    return act(spec, spark, targets)


def replay(
    spec: Spec,
    spark: SparkSession,
    *,
    follow: bool = False,
    stop: threading.Event | None = None,
    targets: Sequence[str] | None = None,
) -> Replayed:
    """Offer what was spooled to each target, and back to the old store, until caught up.

    Runs on the driver; what is offered to a lake is merged in tasks.

    Args:
        spec: The spec.
        spark: The Spark session.
        follow: Go on until `stop` is set.
        stop: Ends a replay that follows after the batch under way, as Ctrl-C and SIGTERM do.
        targets: Names of targets, all unless given.

    Returns:
        How many events were offered, and the LSN up to which everything was applied.

    Raises:
        StepOrder: Nothing was prepared.
        TableStopped: An event can't be carried; everything before it is applied.
    """
    from changeover.jobs.apply.rounds import replay as act

    return act(spec, spark, follow=follow, stop=stop, targets=targets)


def verify(
    spec: Spec,
    spark: SparkSession,
    *,
    targets: Sequence[str] | None = None,
    on_verdict: Callable[[Verdict], object] | None = None,
) -> list[Verdict]:
    """Compare every row of both sides at one position, and put the verdicts on record.

    Runs on the driver; the rows are compared in tasks.

    Args:
        spec: The spec.
        spark: The Spark session.
        targets: Names of targets, all unless given.
        on_verdict: Gets each verdict when it is on record.

    Returns:
        One verdict a table and target; a row that differs is data in it, and no error.

    Raises:
        CouldNotCheck: There is no answer for a table; the others have theirs.
        StepOrder: The backfill is not closed.
    """
    from changeover.verifiers.verification import verify as act

    return act(spec, spark, targets=targets, on_verdict=on_verdict)


def write_report(path: Path, verdicts: Sequence[Verdict]) -> None:
    """Write verdicts as one HTML page; the folder is made where it is not there.

    Runs on the driver, without Spark.

    Args:
        path: The page's file.
        verdicts: What `verify` returned, one at least.

    Raises:
        ValueError: There is no verdict, which is not the same as equal.
        OSError: The file can't be written.
    """
    from changeover.verifiers.report import write_html

    write_html(path, verdicts)


# -- at any time


def status(spec: Spec) -> Status:
    """Return where the migration is: chunks, positions, lag, authority and verdicts.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        Counts of rows, chunks and seconds; positions as LSNs; lag in bytes of WAL; the verdicts.

    Raises:
        StepOrder: Nothing was prepared.
        ServerUnavailable: A server can't be reached.
    """
    from changeover.jobs.status import status as act

    return act(spec)


def problems(status: Status, behind: int | None = None) -> list[str]:
    """Return what needs somebody's attention, each a line; none means that all is well.

    Runs on the driver.

    Args:
        status: What `status` returned.
        behind: How far capture and replay may be behind, in bytes of WAL.

    Returns:
        The lines.
    """
    from changeover.jobs.health import LAG_BYTES
    from changeover.jobs.health import problems as act

    return act(status, LAG_BYTES if behind is None else behind)


def explain(spec: Spec, key: Sequence[str], *, table: str | None = None) -> Story:
    """Tell the story of one row: its chunk, its cell, its spooled events, its images and its stage.

    Runs on the driver.

    Args:
        spec: The spec.
        key: The target's key, a text for each column.
        table: The table, where several have a key of as many columns.

    Returns:
        The story, with its parts by name; values of sensitive columns are left out.

    Raises:
        SpecError: No table has such a key, or a value is none of its column's type.
        StepOrder: Nothing was prepared.
    """
    from changeover.verifiers.explain import explain as act

    return act(spec, key, table=table)


def history(spec: Spec) -> list[tuple[datetime, str, str, Mapping[str, Any]]]:
    """Return the record of all runs, newest first: when, which step, how it ended, and what it put on record.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        One entry a run: the moment, the step, the outcome, and the details on record.

    Raises:
        StepOrder: Nothing was prepared.
    """
    from changeover.jobs.ledger.ledger import Ledger

    with Ledger.open(spec, "history") as ledger:
        ledger.stream("history")
        return list(ledger.audits())


def read_differences(spec: Spec) -> list[ReadDifference]:
    """Return the last shadow reads that mismatched, 100 at most, newest first.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        The reads, without what was read.

    Raises:
        StepOrder: Nothing was prepared.
    """
    from changeover.jobs.ledger.ledger import Ledger
    from changeover.jobs.ledger.readdifferences import recorded

    with Ledger.open(spec, "history") as ledger:
        ledger.stream("history")
        return recorded(ledger.connection, spec.name)


# -- the flag


def show(spec: Spec) -> Shown:
    """Return where the hand-over stands, and what is missing for the next step.

    Runs on the driver, without Spark.

    Args:
        spec: The spec, with a `[flag]`.

    Returns:
        The stage, who has authority, and every reason against the next step.

    Raises:
        SpecError: The spec has no flag, or the flag's file can't be read.
        ServerUnavailable: A server can't be reached.
    """
    from changeover.flags.cutover.commands import show as act

    return act(spec)


def advance(
    spec: Spec, *, to: Stage | None = None, override: str | None = None, tenants: Collection[Tenant] | None = None,
    reads: int | None = None,
) -> Advanced:  # fmt: skip
    """Go one stage up, if the evidence says that it is ready.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.
        to: The stage that is meant, where it has to be that one.
        override: Why to go without the evidence; it is logged.
        tenants: Only the rows of these, from shadow to live.
        reads: Only reads, of so many percent of contexts, at shadow: the stage stays, and so do writes.

    Returns:
        The stages before and after, the epoch, and the seconds for which writers waited.

    Raises:
        NotReady: The evidence does not hold; the error has every reason.
        FenceCalledOff: Writers would have waited too long, so they go on, and the flag is switched back.
    """
    from changeover.flags.cutover.commands import advance as act

    return act(spec, to=to, override=override, tenants=tenants, reads=reads)


def rollback(spec: Spec, *, tenants: Collection[Tenant] | None = None, reads: int | None = None) -> Advanced:
    """Go one stage down; no evidence is asked for.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.
        tenants: Only the rows of these, from live to shadow.
        reads: Only reads, down to so many percent of contexts, at shadow.

    Returns:
        The stages before and after, the epoch, and the seconds for which writers waited.

    Raises:
        Refused: The stage is off, or complete was reached.
        FenceCalledOff: Writers would have waited too long, so they go on, and the flag is switched back.
    """
    from changeover.flags.cutover.commands import rollback as act

    return act(spec, tenants=tenants, reads=reads)


def watch(spec: Spec, stop: threading.Event, *, every: float = 0.5, say: Callable[[str], object] = lambda line: None) -> bool:
    """Follow a flag that is switched elsewhere: ask for readiness, fence, and write the epoch, until stopped.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.
        stop: Ends it when it is set, as Ctrl-C and SIGTERM do.
        every: Seconds between two looks at the flag.
        say: Gets a sentence for each switch, and for each reason against one.

    Returns:
        Whether a signal ended it.

    Raises:
        StepOrder: Nothing was prepared.
        SpecError: The spec has no flag, or the flag's file can't be read.
    """
    from changeover.flags.cutover.commands import watch as act

    return act(spec, stop, every=every, say=say)


# -- the end


def finalize(spec: Spec) -> list[str]:
    """End the migration: everything of ours is dropped, and no table of yours.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        What was removed, each a line.

    Raises:
        Refused: A load is open, or the old store has authority over any row.
    """
    from changeover.jobs.finalize import finalize as act

    return act(spec)


def abort(spec: Spec) -> list[str]:
    """Undo all that prepare made; the old store is as it was.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        What was removed, each a line.

    Raises:
        Refused: The new store has authority over some row.
    """
    from changeover.jobs.finalize import abort as act

    return act(spec)


def leftovers(spec: Spec) -> list[str]:
    """Return what of the migration is still in the stores.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        Lines: each object in the old store, and what reverse replication left in the new one.

    Raises:
        ServerUnavailable: A server can't be reached.
    """
    from changeover.jobs.install.leftovers import leftovers as act

    return act(spec)


def kept(spec: Spec) -> Kept:
    """Return what rows are still kept after the end: differences, samples, scratch, old files of a lake.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        Folders, verdicts, chunks and files of lakes that hold rows.

    Raises:
        ServerUnavailable: A server can't be reached.
    """
    from changeover.jobs.purge import kept as act

    return act(spec)


def purge(spec: Spec) -> Kept:
    """Remove the rows that are still kept after the end.

    Runs on the driver, without Spark.

    Args:
        spec: The spec.

    Returns:
        What was removed.

    Raises:
        Refused: The migration goes on, and needs them.
    """
    from changeover.jobs.purge import purge as act

    return act(spec)
