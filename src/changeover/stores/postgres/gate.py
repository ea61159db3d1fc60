"""The gate of a PostgreSQL store: the version rule in SQL, as separate statements of one READ COMMITTED transaction.

A key's cell is its row in the user's table plus a row in `changeover."versions_<schema>.<table>"`
(key, version, deleted), which exists only for keys that live writes have changed. Each table has
one floor in `changeover.gate`. A change is taken if and only if its version is above the floor and
above the cell's (`applies` in tests/model/gate.py is the same rule in Python). The order of
statements is part of the rule: the shared advisory lock alone, then the row versions, then deletes,
then upserts. In one statement, or under REPEATABLE READ, a row survives its tombstone. That order
stands in `statements`: `batches` and the application's function are composed from it, and the model
checker runs it too. Everything runs where the caller's session runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from changeover.errors import CouldNotFinish, LockNotGranted
from changeover.names import NAME_BYTES, joined
from changeover.position import Version, format_lsn, parse_lsn
from changeover.session import Connection
from changeover.stores.base.interface import EPOCH, LSN, ORDINAL, OWNER, VERSION_COLUMNS
from changeover.stores.base.statements import GATE, Part

FENCED = "CF001"
"""SQLSTATE of a write refused by the store that has lost authority."""

OURS = "changeover.ours"
"""Prefix of the message that begins each transaction of ours on a user's table: by it a stream tells our writes from
others'.
"""

MARK = (
    "SELECT pg_logical_emit_message(true, mark.name, mark.says), set_config(mark.name, mark.says, true)"
    " FROM (VALUES (%s::text, %s::text)) AS mark (name, says)"
)
"""Marks the transaction, before its first write, by `OURS` and by what of ours it is; open to plain roles."""

GATE_TABLE = """
CREATE SCHEMA IF NOT EXISTS changeover;
CREATE TABLE IF NOT EXISTS changeover.gate (
    target text PRIMARY KEY, epoch integer NOT NULL, lsn pg_lsn NOT NULL, ordinal bigint NOT NULL, image_lsn pg_lsn NOT NULL,
    image_epoch integer NOT NULL DEFAULT 0);
"""


GATE_EPOCH = "SELECT set_config('changeover.epoch', epoch::text, true) FROM changeover.gate WHERE target = %s"
"""Lets the epoch of the table's own floor past a refusal, which a handover to the other store has left there."""


NO_VERSION = sql.SQL("0::integer AS {}, '0/0'::pg_lsn AS {}, 0::bigint AS {}, false AS {}").format(
    *map(sql.Identifier, VERSION_COLUMNS)
)
"""The columns of a version as a table that is made from a query gets them."""

PARAMETER = "{}_given"


def version_of(alias: str = "") -> sql.Composed:
    """Return a row's version as a value that compares as the axis does."""
    names = (sql.Identifier(*([alias] if alias else []), name) for name in (EPOCH, LSN, ORDINAL))
    return sql.SQL("({})").format(sql.SQL(", ").join(names))


def ours(kind: str, schema: str, name: str) -> sql.Identifier:
    """Return what stands for one table in our schema."""
    return sql.Identifier("changeover", our_name(kind, schema, name))


def our_name(kind: str, schema: str, name: str) -> str:
    """Return its name there: that of schema and table, where too long cut and told apart by a hash.

    Args:
        kind: What it is, such as `versions`.
        schema: The table's schema.
        name: The table's name.

    Returns:
        The name, of NAME_BYTES bytes at most.
    """
    whole = f"{kind}_{joined(schema, name)}"
    if len(whole.encode()) > NAME_BYTES:
        mark = hashlib.sha256(whole.encode()).hexdigest()[:10]
        begin = whole.encode()[: NAME_BYTES - len(mark) - 1].decode(errors="ignore")  # no half of a character
        whole = f"{begin}_{mark}"
    return whole


