"""Merges into a Delta table: the files in which a change is newer than its key's row are written anew, in one commit.

The driver's process does it with Arrow, without a Spark job: planning a MERGE in the JVM costs
seconds however few rows change. Only files whose bounds leave room for a key of the batch are
looked into. Of those the keys and versions are read first, and the rest where a row changes. A
row keeps its place, so files stay as far apart in their keys as they were appended. The gate is
the comparison of versions. So a merge that is repeated, or that comes late, changes nothing which
is newer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from changeover.errors import CouldNotFinish
from changeover.files.folders import sync
from changeover.position import Version
from changeover.stores.delta.files import DataFile, bounded, files_of, write

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

Done = TypeVar("Done")

COMMIT_TRIES = 200
"""Every other writer may commit first; more lost races than this are not races."""

HOOKS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)
"""Checkpoints keep the log short to read; old entries are a reader's until somebody removes them."""

SMALL_BYTES = 8 << 20
"""A file below it takes the rows that are new, so that batches of a few rows do not make a file each."""


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


def act(table: DeltaTable, actions: Sequence[AddAction | RemoveAction], *identities: Transaction) -> None:
    """Commit actions directly after a table's version.

    Args:
        table: The table, at the version that was looked at.
        actions: The files that come and go.
        identities: The application ids under which they do.

    Raises:
        CommitFailedError: Another writer committed meanwhile.
    """
    table.create_write_transaction(
        list(actions), mode="append", schema=table.schema(), post_commithook_properties=HOOKS,
        commit_properties=CommitProperties(max_commit_retries=0, app_transactions=list(identities) or None),
    )  # fmt: skip


def merge(path: str, changes: pa.Table, key: Sequence[str], version: str) -> int:
    """Put each change in place of its key's row where its version is above that row's, or add it (driver).

    Args:
        path: The table's folder.
        changes: One row a key, with all columns of the table.
        key: The key columns.
        version: The column of versions.

    Returns:
        How many rows were put or added.

    Raises:
        CouldNotFinish: The table has a feature that its files alone don't tell of, or others commit all the time.
        OSError: The folder takes nothing.
    """

    def commit(table: DeltaTable) -> int:
        merging = Merging(Path(path), table, changes, key, version)
        taken = merging.run()
        replace(Path(path), table, merging.actions)
        return taken

    return committed(path, commit)


class Merging:
    """One merge into one version of a table; `actions` are the files that it makes and takes away."""

    def __init__(self, folder: Path, table: DeltaTable, changes: pa.Table, key: Sequence[str], version: str) -> None:
        import numpy as np
        import pyarrow as pa

        schema = pa.schema(table.schema())
        self.folder, self.table, self.key, self.version = folder, table, tuple(key), version
        self.changes = changes.select(schema.names).cast(schema)
        self.met = np.zeros(len(changes), bool)
        self.actions: list[AddAction | RemoveAction] = []

    def run(self) -> int:
        """Write what changes; return how many changes are taken."""
        import numpy as np

        files = files_of(self.table)
        last = files.pop() if files and files[-1].size < SMALL_BYTES else None
        taken = sum(self._put(file, added=False) for file in files)
        if last is not None:
            return taken + self._put(last, added=True)
        rows = np.flatnonzero(~self.met)
        self._add([self.changes.take(rows)] if len(rows) else [])
        return taken + len(rows)

    def _put(self, file: DataFile, *, added: bool) -> int:
        """Write a file anew with the changes that are newer than its rows, and with `added` those of keys that no file has."""
        import numpy as np
        import pyarrow as pa

        schema, count = self.changes.schema, len(self.changes)
        order, won = np.arange(0), 0
        if room := within(self.changes, {name: file.bounds[name] for name in self.key if name in file.bounds}):
            keyed = file.read(schema, (*self.key, self.version))
            places = matches(self.changes, keyed, self.key)
            rows = np.flatnonzero(places >= 0)
            self.met[places[rows]] = True
            newer = above(self.changes[self.version].take(places[rows]), keyed[self.version].take(rows))
            order = np.arange(len(keyed)) + count
            order[rows[newer]] = places[rows[newer]]
            won = int(newer.sum())
        absent = np.flatnonzero(~self.met) if added else np.arange(0)
        if won or len(absent):
            whole = file.read(schema, schema.names)
            order = order if room else np.arange(len(whole)) + count
            rows_of_both = pa.concat_tables([self.changes, whole]).take(np.concatenate((order, absent)))
            self._add([rows_of_both])
            self.actions.append(file.removed())
        return won + len(absent)

    def _add(self, tables: Sequence[pa.Table]) -> None:
        if (made := write(self.folder, tables, bounded(self.table, self.key))) is not None:
            self.actions.append(made)


