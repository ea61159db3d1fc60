"""Reading a PostgreSQL table with Spark: in key ranges, all of them in one exported snapshot.

Spark's JDBC reader opens one session per range; each imports the snapshot, proves in band that it sees what the exporter saw,
and takes ACCESS SHARE, before its query runs. Columns arrive in the types of `pgtypes`. The frame's partition i is range i.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psycopg import sql

from changeover.names import RESERVED, nth
from changeover.session import Connection
from changeover.spark import jdbc
from changeover.stores.base.pgtypes import ARRAY, JSON, NATIVE, NESTED, TEXT, Column, decode, form_of
from changeover.stores.base.pgtypes import moved as as_moved
from changeover.tenants import Tenants

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

FETCH_SIZE = 10_000
"""Rows a round trip: without it the driver reads a whole range into memory."""

KEYS_AT_ONCE = 1_000
"""Keys that one query names: the planner's work grows faster than their number."""

OWN_TEXT = ("inet[", "character[", "character(")
"""Arrays whose elements a cast to text would change; their JSON has the output function's text, in quotes."""

KeyRange = tuple[tuple[str, ...] | None, tuple[str, ...] | None]
"""lower <= key < upper, in PostgreSQL's text form; None is infinite."""

EVERYTHING: tuple[KeyRange, ...] = ((None, None),)


@dataclass(frozen=True)
class ExportedSnapshot:
    """An exported snapshot that sessions can import, and what it sees, as `pg_current_snapshot()` prints it."""

    name: str
    visible: str


Taken = Callable[[], tuple[Connection, ExportedSnapshot]]
"""Takes a snapshot of a store: the session that holds it, and its name for others to import."""


@dataclass(frozen=True)
class ReadTable:
    """A table to read: its columns with their types, and the key with the types that ranges are compared in."""

    schema: str
    name: str
    columns: tuple[Column, ...]
    key: tuple[Column, ...]
    partitioned: bool = False
    """Whether the rows are those of its partitions; any other table is read without what inherits from it."""
    only: tuple[str, Tenants] | None = None
    """Whose rows alone are read, by the column that holds the tenant; None is all rows."""

    @property
    def rows(self) -> sql.Composed:
        """Return the table as a query names it."""
        return sql.SQL("{}{}").format(sql.SQL("" if self.partitioned else "ONLY "), sql.Identifier(self.schema, self.name))

    @property
    def condition(self) -> sql.Composable:
        """Return which of them are read, by the tenant's text as the refusal goes by it."""
        if self.only is None:
            return sql.SQL("true")
        column, tenants = self.only
        holds = sql.SQL("<>) ALL" if tenants.others else "=) ANY")
        form = sql.SQL("{}::pg_catalog.text OPERATOR(pg_catalog.{} ({}::pg_catalog.text[])")
        return form.format(sql.Identifier(column), holds, sql.Literal(sorted(tenants.names)))


@dataclass(frozen=True)
class Reading:
    """How a table of PostgreSQL is read: where, and in which snapshot."""

    dsn: str
    application: str
    table: ReadTable
    snapshot: ExportedSnapshot


def read_table(
    spark: SparkSession,
    dsn: str,
    application: str,
    table: ReadTable,
    ranges: Sequence[KeyRange],
    snapshot: ExportedSnapshot,
    keys: Sequence[tuple[str, ...]] | None = None,
    moved: Collection[str] = (),
) -> DataFrame:
    """Return the table's rows as of the snapshot, one partition a range, decoded.

    Args:
        spark: The Spark session.
        dsn: The store's DSN.
        application: The application's name of the tasks' sessions.
        table: The table, with the columns to read and its key.
        ranges: The key ranges.
        snapshot: The exported snapshot that each task imports.
        keys: Keys in PostgreSQL's text form: then the rows of those alone, some keys a partition.
        moved: Columns that are read as text.

    Returns:
        A lazy frame, read in tasks, on each action.
    """
    columns = [_form(c, TEXT if c.name in moved else form_of(c.type)) for c in table.columns]
    conditions = [_predicate(table.key, bounds) for bounds in ranges] if keys is None else _some_of(table.key, keys)
    frame = _read(spark, dsn, application, table, columns, conditions, snapshot)
    return frame.select(
        *(
            (as_moved(value, c.type) if c.name in moved else decode(value, c.type, native=True)).alias(c.name)
            for number, c in enumerate(table.columns)
            for value in (frame[nth(number)],)
        )
    )