@dataclass(frozen=True)
class GatedTable:
    """A table behind the gate, by name, key and columns; composes every statement that touches it."""

    schema: str
    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    loose: tuple[str, ...] = ()
    """Key columns of which equal values may differ as texts (`loose_columns`): a row then stands under its newest notation."""

    owned: bool = False
    """Whether the source key of each live row is kept beside it, in `owners`."""

    @property
    def table(self) -> sql.Identifier:
        """Return the user's table."""
        return sql.Identifier(self.schema, self.name)

    @property
    def row_versions(self) -> sql.Identifier:
        """Return the table of versions and tombstones."""
        return ours("versions", self.schema, self.name)

    @property
    def owners(self) -> sql.Identifier:
        """Return the table of live rows' source keys."""
        return ours("owner", self.schema, self.name)

    @property
    def function(self) -> sql.Identifier:
        """Return the function that offers one row from an application."""
        return ours("gate", self.schema, self.name)

    @property
    def target(self) -> str:
        """Return the name under which the floor is kept."""
        return joined(self.schema, self.name)

    @property
    def lock_key(self) -> sql.Composed:
        """Return the two arguments of the table's advisory lock."""
        return sql.SQL("pg_catalog.hashtext('changeover.gate'), pg_catalog.hashtext({})").format(sql.Literal(self.target))

    def list(self, names: Sequence[str], prefix: str = "") -> sql.Composed:
        """Return the columns as a list, each behind a table alias if given.

        Args:
            names: The columns' names.
            prefix: The alias; empty for none.

        Returns:
            The list, with commas between.
        """
        parts = [sql.Identifier(prefix, name) if prefix else sql.Identifier(name) for name in names]
        return sql.SQL(", ").join(parts)

    def same_key(self, left: str, right: str) -> sql.Composed:
        """Return the condition that two aliases have the same key.

        Args:
            left: One alias.
            right: The other alias.

        Returns:
            The condition.
        """
        return sql.SQL(" AND ").join(
            sql.SQL("{} OPERATOR(pg_catalog.=) {}").format(sql.Identifier(left, name), sql.Identifier(right, name))
            for name in self.key
        )

    # -- the gate's statements; `source` yields the version's columns and the table's own

    def touch(self, source: sql.Composable) -> sql.Composed:
        """Statement 2: the versions that win, recorded; rows locked in key order, so that two batches can't deadlock.

        Args:
            source: The table or query of the changes.

        Returns:
            The statement.
        """
        return sql.SQL(
            "INSERT INTO {row_versions} AS t ({key}, {names}) SELECT {b_key}, {b_names} FROM {source} AS b, changeover.gate AS g"
            " WHERE g.target OPERATOR(pg_catalog.=) {target} AND {b} OPERATOR(pg_catalog.>) (g.epoch, g.lsn, g.ordinal)"
            " ORDER BY {b_key} ON CONFLICT ({key}) DO UPDATE SET {written} WHERE {new} OPERATOR(pg_catalog.>) {t}"
        ).format(
            row_versions=self.row_versions, key=self.list(self.key), b_key=self.list(self.key, "b"), source=source,
            target=sql.Literal(self.target), names=self.list(VERSION_COLUMNS), b_names=self.list(VERSION_COLUMNS, "b"),
            written=_excluded((*VERSION_COLUMNS, *self.loose)), b=version_of("b"), t=version_of("t"), new=version_of("excluded"),
        )  # fmt: skip

    def delete(self, source: sql.Composable) -> sql.Composed:
        """Statement 3: the winners that are deletes.

        Args:
            source: The table or query of the winners.

        Returns:
            The statement.
        """
        return sql.SQL("DELETE FROM {table} AS t USING {source} AS b WHERE b._changeover_deleted AND {same}").format(
            table=self.table, source=source, same=self.same_key("t", "b")
        )

    def upsert(self, source: sql.Composable) -> sql.Composed:
        """Statement 4: the winners that are rows, always by ON CONFLICT.

        A key column stays out of SET unless its notation may differ: it would be locked against
        foreign keys. One that is GENERATED ALWAYS, which is never of such a type, takes no value
        there.

        Args:
            source: The table or query of the winners.

        Returns:
            The statement.
        """
        rest = [name for name in self.columns if name not in self.key or name in self.loose]
        action = sql.SQL("DO UPDATE SET {}").format(_excluded(rest)) if rest else sql.SQL("DO NOTHING")
        return sql.SQL(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {b_columns} FROM {source} AS b"
            " WHERE NOT b._changeover_deleted ORDER BY {b_key} ON CONFLICT ({key}) {action}"
        ).format(
            table=self.table, columns=self.list(self.columns), b_columns=self.list(self.columns, "b"), source=source,
            b_key=self.list(self.key, "b"), key=self.list(self.key), action=action,
        )  # fmt: skip


def _excluded(names: Sequence[str]) -> sql.Composed:
    """Return the assignments by which columns take the values that were offered."""
    return sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in names)


