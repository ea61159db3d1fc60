"""What prepare recorded, as every later step takes it up: the stream, and the transform of each load.

A step runs only on the spec that was prepared. Transforms are planned anew from the tables on record, so all steps have the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from changeover.errors import UnsafePlan, UsageError
from changeover.jobs.access import privileges
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, Stream
from changeover.jobs.source.catalog import SourceTable, source_table, store_columns
from changeover.jobs.transform import inverse, transform
from changeover.jobs.transform.tenancy import flag_of
from changeover.session import application_name, connect
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.postgres import gate

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What prepare made: the stream, and the transform of each load."""

    stream: Stream
    transforms: Mapping[tuple[str, str], transform.Transform]


def require_prepared(spec: Spec, spark: SparkSession, ledger: Ledger, step: str) -> Prepared:
    """Return what prepare recorded (driver).

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        ledger: The migration's ledger, open.
        step: The step, for the error.

    Returns:
        The stream and the transforms, by source table and target.

    Raises:
        StepOrder: Prepare did not run.
        UsageError: The spec changed since prepare.
    """
    stream = ledger.stream(step)
    if ledger.spec_digest() != spec.digest:
        raise UsageError(
            f"{spec.path} changed since prepare (it was {ledger.spec_digest()}, it is {spec.digest}): put it back, or"
            f" `changeover abort` and begin again"
        )
    _follow_mirror(spec, ledger)
    tables = {}
    with connect(spec.source.dsn.resolve(), application_name(spec.name, step)) as old:
        for stopped in assumptions.stop(Moment.RUN, Asked(spec, old, ledger)):
            log.warning("%s", stopped)
        for table in spec.tables:
            old_table = source_table(old, table)
            filenode, columns = ledger.source_table(table.source)
            identity = old_table.identity if old_table else tuple(c.name for c in columns if c.key)
            rows, parts = (old_table.rows, old_table.partitions) if old_table else (0, None)
            tables[table.source] = SourceTable(table.source, filenode, identity, columns, rows, parts)
    return Prepared(stream, plan_transforms(spec, spark, tables))


def _follow_mirror(spec: Spec, ledger: Ledger) -> None:
    """Take up another `flag.mirror`; while a table is being loaded nobody else may write to it, so it is refused until then."""
    if spec.flag is None or spec.flag.mirror == (known := ledger.mirror()):
        return
    pending = [load.source for load in ledger.loads() if load.state != CLOSED]
    if pending:
        raise UsageError(
            f"{spec.path}: flag.mirror is {spec.flag.mirror!r}, and was {known!r} at prepare: it may change once all tables are"
            f" loaded, and {pending[0]} is not yet"
        )
    _allow_mirror(spec)  # before it is on record: what fails here is tried again
    ledger.record_mirror(spec.flag.mirror)


def _allow_mirror(spec: Spec) -> None:
    """Let the application's roles pass the gates that are there; the fence does it for those that it makes."""
    new = spec.targets[flag_of(spec).target].dsn_value, [table.target_name for table in spec.tables]
    old = spec.source.dsn.resolve(), [table.source_name for table in spec.tables]
    for dsn, names in (new, old):
        with connect(dsn, application_name(spec.name, "prepare")) as session:
            for name in names:
                gated = gate.GatedTable(*name, (), ())
                if gate.installed(session, gated):
                    privileges.allow_gate(spec, session, gated)


def plan_transforms(
    spec: Spec, spark: SparkSession, tables: Mapping[str, SourceTable]
) -> dict[tuple[str, str], transform.Transform]:
    """Plan the transform of every table into every target (driver, reads no row).

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        tables: The source tables, by their names in the spec.

    Returns:
        The transforms, by source table and target.

    Raises:
        SpecError: An expression is not valid.
        UnsafePlan: Something stands against the plan; it has every reason.
    """
    planned = {}
    for target in spec.targets.values():
        with open_store(spec, target, "plan") as store:
            for table in spec.tables:
                old_table = tables[table.source]
                existing = store.columns(*table.target_name)
                plan = transform.plan(spark, spec, table, store_columns(old_table.columns), old_table.identity, existing)
                planned[table.source, target.name] = replace(plan, partitioned=old_table.partitions is not None)
    return planned


def require_reverse(spec: Spec, spark: SparkSession, transforms: Mapping[tuple[str, str], transform.Transform]) -> None:
    """Analyse the expressions by which rows will come back; that some are missing is said, and no error.

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        transforms: The transform of each load, by (source, target's name).

    Raises:
        UnsafePlan: A target cuts what the new store's rows hold.
        SpecError: An expression can't be analysed.
    """
    if spec.flag is None:
        return
    for table in spec.tables:
        planned = transforms[table.source, spec.flag.target]
        for lake in (transforms[table.source, name] for name in spec.targets if name != spec.flag.target):
            if reasons := inverse.cut(table, planned.target.columns, lake.target.columns):
                raise UnsafePlan(tuple(reasons))
        if lack := inverse.missing(spec, table, planned.source, planned.target.columns):
            log.warning("%s; until then %s after the fence", lack, spec.without_stream)
        else:
            old = planned.source, [c.name for c in planned.identity]
            inverse.plan(spark, spec, table, old, planned.target.columns, table.key)