def read_texts(
    spark: SparkSession, dsn: str, application: str, table: ReadTable, keys: Sequence[tuple[str, ...]], snapshot: ExportedSnapshot
) -> DataFrame:  # fmt: skip
    """Return the rows of some keys in the texts in which the change stream has them.

    Args:
        spark: The Spark session.
        dsn: The store's DSN.
        application: The application's name of the tasks' sessions.
        table: The table, with the columns to read and its key.
        keys: Keys in PostgreSQL's text form.
        snapshot: The exported snapshot that each task imports.

    Returns:
        A lazy frame, read in tasks, some keys a partition: the key, then the columns, by their
        numbers.
    """
    columns = [_streamed(column) for column in (*table.key, *table.columns)]
    frame = _read(spark, dsn, application, table, columns, _some_of(table.key, keys), snapshot)
    return frame.select(*map(nth, range(len(columns))))


def _read(
    spark: SparkSession, dsn: str, application: str, table: ReadTable, columns: Sequence[sql.Composable],
    conditions: Sequence[sql.Composable], snapshot: ExportedSnapshot,
) -> DataFrame:  # fmt: skip
    """Read expressions by their places, one partition a condition."""
    options = {
        **jdbc.options(dsn, application),
        "fetchsize": str(FETCH_SIZE),
        # the server's comparison is not Spark's (collations, the pad of char(n)), and the change stream meets Spark's alone
        "pushDownPredicate": "false",
        "sessionInitStatement": _session_start(table, snapshot).as_string(None),
    }
    url = options.pop("url")
    inner = _subquery(table, columns).as_string(None)
    return spark.read.jdbc(url, inner, predicates=[condition.as_string(None) for condition in conditions], properties=options)


def _raw(number: int) -> str:
    """Return the name of a column of the raw key."""
    return f"{RESERVED}key{number}"


def _subquery(table: ReadTable, columns: Sequence[sql.Composable]) -> sql.Composed:
    """The expressions, and the raw key beside them for the conditions (Spark prunes what it does not use)."""
    named = [(form, nth(number)) for number, form in enumerate(columns)]
    named += [(sql.Identifier(column.name), _raw(number)) for number, column in enumerate(table.key)]
    parts = [sql.SQL("{} AS {}").format(form, sql.Identifier(name)) for form, name in named]
    listed = sql.SQL(", ").join(parts)
    return sql.SQL("(SELECT {} FROM {} WHERE {}) AS changeover_read").format(listed, table.rows, table.condition)


def _streamed(column: Column) -> sql.Composable:
    """The text in which the change stream has a value: the type's output function's, an array as JSON of such texts.

    By jsonb, which writes an array as the stream's decoder does, with a space behind each comma: keys meet by their texts.
    """
    if column.type.endswith("[]"):
        form = "CASE WHEN array_lower({0}, 1) <> 1 THEN '[[' || {0}::text ELSE to_jsonb({0}::text[])::text END"
        return sql.SQL(form).format(sql.Identifier(column.name))
    return sql.SQL("CASE WHEN {0} IS NOT NULL THEN format('%s', {0}) END").format(sql.Identifier(column.name))


def _form(column: Column, form: str) -> sql.Composable:
    forms = {
        NATIVE: sql.SQL("{0}"),
        # format() asks the type's output function, as the change stream does; a cast may say more (inet) or less
        TEXT: sql.SQL("CASE WHEN {0} IS NOT NULL THEN format('%s', {0}) END" if column.type == "inet" else "{0}::text"),
        # other bounds than 1 have no place in a target: marked like a nested array, which decode refuses
        JSON: sql.SQL("CASE WHEN array_lower({0}, 1) <> 1 THEN '[[' || {0}::text ELSE array_to_json({0}{1})::text END"),
        # what an array column of Spark can't hold fails in the server, whose message then carries ours
        ARRAY: sql.SQL("CASE WHEN array_lower({0}, 1) <> 1 OR array_ndims({0}) > 1 THEN ({2} || {0}::text)::{3} ELSE {0} END"),
    }
    texts = sql.SQL("" if column.type.startswith(OWN_TEXT) else "::text[]")
    refused = sql.Literal(f"[NOT_CARRIED] {column.type}: {NESTED}: ")
    return forms[form].format(sql.Identifier(column.name), texts, refused, sql.SQL(column.type))