LOOSE = """
SELECT a.attname FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    JOIN pg_type e ON e.oid = CASE WHEN t.typcategory = 'A' THEN t.typelem ELSE t.oid END
    LEFT JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = to_regclass(%s) AND a.attname::text = ANY (%s) AND (NOT coalesce(c.collisdeterministic, true) OR NOT (
    e.typtype = 'e' OR e.oid = ANY (ARRAY['bool', 'int2', 'int4', 'int8', 'oid', 'text', 'varchar', 'name', 'bytea', 'uuid', 'date',
        'time', 'timetz', 'timestamp', 'timestamptz', 'inet', 'cidr', 'macaddr', 'macaddr8', 'bit', 'varbit', 'pg_lsn']::regtype[])
    OR (e.oid IN ('numeric'::regtype, 'bpchar'::regtype) AND a.atttypmod >= 0)))
ORDER BY a.attnum
"""
"""Key columns but for those of types, and under collations, in which equal values are always the same text.

Others are numeric without a scale (1 and 1.0), jsonb, interval, floats (-0), their arrays, and texts whose collation is not
deterministic. timetz is not one: its zone counts, too. A type that is not named is taken for loose.
"""


def loose_columns(connection: Connection, schema: str, name: str, key: Sequence[str]) -> tuple[str, ...]:
    """Return the key columns of which equal values may differ as texts; the server is asked, whose equality the gate goes by."""
    rows = connection.execute(LOOSE, [sql.Identifier(schema, name).as_string(connection), list(key)]).fetchall()
    return tuple(row[0] for row in rows)


def install(connection: Connection, table: GatedTable, image: Version) -> None:
    """Create the floor, the table of row versions and the application's gate function; idempotent, the floor is never lowered.

    Args:
        connection: A session with the store.
        table: The gated table.
        image: v0, at which a new floor begins.
    """
    with connection.transaction():
        # two sessions that replace one function at a time would make one of them fail: replay and a fence do meet here
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('changeover.install'), 0)")
        connection.execute(GATE_TABLE)
        connection.execute(
            "INSERT INTO changeover.gate VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (target) DO NOTHING",
            [table.target, image.epoch, format_lsn(image.lsn), image.ordinal, format_lsn(image.lsn), image.epoch],
        )
        present = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [table.row_versions.as_string(connection)]).fetchone()
        if present is None or not present[0]:
            connection.execute(
                sql.SQL("CREATE TABLE {row_versions} AS SELECT {key}, {version} FROM {table} WITH NO DATA").format(
                    row_versions=table.row_versions, key=table.list(table.key), version=NO_VERSION, table=table.table
                )
            )
            connection.execute(sql.SQL("ALTER TABLE {} ADD PRIMARY KEY ({})").format(table.row_versions, table.list(table.key)))
        if table.owned and not has_owners(connection, table):
            connection.execute(
                sql.SQL("CREATE TABLE {owners} AS SELECT {key}, ''::text AS {owner} FROM {table} WITH NO DATA").format(
                    owners=table.owners, key=table.list(table.key), owner=sql.Identifier(OWNER), table=table.table
                )
            )
            connection.execute(sql.SQL("ALTER TABLE {} ADD PRIMARY KEY ({})").format(table.owners, table.list(table.key)))
        connection.execute(_function(table))


def has_owners(connection: Connection, table: GatedTable) -> bool:
    """Return whether source keys are kept beside a table."""
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [table.owners.as_string(connection)]).fetchone()
    return bool(row and row[0])


def installed(connection: Connection, table: GatedTable) -> bool:
    """Return whether a table has a gate.

    Args:
        connection: A session with the store.
        table: The gated table.

    Returns:
        Whether it has.
    """
    if connection.execute("SELECT FROM pg_class WHERE oid = to_regclass('changeover.gate')").fetchone() is None:
        return False
    return connection.execute("SELECT FROM changeover.gate WHERE target = %s", [table.target]).fetchone() is not None


def install_gate(connection: Connection, schema: str, name: str, key: Sequence[str], image: Version) -> None:
    """Install the gate on an existing table, whose columns are read from the catalogue.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        key: The columns of its key.
        image: The version that backfill images bear.
    """
    install(connection, gated(connection, schema, name, key), image)


def gated(connection: Connection, schema: str, name: str, key: Sequence[str]) -> GatedTable:
    """Return a table with its columns in the catalogue's order."""
    rows = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped"
        " AND attgenerated = '' ORDER BY attnum",
        [sql.Identifier(schema, name).as_string(connection)],
    ).fetchall()
    return GatedTable(schema, name, tuple(key), tuple(row[0] for row in rows), loose_columns(connection, schema, name, key))


