"""Explain: the story of one row by its target key, from what is on record; starts no JVM.

It gives the chunk that the key belongs to, the row's image in each target, and its cell (version or
tombstone). It gives the spooled events of its key in both stores, its differences, the stage, its
tenant and who has authority over it. That is enough to see why a row is as it is. What is gone for
good, as versions and events are after `finalize`, is said to be gone. Keys are compared by type, so
an index serves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from psycopg import sql
from psycopg.rows import dict_row
from pyarrow.dataset import dataset as dataset_of

from changeover.errors import SpecError
from changeover.jobs.ledger.epochs import EVERYTHING, NEW, OLD, AuthorityEpoch, Standing, authority_epochs, stamped, standing
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority, ChunkRow, Stream
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.catalog import SourceTable, source_table
from changeover.jobs.spool.events import TRUNCATE
from changeover.jobs.spool.table import Spool, spool_of
from changeover.jobs.transform import masking
from changeover.jobs.transform.derivation import derivations, origin
from changeover.jobs.transform.tenancy import new_column, old_column
from changeover.names import joined, segment
from changeover.position import Version, format_lsn, parse_lsn
from changeover.session import Connection, application_name, connect, one_row
from changeover.spec import Spec, Table, Target
from changeover.stores.base.interface import OWNER, VERSION_COLUMNS
from changeover.stores.delta.appends import MARKS, marks_among
from changeover.stores.postgres.gate import GatedTable

NONE = "none"

Key = Mapping[str, str]
"""A key's columns with their values in PostgreSQL's text form."""


@dataclass
class Story:
    """What is known of one row: `parts` by where it was found, in the order in which it is told."""

    table: str
    key: tuple[str, ...]
    parts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Return the story for a person, a line a part.

        Yields:
            One line at a time.
        """
        yield f"{self.table} {'/'.join(self.key)}"
        for name, value in self.parts.items():
            for line in (value or [NONE]) if isinstance(value, list) else [value]:
                yield f"  {name}: {line if isinstance(line, str) else json.dumps(line, default=str, ensure_ascii=False)}"


def explain(spec: Spec, key: Sequence[str], *, table: str | None = None) -> Story:
    """Tell the story of the row with this target key (driver).

    Args:
        spec: The migration's spec.
        key: The target key's values as texts, in the spec's order.
        table: The table, where several have as many key columns; None is the only one.

    Returns:
        The story: what both stores, the stream and the ledger have of the row.

    Raises:
        SpecError: No table has such a key, or a value is none of its column's type.
        StepOrder: Prepare did not run.
        ServerUnavailable: A store or the ledger can't be reached.
    """
    planned = _table(spec, key, table)
    story = Story(planned.target, tuple(key))
    with (
        Ledger.open(spec, "explain") as ledger,
        connect(spec.source.dsn.resolve(), application_name(spec.name, "explain")) as old,
    ):
        epoch = ledger.stream("explain").epoch
        _, finalized = ledger.milestones()
        given = dict(zip(planned.key, key, strict=True))
        changes = ledger.authorities()
        source = source_table(old, planned)
        own = _source_key(spec, old, planned, source, given) if source is not None else None
        if own is not None:  # as the server writes it
            given |= {name: own[column] for name, column in _moved(planned).items() if column in own}
        log = authority_epochs(changes, tenant_of(spec, planned, given))
        if source is not None and own is not None:
            story.parts["source row"] = _row(spec, old, planned.source_name, own) or NONE
            story.parts["chunk"] = _chunks(ledger, old, planned, source, own)
            kept = _gone(finalized) or _begun(ledger.begun())
            story.parts["spooled events"] = kept or _events(spool_of(spec, epoch), planned.source_name, own, OLD, log)
        if (path := reverse.recorded(ledger)) is not None:
            story.parts["events of the new store"] = _new_events(spec, ledger, planned, given, path, log)
        for target in spec.targets.values():
            told_by = _in_lake if target.kind == "delta" else _in_postgres
            story.parts.update(told_by(spec, planned, target, given, finalized))
        story.parts["differences"] = _differences(spec, planned, given)
        story.parts["stage"] = ledger.stage() or "never switched"
        story.parts.update(_authority(changes, tenant_of(spec, planned, given)))
        if finalized:
            story.parts["finalized"] = f"{finalized:%Y-%m-%d %H:%M:%S}"
    return _masked(story, planned, source)


