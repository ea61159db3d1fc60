"""The rehearsal: the whole way of every table on frames without a row, so that what passes `check` runs.

It plans as the steps do, reads the source by the reader's own session, and brings no row through
transform, COPY, MERGE and comparison. So names, types and expressions meet every engine that they
will meet. What an engine refuses is a reason, one sentence. What it makes in a store is rolled
back, and a lake's table stands in a folder that is removed: nothing is changed, nothing left. Runs
on the driver, with Spark, once nothing else stands against the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from changeover.errors import ChangeoverError, Interrupted, JavaMissing, RowRefused, ServerUnavailable, SpecError, UnsafePlan
from changeover.jobs.apply.batch import completed, last_of_each_key
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.load.prepared import plan_transforms
from changeover.jobs.preflight.division import examined
from changeover.jobs.preflight.rules import Preflight
from changeover.jobs.source.catalog import SourceTable
from changeover.jobs.spool import events
from changeover.jobs.transform import inverse
from changeover.jobs.transform.transform import Transform
from changeover.names import qualified
from changeover.session import application_name
from changeover.spark.failures import as_ours
from changeover.spec import Spec, Table, Target
from changeover.stores import open_store
from changeover.stores.base.reader import EVERYTHING, ReadTable, read_table
from changeover.stores.postgres.store import exporting
from changeover.verifiers.compare.diff import RANGE, classified, shared_fields

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

NO_KEYS: tuple[tuple[str, ...], ...] = ()
"""A read of these keys is a session with the reader's own options, and no row."""


def rehearsed(spec: Spec, spark: Callable[[], SparkSession]) -> Preflight:
    """Return what the preflight finds, and before prepare, where that is nothing, what the whole way finds (driver).

    Args:
        spec: The migration's spec.
        spark: What starts the Spark session; called only where it is needed.

    Returns:
        Reasons against the plan, remarks, and statements that are lacking.

    Raises:
        JavaMissing: Spark can't start.
        SpecError: An expression of the spec can't be analysed.
        ServerUnavailable: A store can't be reached.
    """
    checked = examined(spec)
    if not checked.reasons and not _prepared(spec):
        checked.reasons += rehearse(spec, spark(), checked.tables)
    return checked


def _prepared(spec: Spec) -> bool:
    with Ledger.open(spec, "check") as ledger:
        return ledger.exists()


def rehearse(spec: Spec, spark: SparkSession, tables: Mapping[str, SourceTable]) -> list[str]:
    """Return what some engine has against the way of a table, each a sentence (driver)."""
    reasons: list[str] = []
    for table in spec.tables:
        for target in spec.targets.values():
            with _told(reasons, f"{table.source} into {target.name}"):
                source_table = tables[table.source]
                only = replace(spec, tables=(table,), targets={target.name: target})
                (transform,) = plan_transforms(only, spark, {table.source: source_table}).values()
                _go(spec, spark, transform, source_table, target)
                _return(spec, spark, table, transform, target)
    return list(dict.fromkeys(reasons))


@contextmanager
def _told(reasons: list[str], subject: str) -> Iterator[None]:
    """Make a reason of whatever an engine, or a function of the application's, raises.

    A server that is gone is none, nor is what the spec alone is wrong in.
    """
    try:
        yield
    except (Interrupted, JavaMissing, ServerUnavailable, SpecError):
        raise
    except UnsafePlan as error:
        reasons += error.reasons
    except Exception as error:
        reasons.append(_sentence(error, subject))


def _sentence(error: Exception, subject: str) -> str:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    if isinstance(error, PySparkException | Py4JError):
        error = as_ours(error, subject, "without a row")
    if isinstance(error, RowRefused):  # there was none: it is what Spark says of an expression or a name
        return f"{subject}: {error.problem}"
    if isinstance(error, ChangeoverError):
        return str(error)
    return f"{subject}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"


def _go(spec: Spec, spark: SparkSession, transform: Transform, source: SourceTable, target: Target) -> None:
    """Bring no row from the source through load, merge and comparison."""
    dsn, application = spec.source.dsn.resolve(), application_name(spec.name, "check")
    read = ReadTable(*qualified(source.source), transform.source, source.key, source.partitions is not None)
    with open_store(spec, target, "check") as store, exporting(dsn, application) as (_, snapshot):

        def no_row(moved: frozenset[str]) -> DataFrame:
            return read_table(spark, dsn, application, read, EVERYTHING, snapshot, NO_KEYS, moved)

        nothing = last_of_each_key(events.SCHEMA.empty_table(), source.identity, [c.name for c in transform.source])
        with completed(spec, spark, transform, nothing, None, dsn) as whole:
            changes = transform.changes(whole, 0, transform.moved_in_stream() if store.takes_text else frozenset())
            moved = transform.only_moved() if store.takes_text else frozenset()
            images = transform.rows(no_row(moved), moved=moved)
            with store.rehearsing(spark, transform.target, spec.work, images, changes) as rehearsed:
                if rehearsed is not None:
                    _compare(transform, transform.uncast(no_row(frozenset())), rehearsed)


def _compare(transform: Transform, source: DataFrame, target: DataFrame) -> None:
    """Have Spark analyse the comparison of two frames."""
    from pyspark.sql import functions as F

    left, right = (frame.withColumn(RANGE, F.lit(0)) for frame in (source, target))
    fields = shared_fields(left, right, transform.table.source, transform.target.key, transform.pg_types)
    _ = classified(left, right, fields, 1).schema


def _return(spec: Spec, spark: SparkSession, table: Table, transform: Transform, target: Target) -> None:
    """Have Spark analyse reverse replication of the target that takes over, where there is one."""
    columns = transform.target.columns
    if spec.flag is None or spec.flag.target != target.name or inverse.missing(spec, table, transform.source, columns):
        return
    inverse.plan(spark, spec, table, (transform.source, [c.name for c in transform.identity]), columns, table.key)
