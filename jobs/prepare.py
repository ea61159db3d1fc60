"""Prepare: everything that this product makes in the two stores, in an order that a kill can't spoil.

The order in `prepare` is the promise. Tables and their files are recorded first, and then the
publication is committed. Then one command makes the slot and its snapshot, and then the gates get
their floor. The ledger's record comes last, in one transaction, so a killed prepare leaves nothing
that a second one does not take away.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from changeover.errors import ChangeoverError, TargetNotEmpty, UnsafePlan
from changeover.files import folders
from changeover.jobs.access import privileges
from changeover.jobs.guarantee import definition
from changeover.jobs.guarantee.assumptions import Moment
from changeover.jobs.install.opening import open_stream
from changeover.jobs.install.removal import remove_unfinished
from changeover.jobs.install.targets import create_target, install_gate
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Stream
from changeover.jobs.load.prepared import Prepared, plan_transforms, require_prepared, require_reverse
from changeover.jobs.preflight.division import examined
from changeover.jobs.preflight.rules import Preflight
from changeover.jobs.source.catalog import record_tables
from changeover.jobs.spool.table import spool_of
from changeover.jobs.transform import transform
from changeover.spec import Spec
from changeover.stores import open_store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)


def prepare(spec: Spec, spark: SparkSession) -> Prepared:
    """Make everything that a migration needs; a second call changes nothing (driver).

    It makes publication, slot, kept snapshot, ledger, target tables and gates.

    Args:
        spec: The migration's spec.
        spark: The Spark session.

    Returns:
        What was made: the stream and the transforms.

    Raises:
        UnsafePlan: Something stands against the plan; it has every reason.
        TargetNotEmpty: A target table has rows.
        SlotBlocked: A transaction of the source stays open; it names the oldest.
        UsageError: The spec changed since an earlier prepare.
    """
    with Ledger.open(spec, "prepare") as ledger, ledger.lease("prepare"):
        if ledger.exists():
            return require_prepared(spec, spark, ledger, "prepare")
        findings = examined(spec, Moment.PREPARE)
        if findings.reasons:
            raise UnsafePlan(tuple(findings.reasons))
        remove_unfinished(spec, ledger)  # what a killed prepare left
        transforms = plan_transforms(spec, spark, {t.source: findings.tables[t.source] for t in spec.tables})
        require_reverse(spec, spark, transforms)
        try:
            return _make(spec, ledger, findings, transforms)
        except ChangeoverError:
            _remove_after_failure(spec, ledger)
            raise


def _make(spec: Spec, ledger: Ledger, findings: Preflight, transforms: Mapping[tuple[str, str], transform.Transform]) -> Prepared:
    """Make everything, in the order that is the promise."""
    ledger.create()
    privileges.allow_ledger(spec, ledger.connection)
    created = _create_targets(spec, transforms, ledger)
    stream, pieces = open_stream(spec, findings)
    types = {}
    for names, planned in transforms.items():
        with open_store(spec, spec.targets[names[1]], "prepare") as store:
            install_gate(spec, store, planned, stream)
            types[names] = {column.name: store.type_of(column) for column in planned.target.columns}
    folders.work(spec)
    spool_of(spec).create(stream.l0)
    with ledger.connection.transaction():
        _record(spec, ledger, stream, pieces, findings, created)
        for (source, target), planned_types in types.items():
            ledger.record_types(source, target, planned_types)
    return Prepared(stream, transforms)


def _remove_after_failure(spec: Spec, ledger: Ledger) -> None:
    """Leave nothing behind; what can't be removed now (a server that is down) goes with the next prepare or abort."""
    try:
        remove_unfinished(spec, ledger)
    except ChangeoverError as error:
        log.warning("not everything could be removed: %s", error)


def _create_targets(
    spec: Spec, transforms: Mapping[tuple[str, str], transform.Transform], ledger: Ledger
) -> dict[tuple[str, str], bool]:
    """Create what is missing; each is on record before it is there, so that whoever comes after a kill knows whose it is."""
    created = {}
    for (source, target), planned in transforms.items():
        with open_store(spec, spec.targets[target], "prepare") as store:
            schema, name = planned.target.schema, planned.target.name
            missing = store.columns(schema, name) is None
            ledger.audit("prepare", "creating", {"source": source, "target": target, "created": missing})
            if missing:
                create_target(spec, store, planned)
            elif store.has_rows(schema, name):
                raise TargetNotEmpty(target, str(planned.target))
            created[source, target] = missing
    return created


def _record(
    spec: Spec, ledger: Ledger, stream: Stream, pieces: Sequence[definition.Piece], findings: Preflight,
    created: Mapping[tuple[str, str], bool],
) -> None:  # fmt: skip
    """Record, in the caller's transaction, what was made."""
    ledger.record_migration(spec, stream)
    definition.record(ledger, OLD, pieces)
    record_tables(ledger, findings.tables)
    for (source, target), made in created.items():
        ledger.record_load(source, target, stream.l0, made)
    ledger.audit("prepare", "done", {"l0": stream.l0, "slot": stream.slot, "spec": spec.digest})


# -- reverse replication, and the end