def _masked(story: Story, table: Table, source: SourceTable | None) -> Story:
    """Return a story that shows no sensitive value; what was found is a row, some rows, events with a row each, or words."""
    if not table.sensitive:
        return story
    old = masking.of_source(table, source.identity if source else ())
    new = masking.of_target(table, derivations(table, source.store_columns if source else ()))

    def shown(value: Any, mask: masking.Mask) -> Any:
        if isinstance(value, list):
            return [shown(one, mask) for one in value]
        if not isinstance(value, dict):
            return value
        return {**value, "row": mask.row(value["row"])} if "op" in value and "row" in value else mask.row(value)

    sides = {"source row": old, "spooled events": old, "events of the new store": new}
    parts = {
        name: shown(value, sides.get(name, new)) if name in sides or name.endswith(" row") else value
        for name, value in story.parts.items()
    }
    key = (new.shown(name, value) for name, value in zip(table.key, story.key, strict=True))
    return Story(story.table, tuple(key), parts)


def tenant_of(spec: Spec, table: Table, key: Key) -> str:
    """Return the tenant of the row with a target key, by which its authority goes; without tenants all rows are one."""
    column = new_column(spec, table) if old_column(spec) is not None else None
    return key[column] if column is not None else EVERYTHING


def _authority(changes: Sequence[Authority], tenant: str) -> dict[str, str]:
    """Return the row's tenant, where that is a question, and which store has authority over it."""
    present = authority_epochs(changes, tenant)[-1]
    owner = {"tenant": tenant} if tenant != EVERYTHING else {}
    return {**owner, "authority": f"{present.store} store, epoch {present.epoch}"}


def _gone(finalized: datetime | None) -> str | None:
    return f"none is kept since the migration was finalized at {finalized:%Y-%m-%d %H:%M:%S}" if finalized else None


def _begun(epoch: int | None) -> str | None:
    return f"none is told while `prepare --anew` is on its way to epoch {epoch}: run it again to its end" if epoch else None


def _table(spec: Spec, key: Sequence[str], named: str | None) -> Table:
    tables = (spec.table(named),) if named is not None else spec.tables
    fitting = [table for table in tables if len(table.key) == len(key)]
    keys = "; ".join(f"{table.target} ({' '.join(table.key)})" for table in fitting or tables)
    if not fitting:
        raise SpecError(spec.path, "key", f"no table has a key of {len(key)} columns; the keys are: {keys}")
    if len(fitting) > 1:
        raise SpecError(spec.path, "key", f"several tables have a key of {len(key)} columns: name one by --table of {keys}")
    return fitting[0]


def _moved(table: Table) -> dict[str, str]:
    """Return the target key's columns that hold a source column unchanged."""
    return {name: own for name in table.key if (own := origin(table, name)) is not None}


def _source_key(spec: Spec, old: Connection, table: Table, source: SourceTable, given: Key) -> dict[str, str] | None:
    """Return the source key as the database writes its values, where the target key holds each of its columns unchanged."""
    own = {column: given[name] for name, column in _moved(table).items()}
    if not set(source.identity) <= set(own):
        return None
    written = _as_written(spec, old, own, {column.name: column.type for column in source.key})
    return _as_it_stands(old, table.source_name, written)


def _as_written(spec: Spec, connection: Connection, key: Key, types: Mapping[str, str]) -> dict[str, str]:
    """Return a key of columns with these types as the database writes its values."""
    casts = sql.SQL(", ").join(sql.SQL("{}::text").format(_typed(key[name], kind)) for name, kind in types.items())
    with _speaking_of(spec, key):
        row = one_row(connection.execute(sql.SQL("SELECT {}").format(casts)))
    return dict(zip(types, row, strict=True))


def _as_it_stands(connection: Connection, name: tuple[str, str], key: dict[str, str]) -> dict[str, str]:
    """Return a key in the notation that its row has, 1.0 for 1, as the stream tells it; without such a row as it was given."""
    same = _same(connection, name, key)
    if same is None:
        return key
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(column)) for column in key)
    row = connection.execute(sql.SQL("SELECT {} FROM {} WHERE {}").format(texts, sql.Identifier(*name), same)).fetchone()
    return key if row is None else dict(zip(key, row, strict=True))


@contextmanager
def _speaking_of(spec: Spec, key: Key) -> Iterator[None]:
    """Turn a value that its column's type does not take into the error that says so."""
    try:
        yield
    except (psycopg.DataError, pa.ArrowInvalid) as error:
        message = str(error).strip().splitlines()[0]
        raise SpecError(spec.path, "key", f"{'/'.join(key.values())} is no key of that table ({message})") from error


def _typed(value: str, type_name: str) -> sql.Composed:
    return sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(type_name))


