"""What a unit wrote: the transaction's own counts against what the application told of it, and its position.

The server counts each row that a transaction inserts, updates or deletes, by triggers and foreign keys' actions too. Its counts
include those of earlier transactions of the session that are not sent yet, so they are read at the unit's begin and at its end. A
unit that told fewer rows than it changed is refused before its COMMIT. A savepoint that was rolled back leaves its rows in the
counts, and an aborted transaction number behind: there nobody can tell, and the unit passes. Runs in the application.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from ldclient.migrations.types import Origin
from psycopg import sql

from changeover.errors import ChangesUntold, Refused
from changeover.flags.mirror.change import Change, Cursor, MirroredTable
from changeover.jobs.source.triggerlog import Log
from changeover.names import qualified
from changeover.position import ZERO_LSN, parse_lsn
from changeover.session import one_row
from changeover.tenants import as_text

POSITION = (
    "pg_catalog.pg_current_wal_insert_lsn()::text, CASE WHEN pg_catalog.current_setting('synchronous_commit')"
    " OPERATOR(pg_catalog.=) 'off' THEN pg_catalog.set_config('synchronous_commit', 'on', true) END"
)
"""The write's position; where a crash could take it back (`synchronous_commit = off`) this COMMIT is made durable."""

EXACT_FLOATS = "pg_catalog.set_config('extra_float_digits', '1', true)"
"""In a session of the application's own: with fewer digits the floats of a returned row would not be the store's."""

TABLES = "{tables}"

COUNTS = """ARRAY(SELECT ARRAY[named.place, part.relation::pg_catalog.int8,
    pg_catalog.pg_stat_get_xact_tuples_inserted(part.relation)
    OPERATOR(pg_catalog.+) pg_catalog.pg_stat_get_xact_tuples_updated(part.relation)
    OPERATOR(pg_catalog.+) pg_catalog.pg_stat_get_xact_tuples_deleted(part.relation)]
FROM pg_catalog.unnest({tables}::pg_catalog.text[]) WITH ORDINALITY AS named (name, place),
    LATERAL (SELECT pg_catalog.to_regclass(named.name)::pg_catalog.oid
        UNION SELECT relid::pg_catalog.oid FROM pg_catalog.pg_partition_tree(pg_catalog.to_regclass(named.name))) AS part (relation)
WHERE part.relation IS NOT NULL)"""
"""Of each table and each of its partitions: the table's place, the server's number, and how many rows were changed."""

KEYS = """
SELECT ARRAY(SELECT a.attname::pg_catalog.text FROM pg_catalog.pg_index AS i JOIN pg_catalog.pg_attribute AS a
    ON a.attrelid OPERATOR(pg_catalog.=) i.indrelid AND a.attnum OPERATOR(pg_catalog.=) ANY (i.indkey)
    WHERE i.indrelid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(named.name) AND i.indisprimary ORDER BY a.attnum)
FROM pg_catalog.unnest({tables}::pg_catalog.text[]) WITH ORDINALITY AS named (name, place) ORDER BY place
"""
"""The primary key of each table, by which its rows are shared out to workers."""

ROLLED_BACK = """
WITH seen AS (SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text::pg_catalog.int8 AS own,
    pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8 AS next)
SELECT next OPERATOR(pg_catalog.-) own OPERATOR(pg_catalog.>) %(most)s OR EXISTS (
    SELECT FROM pg_catalog.generate_series(own OPERATOR(pg_catalog.+) 1, next OPERATOR(pg_catalog.-) 1) AS number
    WHERE pg_catalog.pg_xact_status(number::pg_catalog.text::pg_catalog.xid8) OPERATOR(pg_catalog.=) 'aborted') FROM seen
"""
"""Whether a savepoint that wrote may have been rolled back: it had a number after ours, which is aborted. It may be another's."""

MOST_NUMBERS = 10_000
"""How many numbers are looked at: a transaction that is open for longer is not judged."""


@dataclass(frozen=True)
class Told:
    """A change as the mirror gets it: of which table, by its place among the mirrored ones."""

    place: int
    change: Change


@dataclass(frozen=True)
class Written:
    """What a unit wrote, by what it is shared out to workers, and its position as an LSN."""

    told: list[Told]
    share: str
    lsn: int


