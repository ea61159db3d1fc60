"""Status: where a migration is, from the ledger and the old store alone; starts no JVM.

It looks and changes nothing. What it says of a position is what the ledger says: every event below it was offered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from changeover.jobs.capture import lag
from changeover.jobs.ledger import Ledger
from changeover.jobs.progress import chunk_progress
from changeover.position import format_lsn
from changeover.spec import Spec


@dataclass(frozen=True)
class Status:
    """Chunks and rows loaded, each load's state and position, the stream's lag, authority, and the newest verdicts."""

    name: str
    chunks: int
    chunks_loaded: int
    rows: int
    loads: list[dict[str, Any]]
    spool_end: str
    source_lsn: str
    kept_wal_bytes: int | None
    store: str
    epoch: int
    verdicts: list[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        """Return the page for a person."""
        yield f"{self.name}: {self.chunks_loaded} of {self.chunks} chunks, {self.rows:,} rows"
        for load in self.loads:
            stopped = f", stopped: {load['stopped']}" if load["stopped"] else ""
            yield f"  {load['source']} in {load['target']}: {load['state']}, target is at LSN {load['applied']}{stopped}"
        kept = f"{self.kept_wal_bytes or 0:,} bytes of WAL kept"
        yield f"  spooled up to {self.spool_end}, the source is at {self.source_lsn}, {kept}"
        yield f"  the {self.store} store has authority (epoch {self.epoch})"
        for verdict in self.verdicts:
            yield f"  {verdict['source']} in {verdict['target']}: {verdict['verdict']} ({verdict['at']:%Y-%m-%d %H:%M:%S})"


def status(spec: Spec) -> Status:
    """Look at the ledger, the spool and the slot (driver); raises StepOrder before prepare."""
    with Ledger.open(spec, "status") as ledger:
        ledger.stream("status")
        behind = lag(spec)
        chunks, loaded, rows = chunk_progress(ledger)
        newest: dict[tuple[str, str], dict[str, Any]] = {}
        for one in ledger.verdicts():
            told = {"source": one.source, "target": one.target, "verdict": one.verdict, "at": one.at, "run": one.run}
            newest.setdefault((one.source, one.target), told)
        authority = ledger.authority()
        loads = [
            {**load.__dict__, "applied": format_lsn(load.applied), "stopped": ledger.source_table(load.source)[2]}
            for load in ledger.loads()
        ]
        return Status(
            spec.name, chunks, loaded, rows, loads, format_lsn(behind.spool_end), format_lsn(behind.source_lsn),
            behind.kept_wal_bytes, authority.store, authority.epoch, list(newest.values()),
        )  # fmt: skip