def body_of(code: sql.Composed) -> sql.Literal:
    """Return a function's body as a literal: whatever stands between dollars may stand in a name."""
    return sql.Literal(code.as_string(None))


def _function(table: GatedTable) -> sql.Composed:
    """The gate for one row in one round trip: the same statements, each with a snapshot of its own (VOLATILE).

    Its variables bear the reserved prefix as well: PL/pgSQL would take a column of the user's for one of the same name. It has
    no search_path of its own, which triggers and policies of the application's would meet: every name says its schema,
    operators too.
    """
    given = sql.SQL(", ").join(
        sql.SQL("{} AS {}").format(sql.Identifier(PARAMETER.format(name)), sql.Identifier(name)) for name in VERSION_COLUMNS
    )
    one = sql.SQL("(SELECT {}, (_changeover_image).*)").format(given)
    # whose source key a mirrored row has is not told: until its event comes it is nobody's
    nobody = sql.SQL("DELETE FROM {} AS t USING (SELECT (_changeover_image).*) AS b WHERE {};").format(
        table.owners, table.same_key("t", "b")
    )
    parts = {
        Part.LOCK_SHARED: sql.SQL("PERFORM pg_catalog.pg_advisory_xact_lock_shared({});").format(table.lock_key),
        Part.TOUCH: sql.SQL(
            "{}; GET DIAGNOSTICS _changeover_won = ROW_COUNT;"
            " IF _changeover_won OPERATOR(pg_catalog.=) 0 THEN RETURN false; END IF; {}"
        ).format(table.touch(one), nobody if table.owned else sql.SQL("")),
        Part.DELETE: sql.SQL("IF _changeover_deleted_given THEN {}; END IF;").format(table.delete(one)),
        Part.UPSERT: sql.SQL("IF NOT _changeover_deleted_given THEN {}; END IF;").format(table.upsert(one)),
    }
    body = sql.SQL(
        """
        DECLARE _changeover_won bigint;
        BEGIN
            IF pg_catalog.current_setting('transaction_isolation') OPERATOR(pg_catalog.<>) 'read committed' THEN
                RAISE EXCEPTION 'the gate needs READ COMMITTED: under % a row survives its tombstone',
                    pg_catalog.current_setting('transaction_isolation');
            END IF;
            PERFORM pg_catalog.pg_logical_emit_message(true, {ours}, 'mirror');
            PERFORM pg_catalog.set_config({ours}, 'mirror', true);
            PERFORM pg_catalog.set_config('changeover.epoch', _changeover_epoch_given::pg_catalog.text, true);
            {gate}
            RETURN true;
        END
        """
    ).format(ours=sql.Literal(OURS), gate=sql.SQL(" ").join(parts[part] for (part,) in GATE))
    return sql.SQL(
        "CREATE OR REPLACE FUNCTION {function}(_changeover_epoch_given integer, _changeover_lsn_given pg_lsn,"
        " _changeover_ordinal_given bigint, _changeover_deleted_given boolean, _changeover_image {table})"
        " RETURNS boolean LANGUAGE plpgsql VOLATILE AS {body}"
    ).format(function=table.function, table=table.table, body=body_of(body))


def barrier(connection: Connection, table: GatedTable, server: str, tries: int = 60) -> int:
    """Wait until every gated statement that began before has ended; it removes no row (driver).

    It never queues long before writers.

    Args:
        connection: A session with the store.
        table: The gated table.
        server: The server's name, for the error.
        tries: How often the lock is asked for.

    Returns:
        0, the number of rows removed.

    Raises:
        LockNotGranted: A gated statement stays open.
    """
    for _ in range(tries):
        try:
            with connection.transaction():
                connection.execute("SET LOCAL lock_timeout = '500ms'")
                connection.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(table.lock_key))
            return 0
        except psycopg.errors.LockNotAvailable:
            continue
    raise LockNotGranted(server, f"barrier of {table.target}", "gated writes that do not end")