class StoreTables:
    """The mirrored tables of one store in one process."""

    def __init__(self, origin: Origin, tables: Sequence[MirroredTable]) -> None:
        self.origin = origin
        self.tables = tables
        names = sql.Literal([sql.Identifier(*qualified(table.name(origin))).as_string(None) for table in tables]).as_string(None)
        # composed once, and without parameters: a session prepares them, and they cost the caller little
        counts = COUNTS.replace(TABLES, names)
        self._begin, self.end = f"SELECT {EXACT_FLOATS}, {counts}".encode(), f"SELECT {POSITION}, {counts}".encode()
        self._primary = KEYS.replace(TABLES, names).encode()
        self._places = {name: place for place, table in enumerate(tables) for name in (table.old, table.new)}
        self._keys: list[list[str]] | None = None

    def begin(self, cursor: Cursor) -> Counts:
        """Read the counts at the begin of a unit, and see to it that floats are returned with all digits.

        Args:
            cursor: The unit's cursor, in its transaction.

        Returns:
            The counts, to be compared at the unit's end.
        """
        with _plain(cursor) as plain:
            if self._keys is None:
                self._keys = [row[0] for row in plain.execute(self._primary)]
            _, counts = one_row(plain.execute(self._begin))
        return Counts(self, {relation: changed for _, relation, changed in counts})

    def place_of(self, change: Change, relations: dict[int, int]) -> int:
        """Return which table a change is of.

        Args:
            change: The change.
            relations: The places of tables and their partitions, by the server's number.

        Returns:
            The table's place among the mirrored ones.

        Raises:
            TypeError: It can't be told, or the table is not mirrored.
        """
        if change.table:
            if (place := self._places.get(change.table)) is None:
                raise TypeError(f"mirror() was told a row of {change.table}, which is not mirrored")
            return place
        if change.relation:
            if (place := relations.get(change.relation)) is None:
                raise TypeError("mirror() was told a row of a table that is not mirrored; of a view: returned(cursor, table=...)")
            return place
        if len(self.tables) > 1:
            raise TypeError("mirror() was told a row without its table, and several are mirrored: say Change(..., table=...)")
        return 0

    def share(self, told: Told) -> str:
        """Return by what a unit is given to a worker: the table and the key of its first row.

        Args:
            told: The unit's first row.

        Returns:
            A text that is the same for the same key.
        """
        key = self._keys[told.place] if self._keys else []
        return repr([told.place, *(told.change.row.get(name) for name in key)])


@dataclass(frozen=True)
class Counts:
    """The counts at the begin of a unit, by the server's number of each table and partition."""

    store: StoreTables
    before: dict[int, int]

    def end(self, cursor: Cursor, changes: Sequence[Change], log: Log | None, tenant: str | None) -> Written:
        """Return what the unit wrote, with its position.

        Args:
            cursor: The unit's cursor, in its transaction.
            changes: What the unit told.
            log: The trigger log that captures the write; None where the server's log does.
            tenant: The unit's tenant; None where all rows move at once.

        Returns:
            The changes, each with its table, and the position.

        Raises:
            ChangesUntold: The transaction changed more rows of a table than were told.
            Refused: A row is of another tenant.
            TypeError: It can't be told of which table a row is, or it has no tenant.
        """
        with _plain(cursor) as plain:
            lsn, _, counts = one_row(plain.execute(self.store.end))
            places = {relation: place - 1 for place, relation, _ in counts}
            told = [Told(self.store.place_of(change, places), change) for change in changes]
            changed: Counter[int] = Counter()
            for place, relation, count in counts:
                changed[place - 1] += count - self.before.get(relation, 0)
            self._require_told(plain, changed, Counter(one.place for one in told))
            if tenant is not None:
                self._require_tenant(told, tenant)
            return Written(told, self.store.share(told[0]) if told else "", _ticked(plain, lsn, log))

    def _require_told(self, plain: psycopg.Cursor[Any], changed: Counter[int], told: Counter[int]) -> None:
        untold = [place for place in sorted(changed) if changed[place] > told[place]]
        if not untold or one_row(plain.execute(ROLLED_BACK, {"most": MOST_NUMBERS}))[0]:
            return
        (place, *_) = untold
        raise ChangesUntold(self.store.tables[place].name(self.store.origin), changed[place], told[place])

    def _require_tenant(self, told: Sequence[Told], tenant: str) -> None:
        """Refuse rows of another tenant than the unit's, before they are committed; the message has no value of a row."""
        for one in told:
            column = self.store.tables[one.place].tenant(self.store.origin)
            if column is None or column not in one.change.row:
                raise TypeError(f"a mirrored row is without {column}, its tenant: return whole rows by RETURNING *")
            if as_text(one.change.row[column]) != tenant:
                raise Refused(
                    f"a write returned a row whose {column} is not the tenant that it was called for, and was rolled back: write"
                    " the rows of each tenant by a call of their own, a key change from one to another as a delete and an insert"
                )


def _ticked(plain: psycopg.Cursor[Any], lsn: str, log: Log | None) -> int:
    """Return a position as the stream counts it: the log's own, or that of a trigger log's newest tick.

    Above that tick the write's own event comes to stand. Without a tick, as after `abort`, it is below everything.
    """
    if log is None:
        return parse_lsn(lsn)
    (newest,) = one_row(plain.execute("SELECT pg_catalog.to_regclass(%s)", [log.ticks.as_string(plain)]))
    if newest is not None:
        (newest,) = one_row(plain.execute(sql.SQL('SELECT pg_catalog.max("end")::text FROM {}').format(log.ticks)))
    return parse_lsn(newest) if newest is not None else ZERO_LSN


def _plain(cursor: Cursor) -> psycopg.Cursor[Any]:
    return cursor.connection.cursor(row_factory=psycopg.rows.tuple_row)
