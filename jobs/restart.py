"""Restart: a migration begun anew in a new epoch, when its change stream has a gap that nothing can close.

A slot was lost, or a source failed over or was restored. Whatever was deleted in the gap is in the
targets without any event. The positions of another server say nothing beside those of the first. So
nothing of the old epoch is used again. Its chunks lose their marks' tokens, and its spool is
removed. Each target is emptied under a floor of the new epoch, below which lies whatever an earlier
one may still offer. What `prepare` promises of order holds here too. The epoch is on record before
the first removal, and the ledger's record comes last. So a restart that was killed goes on by the
same command, and until it is done no other step does. Only tables that this migration loads are
emptied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from changeover import failpoints
from changeover.errors import ChangeoverError, Refused, UnsafePlan, UsageError
from changeover.jobs.guarantee import definition
from changeover.jobs.guarantee.assumptions import Moment
from changeover.jobs.install.opening import open_stream
from changeover.jobs.install.removal import remove_from_source
from changeover.jobs.install.targets import create_target, install_gate
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.chunks import append_name, first_token
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.lease import lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import PENDING, Stream
from changeover.jobs.load.prepared import Prepared, plan_transforms, require_reverse
from changeover.jobs.preflight.division import examined
from changeover.jobs.preflight.rules import Preflight
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source.catalog import record_tables
from changeover.jobs.spool.table import remove_spools, spool_of
from changeover.jobs.transform.transform import Transform
from changeover.position import format_lsn
from changeover.session import one_row
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.tenants import EVERY, describe

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

LEASE_SECONDS = 5.0

Transforms = Mapping[tuple[str, str], Transform]


def restart(spec: Spec, spark: SparkSession) -> Prepared:
    """Begin a prepared migration anew in a new epoch; the same command goes on after a kill (driver).

    An error takes away what was made in the old store.

    Args:
        spec: The migration's spec.
        spark: The Spark session.

    Returns:
        What was made: the stream of the new epoch and the transforms.

    Raises:
        Refused: Authority has moved, or the migration ended.
        LeaseHeld: Another step runs.
        UsageError: The spec changed since prepare.
        SpecError: Rows could not come back by the spec's expressions.
        UnsafePlan: Something stands against the plan; it has every reason.
        SlotBlocked: A transaction of the source stays open; it names the oldest.
    """
    with Ledger.open(spec, "prepare") as ledger, _alone(spec, ledger):
        _require_allowed(spec, ledger)
        findings = examined(spec, Moment.PREPARE)
        if findings.reasons:
            raise UnsafePlan(tuple(findings.reasons))
        transforms = plan_transforms(spec, spark, {t.source: findings.tables[t.source] for t in spec.tables})
        require_reverse(spec, spark, transforms)
        before = ledger.stream("status")
        epoch = _begin(ledger)
        failpoints.reach("epoch-begun", epoch)
        try:
            return _make(spec, ledger, findings, transforms, before, epoch)
        except ChangeoverError:
            _give_back(spec)
            raise


@contextmanager
def _alone(spec: Spec, ledger: Ledger) -> Iterator[None]:
    """Hold the leases of every step."""
    with ExitStack() as held:
        for step in ("prepare", "capture", "backfill", "verify", "fence", *map(lease_of, sorted(spec.targets))):
            held.enter_context(ledger.lease(step, wait_seconds=LEASE_SECONDS))
        yield


def _require_allowed(spec: Spec, ledger: Ledger) -> None:
    if ledger.spec_digest() != spec.digest:
        raise UsageError(f"{spec.path} changed since prepare: put it back, or `changeover abort SPEC` and begin again")
    if ledger.milestones()[1] is not None:
        raise Refused("prepare --anew: the migration was finalized, so there is nothing to begin anew")
    if (gone := epochs.at(ledger.authorities(), NEW)) is not None:
        scope = "" if gone == EVERY else f" over {describe(gone)}"
        raise Refused(
            f"prepare --anew: authority{scope} has moved to the new store, whose rows are the truth and would be emptied:"
            f" `changeover flags rollback SPEC` first"
        )


def _make(spec: Spec, ledger: Ledger, findings: Preflight, transforms: Transforms, before: Stream, epoch: int) -> Prepared:
    """Remove what the old epoch had, and make what the new one has, in the order that is the promise."""
    removed = reverse_setup.remove(spec, ledger) + remove_from_source(spec)
    remove_spools(spec.work)
    opened, pieces = open_stream(spec, findings)
    stream = replace(opened, epoch=epoch)
    failpoints.reach("stream-opened", epoch)
    types = {}
    for (source, target), planned in transforms.items():
        with open_store(spec, spec.targets[target], "prepare") as store:
            types[source, target] = {column.name: store.type_of(column) for column in planned.target.columns}
            if store.columns(planned.target.schema, planned.target.name) is None:
                create_target(spec, store, planned)
            install_gate(spec, store, planned, stream)
            chunks = ledger.chunks(source, target)
            names = [append_name(spec.name, before.image, source, target, row.chunk) for row in chunks]
            store.begin_anew(planned.target, stream.image, names)
            failpoints.reach("target-emptied", f"{planned.target} in {target}")
    spool_of(spec, epoch).create(stream.l0)
    failpoints.reach("before-record", epoch)
    with ledger.connection.transaction():
        _record(ledger, stream)
        definition.record(ledger, OLD, pieces)
        record_tables(ledger, findings.tables)
        for (source, target), planned_types in types.items():
            ledger.record_types(source, target, planned_types)
        emptied = [f"{planned.target} in {target}" for (_, target), planned in transforms.items()]
        detail = {"epoch": epoch, "l0": format_lsn(stream.l0), "removed": removed, "emptied": emptied}
        ledger.audit("prepare", "anew", detail)
    log.info("epoch %s begins at %s", epoch, format_lsn(stream.l0))
    return Prepared(stream, transforms)


def _begin(ledger: Ledger) -> int:
    """Begin an epoch above all that ever were: every load is pending, and no attempt at a chunk may mark it any more."""
    with ledger.connection.transaction():
        row = one_row(
            ledger.connection.execute(
                "UPDATE changeover.migration AS m SET begun = 1 + greatest(m.epoch, m.begun, (SELECT max(a.epoch)"
                " FROM changeover.authority AS a WHERE a.migration = m.name)) WHERE m.name = %s RETURNING m.begun",
                [ledger.migration],
            )
        )
        ledger.connection.execute(
            "UPDATE changeover.chunk SET token = %s WHERE migration = %s", [first_token(row[0]), ledger.migration]
        )
        ledger.connection.execute("UPDATE changeover.load SET state = %s WHERE migration = %s", [PENDING, ledger.migration])
        if ledger.reads():  # the evidence by which they moved is of the rows that are about to go
            ledger.record_flag(None, 0)
        ledger.audit("prepare", "begun anew", {"epoch": row[0]})
    return int(row[0])


def _record(ledger: Ledger, stream: Stream) -> None:
    """Record, in the caller's transaction, what an epoch begins with: its stream, no chunk, no event offered, no table."""
    ledger.connection.execute(
        "UPDATE changeover.migration SET epoch = %s, begun = NULL, prepared = now() WHERE name = %s",
        [stream.epoch, ledger.migration],
    )
    ledger.record_stream(OLD, stream)
    ledger.connection.execute("DELETE FROM changeover.chunk WHERE migration = %s", [ledger.migration])
    ledger.connection.execute(
        "UPDATE changeover.load SET state = %s, applied = %s, told = '0/0', refused = 0, swept = 0, events = 0, stopped = NULL,"
        " changed = now() WHERE migration = %s",
        [PENDING, format_lsn(stream.l0), ledger.migration],
    )
    ledger.connection.execute(
        "INSERT INTO changeover.authority (migration, epoch, store, from_lsn) VALUES (%s, %s, 'old', %s)",
        [ledger.migration, stream.epoch, format_lsn(stream.l0)],
    )


def _give_back(spec: Spec) -> None:
    """Leave no slot and no snapshot behind in the old store; what can't be removed now goes with the next try."""
    try:
        remove_from_source(spec)
    except ChangeoverError as error:
        log.warning("not everything could be removed: %s", error)