def begin_anew(connection: Connection, table: GatedTable, image: Version, server: str, tries: int = 60) -> None:
    """Empty a table and its row versions, and put the floor to a later epoch's v0, in one transaction behind the table's lock.

    From its commit on whatever an earlier epoch offers is below the floor. Asked for briefly and again, so that readers and
    writers never queue long. A foreign key that points at the table, or a missing right, is an error, and nothing is changed.
    """
    for _ in range(tries):
        try:
            with connection.transaction():
                connection.execute("SET LOCAL lock_timeout = '500ms'")
                connection.execute("SELECT set_config('changeover.epoch', %s, true)", [str(image.epoch)])  # past a refusal
                connection.execute(sql.SQL("SELECT pg_advisory_xact_lock({})").format(table.lock_key))
                emptied = [table.table, table.row_versions, *([table.owners] if table.owned else [])]
                connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(", ").join(emptied)))
                _put_floor(connection, table, image)
            return
        except psycopg.errors.LockNotAvailable:
            continue
    raise LockNotGranted(server, f"lock to empty {table.target}", "reads or gated writes that do not end")


def _put_floor(connection: Connection, table: GatedTable, image: Version) -> None:
    raised = connection.execute(
        "UPDATE changeover.gate SET (epoch, lsn, ordinal, image_epoch, image_lsn)"
        " = (%(e)s, %(l)s::pg_lsn, %(o)s, %(e)s, %(l)s::pg_lsn)"
        " WHERE target = %(t)s AND (epoch, lsn, ordinal) < (%(e)s, %(l)s::pg_lsn, %(o)s)",
        {"e": image.epoch, "l": format_lsn(image.lsn), "o": image.ordinal, "t": table.target},
    ).rowcount
    if not raised:
        raise CouldNotFinish(f"the floor of {table.target} is above {image}: an epoch begins above all that ever were")


def sweep(connection: Connection, table: GatedTable) -> int:
    """Remove rows whose key has a tombstone: the ghosts that the write skew of loader and writer can leave.

    Args:
        connection: A session with the store.
        table: The gated table.

    Returns:
        How many rows were removed.
    """
    with connection.transaction():
        connection.execute(MARK, [OURS, "sweep"])
        connection.execute(GATE_EPOCH, [table.target])
        return connection.execute(
            sql.SQL(
                "DELETE FROM {table} AS t USING ("
                "SELECT {key} FROM {row_versions} WHERE _changeover_deleted ORDER BY {key} FOR UPDATE)"
                " AS b WHERE {same}"
            ).format(table=table.table, key=table.list(table.key), row_versions=table.row_versions, same=table.same_key("t", "b"))
        ).rowcount


def raise_floor(connection: Connection, table: GatedTable, floor: Version) -> Version:
    """Raise the floor and commit; it is never lowered.

    Args:
        connection: A session with the store.
        table: The gated table.
        floor: The floor that is wanted.

    Returns:
        The floor that stands then.

    Raises:
        CouldNotFinish: The table has no gate.
    """
    row = connection.execute(
        "UPDATE changeover.gate SET (epoch, lsn, ordinal) = (SELECT g.epoch, g.lsn, g.ordinal FROM (VALUES (epoch, lsn, ordinal),"
        " (%(e)s, %(l)s::pg_lsn, %(o)s::bigint)) AS g (epoch, lsn, ordinal) ORDER BY g DESC LIMIT 1)"
        " WHERE target = %(t)s RETURNING epoch, lsn::text, ordinal",
        {"e": floor.epoch, "l": format_lsn(floor.lsn), "o": floor.ordinal, "t": table.target},
    ).fetchone()
    if row is None:
        raise CouldNotFinish(f"{table.target} has no gate: run prepare")
    return Version(row[0], parse_lsn(row[1]), row[2])


def remove(connection: Connection, schema: str, name: str) -> list[str]:
    """Remove function, row versions and floor of one table; the floors' table goes with the last one.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        What was removed, each as a phrase.
    """
    if connection.execute("SELECT FROM pg_class WHERE oid = to_regclass('changeover.gate')").fetchone() is None:
        return []
    table = GatedTable(schema, name, (), ())
    with connection.transaction():
        present = connection.execute("DELETE FROM changeover.gate WHERE target = %s", [table.target]).rowcount
        if present:
            connection.execute(
                sql.SQL("DROP FUNCTION IF EXISTS {}(integer, pg_lsn, bigint, boolean, {})").format(table.function, table.table)
            )
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}, {}").format(table.row_versions, table.owners))
            connection.execute(sql.SQL("DROP FUNCTION IF EXISTS {}()").format(ours("floor", schema, name)))
        left = connection.execute("SELECT FROM changeover.gate LIMIT 1").fetchone()
        if left is None:
            connection.execute("DROP TABLE changeover.gate")
    return [f"gate of {table.target}"] if present else []
