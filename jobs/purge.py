"""Purge: rows of the migrated tables that are still kept when a migration is over, and their removal.

Kept are the spool, the table of differences, Spark's scratch, samples and bounds in the ledger's verdicts and chunks, and files of
a lake that no version in use holds. What a migration that goes on needs stays; log files hold no row. The record of what was done,
and every verdict's counts and positions, stay too. Runs on the driver, without Spark.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from changeover.errors import Refused
from changeover.jobs.ledger.ledger import Ledger
from changeover.spec import Spec
from changeover.stores.delta.store import DeltaStore

SAMPLES = """
UPDATE changeover.verdict SET detail = detail || '{"sample": [], "source_ranges": [], "target_ranges": []}'
    || jsonb_build_object('checks', (SELECT coalesce(jsonb_agg(one || '{"first_difference": null}'), '[]')
        FROM jsonb_array_elements(detail -> 'checks') AS one))
WHERE migration = %s AND (detail -> 'sample' <> '[]' OR detail -> 'source_ranges' <> '[]' OR detail -> 'target_ranges' <> '[]'
    OR jsonb_path_exists(detail, '$.checks[*].first_difference ? (@ != null)'))
"""
BOUNDS = """
UPDATE changeover.chunk SET lower = NULL, upper = NULL WHERE migration = %s AND (lower IS NOT NULL OR upper IS NOT NULL)
"""


@dataclass(frozen=True)
class Kept:
    """What of the rows is still kept: folders in the work folder, verdicts and chunks in the ledger, files of lakes."""

    folders: tuple[str, ...]
    verdicts: int
    chunks: int
    lake_files: int

    def lines(self) -> Iterator[str]:
        """Return what is kept, a line a kind.

        Yields:
            Lines for a person.
        """
        yield from (f"{name} in the work folder" for name in self.folders)
        if self.verdicts:
            yield f"samples of {self.verdicts:,} verdicts in the ledger"
        if self.chunks:
            yield f"bounds of {self.chunks:,} chunks in the ledger"
        if self.lake_files:
            yield f"{self.lake_files:,} old files of the lake"


def kept(spec: Spec) -> Kept:
    """Look what rows are still kept, and change nothing (driver).

    Args:
        spec: The migration's spec.

    Returns:
        What is kept: folders, and counts of verdicts, chunks and files.
    """
    return _swept(spec, dry_run=True)


def purge(spec: Spec) -> Kept:
    """Remove the rows that are still kept (driver).

    Readers of the lake's earlier versions fail from then on.

    Args:
        spec: The migration's spec.

    Returns:
        What was removed: folders, and counts of verdicts, chunks and files.

    Raises:
        Refused: The migration goes on, and needs them.
    """
    with Ledger.open(spec, "purge") as ledger:
        if ledger.exists() and ledger.milestones()[1] is None:
            raise Refused("purge: the migration goes on and needs its rows: `changeover finalize` or `changeover abort` first")
    return _swept(spec, dry_run=False)


def _swept(spec: Spec, *, dry_run: bool) -> Kept:
    verdicts, chunks = _in_ledger(spec, dry_run)
    files = sum(len(table.vacuum(0, dry_run=dry_run, enforce_retention_duration=False)) for table in _lakes(spec))
    return Kept(tuple(_folders(spec, dry_run)), verdicts, chunks, files)


def _folders(spec: Spec, dry_run: bool) -> list[str]:
    """Return which folders hold rows, and are gone unless it was to look only; of spools, those that a killed end left."""
    ours = (*spec.work.glob("spool*"), spec.work / "differences", spec.work / "scratch")
    present = [path for path in ours if path.is_dir()]
    filled = [path for path in present if any(path.iterdir())]
    for path in present if not dry_run else ():
        shutil.rmtree(path)
    return sorted(path.name for path in filled)


def _in_ledger(spec: Spec, dry_run: bool) -> tuple[int, int]:
    """Return how many verdicts and chunks hold values of rows, which are gone unless it was to look only."""
    with Ledger.open(spec, "purge") as ledger:
        if not ledger.exists():
            return 0, 0
        with ledger.connection.transaction(force_rollback=dry_run):
            verdicts, chunks = (ledger.connection.execute(one, [spec.name]).rowcount for one in (SAMPLES, BOUNDS))
        if not dry_run:
            ledger.audit("purge", "done", {"verdicts": verdicts, "chunks": chunks})
        return verdicts, chunks


def _lakes(spec: Spec) -> Iterator[DeltaTable]:
    for target in spec.targets.values():
        if target.kind != "delta":
            continue
        store = DeltaStore(target.name, target.folder, spec.name, spec.mode)
        for table in spec.tables:
            try:
                yield DeltaTable(str(store.path(table.target_name[1])))
            except TableNotFoundError:
                continue