def _predicate(key: Sequence[Column], bounds: KeyRange) -> sql.Composable:
    """The condition of a range on the raw key; the database compares, under the key's own collation."""
    columns = sql.SQL(", ").join(sql.Identifier(_raw(number)) for number in range(len(key)))
    sides = [
        sql.SQL("({}) {} ({})").format(
            columns,
            sql.SQL(operator),
            sql.SQL(", ").join(
                sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(column.type)) for value, column in zip(bound, key, strict=True)
            ),
        )
        for operator, bound in ((">=", bounds[0]), ("<", bounds[1]))
        if bound is not None
    ]
    return sql.SQL(" AND ").join(sides) if sides else sql.SQL("true")


def some_rows(
    session: Connection, table: ReadTable, bounds: KeyRange, limit: int, *, middle: bool = False
) -> list[tuple[str, ...]]:  # fmt: skip
    """Return the first keys of a range, or those from its middle on (driver).

    Args:
        session: The session, whose own snapshot counts.
        table: The table, with the columns to read and its key.
        bounds: The range.
        limit: How many keys at most.
        middle: Whether to begin in the middle of the range.

    Returns:
        Keys, as texts.
    """
    rows = _subquery(table, [])
    keys = [sql.Identifier(_raw(number)) for number in range(len(table.key))]
    # a text has another name than its key, by which the rows would be ordered else
    named = [sql.SQL("{}::text AS {}").format(key, sql.Identifier(f"{_raw(n)}_text")) for n, key in enumerate(keys)]
    texts, order = (sql.SQL(", ").join(parts) for parts in (named, keys))
    inside = _predicate(table.key, bounds)
    skip = sql.SQL("(SELECT count(*) / 2 FROM {} WHERE {})").format(rows, inside) if middle else sql.SQL("0")
    result = session.execute(
        sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY {} LIMIT {} OFFSET {}").format(
            texts, rows, inside, order, sql.Literal(limit), skip
        )
    )
    return [tuple(row) for row in result.fetchall()]


def _some_of(key: Sequence[Column], values: Sequence[tuple[str, ...]]) -> list[sql.Composable]:
    """The conditions that together hold for some keys, each for as many as one query names."""
    columns = sql.SQL(", ").join(sql.Identifier(_raw(number)) for number in range(len(key)))
    rows = [
        sql.SQL("({})").format(sql.SQL(", ").join(_given(value, column.type) for value, column in zip(row, key, strict=True)))
        for row in values
    ]
    parts = [rows[start : start + KEYS_AT_ONCE] for start in range(0, len(rows), KEYS_AT_ONCE)]
    return [sql.SQL("({}) IN ({})").format(columns, sql.SQL(", ").join(part)) for part in parts] or [sql.SQL("false")]


def _given(value: str, type_name: str) -> sql.Composed:
    """A key's value from the text in which the change stream has it, in which an array is JSON."""
    form = "ARRAY(SELECT jsonb_array_elements_text({}::jsonb))::{}" if type_name.endswith("[]") else "{}::{}"
    return sql.SQL(form).format(sql.Literal(value), sql.SQL(type_name))


def _session_start(table: ReadTable, snapshot: ExportedSnapshot) -> sql.Composed:
    """Import the snapshot, prove it in band, and hold the table's file in place until the range is read."""
    begun = sql.SQL(
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET TRANSACTION SNAPSHOT {name};"
        " LOCK TABLE {table} IN ACCESS SHARE MODE;"
        " DO $check$ BEGIN IF pg_current_snapshot()::text <> {visible} THEN"
        " RAISE EXCEPTION 'changeover: the session sees % and not the exported snapshot', pg_current_snapshot();"
        " END IF; END $check$"
    )
    return jdbc.start(begun.format(name=sql.Literal(snapshot.name), visible=sql.Literal(snapshot.visible), table=table.rows))
