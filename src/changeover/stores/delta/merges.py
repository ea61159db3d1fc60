"""Commits to a Delta table: MERGEs and UPDATEs by version, each tried again on the version that another commit made.

The driver's process does them with Delta's writer in Rust, without a Spark job: planning a MERGE in
the JVM costs seconds however few rows change. The gate is in the MERGE's own condition. So a MERGE
that is repeated, or that comes late, changes nothing which is newer. What it wrote is on stable
storage before a position is written down.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError

from changeover.errors import CouldNotFinish
from changeover.files.folders import sync
from changeover.position import Version

if TYPE_CHECKING:
    import pyarrow as pa

Done = TypeVar("Done")

COMMIT_TRIES = 200
"""Every other writer may commit first; more lost races than this are not races."""

HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)
"""Checkpoints keep the log short to read; old entries are a reader's until somebody removes them."""


def committed(path: str, commit: Callable[[DeltaTable], Done]) -> Done:
    """Commit on the table's newest version, again where another writer came before (driver, task).

    Args:
        path: The table's folder.
        commit: Makes one commit that must follow the version it is given directly, or none.

    Returns:
        What `commit` returned.

    Raises:
        CouldNotFinish: Another writer committed before each try.
    """
    table = DeltaTable(path)
    for _ in range(COMMIT_TRIES):
        try:
            return commit(table)
        except CommitFailedError:
            table.update_incremental()
    raise CouldNotFinish(f"{path}: another writer committed before each of {COMMIT_TRIES} tries: end it and run again")


def properties(*identities: Transaction) -> CommitProperties:
    """Return the properties of a commit that must follow its table's version directly (pure)."""
    return CommitProperties(max_commit_retries=0, app_transactions=list(identities) or None)


def merge(path: str, changes: pa.Table, key: Sequence[str], version: str) -> int:
    """Put each change in place of its key's row where its version is above that row's, or add it (driver).

    Args:
        path: The table's folder.
        changes: One row a key, with the columns to write, version and tombstone among them.
        key: The key columns.
        version: The column of versions.

    Returns:
        How many rows were put or added.
    """
    same = " AND ".join(f"t.{quoted(name)} = s.{quoted(name)}" for name in key)
    row = {quoted(name): f"s.{quoted(name)}" for name in changes.column_names}

    def commit(table: DeltaTable) -> int:
        merging = table.merge(
            changes, same, source_alias="s", target_alias="t", commit_properties=properties(), post_commithook_properties=HOOKS
        )
        newer = older_than(f"t.{quoted(version)}", [f"s.{quoted(version)}['{part}']" for part in Version._fields])
        done = merging.when_matched_update(row, predicate=newer).when_not_matched_insert(row).execute()
        taken = int(done["num_target_rows_updated"]) + int(done["num_target_rows_inserted"])
        if taken:
            make_durable(path, table.version())
        return taken

    return committed(path, commit)


def bury(path: str, columns: Sequence[str], version: str, deleted: str, at: Version) -> None:
    """Make a tombstone of every row whose version is below one (driver).

    Args:
        path: The table's folder.
        columns: The columns that a tombstone has no value of.
        version: The column of versions.
        deleted: The column that says whether a row is a tombstone.
        at: The version, which the tombstones get.
    """
    parts = [f"arrow_cast({value}, '{kind}')" for value, kind in zip(at, ("Int32", "Int64", "Int64"), strict=True)]
    named = ", ".join(f"'{name}', {part}" for name, part in zip(Version._fields, parts, strict=True))
    tombstone = {quoted(version): f"named_struct({named})", quoted(deleted): "true"}
    tombstone |= {quoted(name): "NULL" for name in columns}

    def commit(table: DeltaTable) -> None:
        table.update(
            tombstone, predicate=older_than(quoted(version), parts),
            commit_properties=properties(), post_commithook_properties=HOOKS,
        )  # fmt: skip
        make_durable(path, table.version())

    committed(path, commit)


def older_than(version: str, parts: Sequence[str]) -> str:
    """Return the condition that a version lies below another one, whose parts are given (pure).

    The engine has no order of structs, so it is written field by field.
    """
    (epoch, lsn, ordinal), own = parts, [f"{version}['{part}']" for part in Version._fields]
    last = f"{own[1]} = {lsn} AND {own[2]} < {ordinal}"
    return f"({own[0]} < {epoch} OR ({own[0]} = {epoch} AND ({own[1]} < {lsn} OR ({last}))))"


def quoted(name: str) -> str:
    """Return a name as an identifier of the writer's SQL (pure)."""
    return '"' + name.replace('"', '""') + '"'


def make_durable(path: str, version: int) -> None:
    """Bring a commit and the files that it added to stable storage; the writer leaves that to the system (driver).

    Args:
        path: The table's folder.
        version: The commit's version.
    """
    folder = Path(path)
    entry = folder / "_delta_log" / f"{version:020d}.json"
    actions = map(json.loads, entry.read_text(encoding="utf-8").splitlines())
    for added in [folder / unquote(action["add"]["path"]) for action in actions if "add" in action]:
        sync(added)
    for made in (folder, entry, entry.parent):
        sync(made)