TYPES = """
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""


def _same(connection: Connection, name: tuple[str, str], key: Key) -> sql.Composed | None:
    """Return the condition that a table's row has this key, its values of the columns' own types; None without the table."""
    rows = connection.execute(TYPES, [sql.Identifier(*name).as_string(connection)]).fetchall()
    types: dict[str, str] = {row[0]: row[1] for row in rows}
    if not set(key) <= set(types):
        return None
    parts = [sql.SQL("{} = {}").format(sql.Identifier(column), _typed(value, types[column])) for column, value in key.items()]
    return sql.SQL(" AND ").join(parts)


def _row(spec: Spec, connection: Connection, name: tuple[str, str], key: Key) -> dict[str, Any] | None:
    """Return one row by its key."""
    same = _same(connection, name, key)
    if same is None:
        return None
    with connection.cursor(row_factory=dict_row) as cursor, _speaking_of(spec, key):
        return cursor.execute(sql.SQL("SELECT * FROM {} WHERE {}").format(sql.Identifier(*name), same)).fetchone()


def _chunks(ledger: Ledger, old: Connection, table: Table, source: SourceTable, own: Key) -> list[str]:
    """Return in which chunk of each load the key is; the database compares, under the key's own order."""
    lines = []
    for load in ledger.loads():
        if load.source == table.source:
            for chunk in ledger.chunks(load.source, load.target):
                if _inside(old, source, [own[name] for name in source.identity], chunk):
                    state = f"loaded {chunk.loaded:%Y-%m-%d %H:%M:%S}" if chunk.loaded else "pending"
                    lines.append(f"{load.target}: chunk {chunk.chunk}, {state}")
    return lines


def _inside(old: Connection, source: SourceTable, own: Sequence[str], chunk: ChunkRow) -> bool:
    def typed(values: Sequence[str]) -> sql.Composed:
        parts = [_typed(value, column.type) for value, column in zip(values, source.key, strict=True)]
        return sql.SQL("({})").format(sql.SQL(", ").join(parts))

    sides = [
        sql.SQL("{} {} {}").format(typed(own), sql.SQL(operator), typed(bound))
        for operator, bound in ((">=", chunk.lower), ("<", chunk.upper))
        if bound is not None
    ]
    row = old.execute(sql.SQL("SELECT {}").format(sql.SQL(" AND ").join([sql.SQL("true"), *sides]))).fetchone()
    return bool(row and row[0])


def _new_events(
    spec: Spec, ledger: Ledger, table: Table, given: Key, path: Stream, log: Sequence[AuthorityEpoch]
) -> list[dict[str, Any]]:
    """Return the events of the key in the new store's stream, as far as the path on record has brought them."""
    types = {column.name: column.type for column in ledger.source_table(table.target_relation, NEW)[1] if column.key}
    if not set(types) <= set(given) or not reverse.spool_of(spec).path.exists():
        return []
    with connect(reverse.new_dsn(spec), application_name(spec.name, "explain")) as new:
        own = _as_written(spec, new, given, types)
    in_stream = reverse.begun_since(path, ledger.authorities())
    carried = [period for period in log if period.store == OLD or period.epoch in in_stream]
    return _events(reverse.spool_of(spec), table.target_name, own, NEW, carried)


def _events(spool: Spool, name: tuple[str, str], own: Key, store: str, log: Sequence[AuthorityEpoch]) -> list[dict[str, Any]]:
    """Return the spooled events of a key in a store's stream, in their order, and what each is; it is read a part at a time.

    `log` is the row's own. What a store was written while it had no authority is at its place in the log, and no version.
    """
    ours = (pc.field("relation") == joined(*name)) & (pc.field("lsn") < spool.end())  # beyond it, a part of a transaction
    columns = ["lsn", "ordinal", "op", "row", "key", "note"]
    events = [
        event
        for batch in _dataset(spool.path).to_batches(columns=columns, filter=ours)
        for event in batch.filter(_of_key(batch, own)).to_pylist()
    ]
    return [
        {**_place(log, store, event), "op": event["op"], "row": dict(event["row"] or event["key"] or [])}
        for event in sorted(events, key=lambda event: (event["lsn"], event["ordinal"]))
    ]


def _place(log: Sequence[AuthorityEpoch], store: str, event: Mapping[str, Any]) -> dict[str, str]:
    """Return the version under which an event of a store's log is offered, or where it stands there and why it is not."""
    tenant = log[-1].tenant
    version = stamped(log, tenant, store, Version(0, event["lsn"], event["ordinal"]))
    stands = standing(log, tenant, store, event["lsn"], event["note"] is not None)
    if stands is Standing.OFFERED:
        return {"version": str(version)}
    return {"at": f"{format_lsn(event['lsn'])}:{event['ordinal']}", "standing": STANDINGS[stands]}


