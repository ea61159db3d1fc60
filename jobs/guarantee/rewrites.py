"""Rewrites: a table whose file was replaced reads as empty under an older snapshot, without an error and without an event.

Only a TRUNCATE says so in the stream, and then every row that the old snapshot would have shown is gone anyhow. Any other new
file stops the table, because nobody can tell which chunks read the old one (PostgreSQL, ALTER TABLE: a rewrite is not MVCC-safe).
"""

from __future__ import annotations

import pyarrow.compute as pc

from changeover.errors import TableStopped
from changeover.jobs.ledger.chunks import same_file
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.source.catalog import SourceTable, source_table
from changeover.jobs.source.marker import mark
from changeover.jobs.source.partitions import record, recorded, require_same_partitions
from changeover.jobs.spool.events import TRUNCATE
from changeover.jobs.spool.table import Spool
from changeover.jobs.spool.waiting import await_spool
from changeover.session import Connection
from changeover.spec import Table

FOR_EVER = 2**63 - 1


def require_same_file(ledger: Ledger, spool: Spool, old: Connection, table: Table) -> None:
    """Stop a table whose file is not the one that was prepared, unless the stream tells of a TRUNCATE since (driver)."""
    if stopped := ledger.stopped().get(table.source):
        raise TableStopped(table.source, stopped)
    require_same_partitions(ledger, old, table)
    present = source_table(old, table)
    rewritten = _rewritten(ledger, table, present)
    if rewritten is None:
        return
    if present is None or not _truncated(ledger, spool, old, table.source_relation):
        reason = f"{rewritten} was rewritten since prepare, and a rewritten table reads as empty under an older snapshot"
        ledger.stop(reason, table.source)
        raise TableStopped(table.source, reason)
    ledger.record_file(table.source, present.filenode)
    record(ledger, table.source, present.partitions or ())


def _rewritten(ledger: Ledger, table: Table, present: SourceTable | None) -> str | None:
    """Return what has not the file that was prepared, the table or one of its partitions, None where all have it."""
    if present is None or present.partitions is None:
        return None if same_file(ledger.source_table(table.source)[0], present.filenode if present else None) else "it"
    files = {part.oid: part.filenode for part in present.partitions}
    parts = recorded(ledger, table.source) or ()
    return next((f"its partition {p.name}" for p in parts if not same_file(p.filenode, files.get(p.oid))), None)


def _truncated(ledger: Ledger, spool: Spool, old: Connection, relation: str) -> bool:
    """Return whether the spool, up to this moment, holds a TRUNCATE of the table."""
    position = mark(old, "file")
    await_spool(ledger, spool, position, f"the stream, which would tell whether {relation}, which has a new file, was truncated,",
                enough=lambda: _spooled(spool, relation))  # fmt: skip
    return _spooled(spool, relation)


def _spooled(spool: Spool, relation: str) -> bool:
    outline = spool.outline(0, FOR_EVER)
    return bool(pc.any(pc.and_(pc.equal(outline["relation"], relation), pc.equal(outline["op"], TRUNCATE))).as_py())