def within(changes: pa.Table, bounds: dict[str, tuple[Any, Any]]) -> bool:
    """Return whether a key of the changes may be in a file with these bounds (pure)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    inside = pa.array(np.ones(len(changes), bool))
    for name, (low, high) in bounds.items():
        if low is not None and high is not None:
            column, kind = changes[name], changes.schema.field(name).type
            fits = pc.and_(pc.greater_equal(column, pa.scalar(low, kind)), pc.less_equal(column, pa.scalar(high, kind)))
            inside = pc.and_(inside, fits)
    return bool(pc.any(inside).as_py())


def matches(changes: pa.Table, rows: pa.Table, key: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return for each row the place of the change that has its key, -1 where none has (pure).

    Column by column a value becomes its number among those of the changes, and the numbers of all
    columns become one.
    """
    import numpy as np
    import pyarrow.compute as pc

    mine, theirs = np.zeros(len(changes), np.int64), np.zeros(len(rows), np.int64)
    for name in key:
        own, other = comparable(changes[name]), comparable(rows[name])
        values = pc.unique(own)
        numbers = pc.index_in(other, value_set=values).fill_null(-1).to_numpy()
        wide = np.where((theirs < 0) | (numbers < 0), -1, theirs * len(values) + numbers)
        known, mine = np.unique(mine * len(values) + pc.index_in(own, value_set=values).to_numpy(), return_inverse=True)
        at = np.minimum(np.searchsorted(known, wide), len(known) - 1)
        theirs = np.where(known[at] == wide, at, -1)
    place = np.empty(len(changes), np.int64)
    place[mine] = np.arange(len(changes))
    return np.where(theirs < 0, -1, place[theirs])


def comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return values of which equal ones have one form: zero without a sign, and lists as texts (pure)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type):
        return pc.add(column, pa.scalar(0.0, column.type))
    if pa.types.is_nested(column.type):
        return pa.chunked_array([[repr(value) for value in column.to_pylist()]], pa.string())
    return column


def above(versions: pa.ChunkedArray, others: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return where a version is above the other one beside it (pure)."""
    import numpy as np
    import pyarrow.compute as pc

    higher, equal = np.zeros(len(versions), bool), np.ones(len(versions), bool)
    for part in Version._fields:
        own, other = (pc.struct_field(column, part).to_numpy() for column in (versions, others))
        higher |= equal & (own > other)
        equal &= own == other
    return higher


def bury(path: str, key: Sequence[str], version: str, deleted: str, at: Version) -> None:
    """Make a tombstone of every row whose version is below one (driver).

    Args:
        path: The table's folder.
        key: The key columns, all that a tombstone has beside our own.
        version: The column of versions.
        deleted: The column that says whether a row is a tombstone.
        at: The version, which the tombstones get.

    Raises:
        CouldNotFinish: As for `merge`.
        OSError: The folder takes nothing.
    """
    import numpy as np
    import pyarrow as pa

    def commit(table: DeltaTable) -> None:
        actions: list[AddAction | RemoveAction] = []
        schema = pa.schema(table.schema())
        for file in files_of(table):
            rows = file.read(schema, schema.names)
            limit = pa.chunked_array([pa.repeat(pa.scalar(at._asdict(), schema.field(version).type), len(rows))])
            older = above(limit, rows[version])
            if not older.any():
                continue
            gone = {name: rows[name] for name in key} | {version: limit, deleted: pa.repeat(pa.scalar(True), len(rows))}
            tombs = pa.table([gone.get(f.name, pa.nulls(len(rows), f.type)) for f in schema], schema=schema)
            order = np.where(older, np.arange(len(rows)), np.arange(len(rows)) + len(rows))
            made = write(Path(path), [pa.concat_tables([tombs, rows]).take(order)], bounded(table, key))
            actions += [made, file.removed()] if made is not None else []
        replace(Path(path), table, actions)

    committed(path, commit)


def replace(folder: Path, table: DeltaTable, actions: Sequence[AddAction | RemoveAction]) -> None:
    """Commit files that take the place of others, durably; what another writer came before is no file of the table, and removed.

    Args:
        folder: The table's folder.
        table: The table, at the version that was looked at.
        actions: The files that come and go; nothing is committed where there is none.

    Raises:
        CommitFailedError: Another writer committed meanwhile.
    """
    if not actions:
        return
    try:
        act(table, actions)
    except CommitFailedError:
        for action in actions:
            if isinstance(action, AddAction):
                (folder / action.path).unlink()
        raise
    make_durable(folder, table.version() + 1)


def make_durable(folder: Path, version: int) -> None:
    """Bring a commit to stable storage, whose files are there already; the writer leaves that to the system (driver).

    Args:
        folder: The table's folder.
        version: The commit's version.
    """
    entry = folder / "_delta_log" / f"{version:020d}.json"
    for made in (folder, entry, entry.parent):
        sync(made)