STANDINGS = {
    Standing.ECHO: "an echo: a write of our own, which brought the other store's",
    Standing.ROGUE: "rogue: by somebody, while the store had no authority",
}


def _dataset(path: Path) -> Any:
    """Return a Delta table's present files as one dataset.

    The one that the table makes of itself leaves out files by statistics that their writer never gave.
    """
    table = DeltaTable(str(path)).to_pyarrow_dataset()
    if not table.files:
        return dataset_of(table.schema.empty_table())
    return dataset_of(table.files, schema=table.schema, format="parquet", filesystem=table.filesystem)


def _of_key(batch: pa.RecordBatch, own: Key) -> pa.Array:
    """Return which events are of a source key: by the new row, or by the old key where there is no row or the key changed."""
    masks = []
    for images in ("row", "key"):
        matches = [pc.equal(pc.map_lookup(batch[images], column, "first"), value) for column, value in own.items()]
        mask = matches[0]
        for more in matches[1:]:
            mask = pc.and_(mask, more)
        masks.append(pc.fill_null(mask, False))
    return pc.or_(pc.or_(*masks), pc.equal(batch["op"], TRUNCATE))  # which takes every row with it


def _in_lake(spec: Spec, table: Table, target: Target, key: Key, finalized: datetime | None) -> dict[str, Any]:
    path = target.folder / segment(table.target_name[1])
    if not DeltaTable.is_deltatable(str(path)):
        return {f"{target.name} row": NONE}
    dataset = _dataset(path)
    with _speaking_of(spec, key):
        parts = [pc.field(name) == pa.scalar(value).cast(dataset.schema.field(name).type) for name, value in key.items()]
    condition = parts[0]
    for part in parts[1:]:
        condition &= part
    rows, cells = [], []
    marks = marks_among(dataset.schema.names) or MARKS
    for row in dataset.to_table(filter=condition).to_pylist():
        version, deleted = map(row.pop, marks)
        row.pop(OWNER, None)
        cells.append(f"{'tombstone' if deleted else 'live'} at {Version(version['epoch'], version['lsn'], version['ordinal'])}")
        if not deleted:
            rows.append(row)
    return {f"{target.name} row": rows or NONE, f"{target.name} cell": cells or _gone(finalized) or NONE}


FLOOR = """
SELECT epoch, lsn::text, ordinal FROM changeover.gate WHERE target = %s AND (epoch, lsn, ordinal) > (image_epoch, image_lsn, -1)
"""
"""A floor that was raised: versions up to it are not kept."""


def _version(row: Sequence[Any]) -> Version:
    """Return the version in a row's first three columns."""
    return Version(row[0], parse_lsn(row[1]), row[2])


def _in_postgres(spec: Spec, table: Table, target: Target, key: Key, finalized: datetime | None) -> dict[str, Any]:
    gated = GatedTable(*table.target_name, table.key, ())
    with connect(target.dsn_value, application_name(spec.name, "explain")) as new:
        row = _row(spec, new, table.target_name, key)
        present = new.execute("SELECT to_regclass(%s) IS NOT NULL", [gated.row_versions.as_string(new)]).fetchone()
        same = _same(new, table.target_name, key)
        cell = floor = None
        if present and present[0] and same is not None:
            floor = new.execute(FLOOR, [gated.target]).fetchone()
            cell = new.execute(
                sql.SQL("SELECT {}, {}::text, {}, {} FROM {} WHERE {}").format(
                    *map(sql.Identifier, VERSION_COLUMNS), gated.row_versions, same
                )
            ).fetchone()
    state = _gone(finalized) or (f"no live write touched it above {_version(floor)}" if floor else "no live write touched it")
    if cell is not None and (floor is None or _version(cell) > _version(floor)):  # else a batch's position has overtaken it
        state = f"{'tombstone' if cell[3] else 'live'} at {_version(cell)}"
    return {f"{target.name} row": row or NONE, f"{target.name} cell": state}


def _differences(spec: Spec, table: Table, key: Key) -> list[dict[str, Any]]:
    path = spec.work / "differences"
    if not DeltaTable.is_deltatable(str(path)):
        return []
    rows = DeltaTable(str(path)).to_pyarrow_table(filters=[("table", "=", table.source)]).to_pylist()
    return [
        {"run": row["run"], "store": row["store"], "class": row["class"], "columns": row["columns"]}
        for row in rows
        if dict(row["key"]) == dict(key)
    ]
