"""Explain: the story of one row by its target key, from what is on record; starts no JVM.

It tells the chunk that the key belongs to, the row's image in each target, its cell (version or tombstone), the spooled events
of its source key, the newest difference and the authority: enough to see why a row is as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
from deltalake import DeltaTable
from psycopg import sql
from psycopg.rows import dict_row

from changeover.errors import SpecError
from changeover.jobs.entries import ChunkRow
from changeover.jobs.ledger import Ledger
from changeover.jobs.preflight import SourceTable, source_table
from changeover.jobs.prepare import spool_of
from changeover.jobs.transform import BARE
from changeover.position import Version, parse_lsn
from changeover.session import Connection, application_name, connect
from changeover.spec import Spec, Table, Target
from changeover.stores.gate import GatedTable


@dataclass
class Story:
    """What is known of one row: `parts` by where it was found, in the order in which it is told."""

    table: str
    key: tuple[str, ...]
    parts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Return the story for a person, a line a part."""
        yield f"{self.table} {'/'.join(self.key)}"
        for name, value in self.parts.items():
            for one in value if isinstance(value, list) else [value]:
                yield f"  {name}: {one if isinstance(one, str) else json.dumps(one, default=str, ensure_ascii=False)}"


def explain(spec: Spec, key: Sequence[str]) -> Story:
    """Tell the story of the row with this target key (driver); the first table whose key has as many columns.

    Raises SpecError where no table has such a key, StepOrder before prepare.
    """
    table = next((t for t in spec.tables if len(t.key) == len(key)), None)
    if table is None:
        wanted = "; ".join(f"{t.target} ({' '.join(t.key)})" for t in spec.tables)
        raise SpecError(spec.path, "key", f"no table has a key of {len(key)} columns; the keys are: {wanted}")
    story = Story(table.target, tuple(key))
    with (
        Ledger.open(spec, "explain") as ledger,
        connect(spec.source.dsn.resolve(), application_name(spec.name, "explain")) as old,
    ):
        ledger.stream("explain")
        seen = source_table(old, table)
        if seen is not None and (own := _source_key(table, seen, key)) is not None:
            story.parts["source row"] = _row(old, *table.source_name, seen.identity, own) or "none"
            story.parts["chunk"] = _chunks(ledger, old, table, seen, own)
            story.parts["spooled events"] = _events(spec, table, dict(zip(seen.identity, own, strict=True)))
        for target in spec.targets.values():
            story.parts.update(_target(spec, table, target, key))
        story.parts["differences"] = _differences(spec, table, key)
        authority = ledger.authority()
        story.parts["authority"] = f"{authority.store} store, epoch {authority.epoch}"
    return story


def _source_key(table: Table, seen: SourceTable, key: Sequence[str]) -> tuple[str, ...] | None:
    """Return the source key, where the target key holds each of its columns unchanged."""
    given = dict(zip(table.key, key, strict=True))
    moved = {match[1]: given[name] for name in table.key if (match := BARE.fullmatch(table.columns.get(name, name).strip()))}
    return tuple(moved[name] for name in seen.identity) if set(seen.identity) <= set(moved) else None


def _row(connection: Connection, schema: str, name: str, key: Sequence[str], values: Sequence[str]) -> dict[str, Any] | None:
    """Return one row by its key given as text."""
    same = sql.SQL(" AND ").join(sql.SQL("{}::text = %s").format(sql.Identifier(column)) for column in key)
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(
            sql.SQL("SELECT * FROM {} WHERE {}").format(sql.Identifier(schema, name), same), list(values)
        ).fetchone()


def _chunks(ledger: Ledger, old: Connection, table: Table, seen: SourceTable, own: Sequence[str]) -> list[str]:
    """Return in which chunk of each load the key is; the database compares, under the key's own order."""
    found = []
    for load in ledger.loads():
        if load.source == table.source:
            for chunk in ledger.chunks(load.source, load.target):
                if _inside(old, seen, own, chunk):
                    state = f"loaded {chunk.loaded:%Y-%m-%d %H:%M:%S}" if chunk.loaded else "pending"
                    found.append(f"{load.target}: chunk {chunk.chunk}, {state}")
    return found


def _inside(old: Connection, seen: SourceTable, own: Sequence[str], chunk: ChunkRow) -> bool:
    def typed(values: Sequence[str]) -> sql.Composed:
        parts = [sql.SQL("{}::{}").format(sql.Literal(v), sql.SQL(c.type)) for v, c in zip(values, seen.key, strict=True)]
        return sql.SQL("({})").format(sql.SQL(", ").join(parts))

    sides = [
        sql.SQL("{} {} {}").format(typed(own), sql.SQL(operator), typed(bound))
        for operator, bound in ((">=", chunk.lower), ("<", chunk.upper))
        if bound is not None
    ]
    row = old.execute(sql.SQL("SELECT {}").format(sql.SQL(" AND ").join([sql.SQL("true"), *sides]))).fetchone()
    return bool(row and row[0])


def _events(spec: Spec, table: Table, own: dict[str, str]) -> list[dict[str, Any]]:
    """Return the spooled events of the source key, in stream order."""
    events = spool_of(spec).events()
    schema, name = table.source_name
    ours = events.filter(pc.equal(events["relation"], f"{schema}.{name}")).select(["lsn", "ordinal", "op", "row", "key"])
    told = []
    for event in ours.to_pylist():
        image = dict(event["row"] or event["key"] or [])
        if all(image.get(column) == value for column, value in own.items()):
            told.append({"version": str(Version(0, event["lsn"], event["ordinal"])), "op": event["op"], "row": image})
    return told


def _target(spec: Spec, table: Table, target: Target, key: Sequence[str]) -> dict[str, Any]:
    schema, name = table.target_name
    if target.kind == "delta":
        wanted = [(column, "=", value) for column, value in zip(table.key, key, strict=True)]
        rows = [
            row for row in DeltaTable(str(target.folder / name)).to_pyarrow_table().to_pylist()
            if all(str(row[column]) == value for column, _, value in wanted)
        ]  # fmt: skip
        return {f"{target.name} row": rows or "none"}
    gated = GatedTable(schema, name, table.key, ())
    same = sql.SQL(" AND ").join(sql.SQL("{}::text = %s").format(sql.Identifier(column)) for column in table.key)
    with connect(target.dsn_value, application_name(spec.name, "explain")) as new:
        cell = new.execute(
            sql.SQL("SELECT _epoch, _lsn::text, _ordinal, _deleted FROM {} WHERE {}").format(gated.touched, same),
            list(key),
        ).fetchone()
        row = _row(new, schema, name, table.key, key)
    state = "untouched since the backfill"
    if cell is not None:
        state = f"{'tombstone' if cell[3] else 'live'} at {Version(cell[0], parse_lsn(cell[1]), cell[2])}"
    return {f"{target.name} row": row or "none", f"{target.name} cell": state}


def _differences(spec: Spec, table: Table, key: Sequence[str]) -> list[dict[str, Any]]:
    path = spec.work / "differences"
    if not DeltaTable.is_deltatable(str(path)):
        return []
    wanted = dict(zip(table.key, key, strict=True))
    rows = DeltaTable(str(path)).to_pyarrow_table(filters=[("table", "=", table.source)]).to_pylist()
    return [{"run": row["run"], "class": row["class"], "columns": row["columns"]} for row in rows if dict(row["key"]) == wanted]
