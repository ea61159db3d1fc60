"""The gate's call: one row offered to the version gate of one table, as a statement and its parameters.

A row that is not whole is no offer. The gate itself is the store's (`stores.postgres.gate`). Runs in the application.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import sql
from psycopg.types.json import Json, Jsonb

from changeover.errors import StepOrder
from changeover.flags.mirror.change import Change, Row
from changeover.names import qualified
from changeover.position import Version, format_lsn
from changeover.session import Connection, escaped
from changeover.stores.postgres.gate import GatedTable

JSON_TYPES: Mapping[str, type[Json | Jsonb]] = {"json": Json, "jsonb": Jsonb}


@dataclass(frozen=True)
class GateCall:
    """The gate of one table as a statement, composed once per session from the catalogue."""

    table: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[str, ...]
    written: frozenset[str]
    """The columns that an image has: all but those that the store computes."""
    statement: bytes
    """Composed once: so each call costs no more than its values do."""

    @classmethod
    def of(cls, connection: Connection, table: str) -> GateCall:
        """Read the table's columns and the gate's key; raises StepOrder where there is no gate."""
        gated = GatedTable(*qualified(table), (), ())
        columns = connection.execute(COLUMNS, [gated.table.as_string(connection)]).fetchall()
        key = tuple(row[0] for row in connection.execute(KEY, [gated.row_versions.as_string(connection)]))
        if not columns or not key:
            raise StepOrder(f"a mirrored write to {table}", "prepare")
        row = sql.SQL(", ").join(sql.Placeholder() for _ in columns)
        statement = sql.SQL("SELECT {}(%s, %s, %s, %s, ROW({})::{})").format(escaped(gated.function), row, escaped(gated.table))
        written = frozenset(name for name, _, computed in columns if not computed)
        names, types = tuple(row[0] for row in columns), tuple(row[1] for row in columns)
        return cls(table, names, types, key, written, statement.as_bytes(connection))

    def key_of(self, row: Row) -> tuple[Any, ...]:
        """Return a row's key; raises ValueError for a row without it."""
        try:
            return tuple(row[name] for name in self.key)
        except KeyError as error:
            raise ValueError(f"a row mirrored to {self.table} lacks {error}, of its key") from error

    def parameters(self, version: Version, change: Change) -> list[Any]:
        """Return the statement's parameters; raises ValueError for a row that isn't whole: no part of it is offered."""
        needed = frozenset(self.key) if change.deleted else self.written
        missing = needed - change.row.keys()
        unknown = change.row.keys() - set(self.columns)
        if missing or (unknown and not change.deleted):
            raise ValueError(
                f"a row mirrored to {self.table} lacks {sorted(missing)} and has {sorted(unknown)} beside the table's columns"
            )
        image = [
            _value(type_name, change.row[name]) if name in needed else None
            for name, type_name in zip(self.columns, self.types, strict=True)
        ]
        return [version.epoch, format_lsn(version.lsn), version.ordinal, change.deleted, *image]


def _value(type_name: str, value: Any) -> Any:
    wrapper = JSON_TYPES.get(type_name)
    return wrapper(value) if wrapper is not None and value is not None else value


COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attgenerated <> '' FROM pg_attribute
WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""

KEY = """
SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
WHERE i.indrelid = to_regclass(%s) AND i.indisprimary ORDER BY array_position(i.indkey::int2[], a.attnum)
"""
