"""Mutants of the stress: one rule of the gated table taken away, in the product's own SQL, in what a trial runs.

`RELIABLE` are those that go wrong within a few trials whatever the machine does, so the suite runs them. `RARE` need a race
that only many trials meet: the long form runs them too, and each was seen within 80 trials, which are 15,000 gated writes. What
can't show here, because nothing of it is on this table (capture, Delta, authority, fencing), is the model's. A trial makes the
gate anew, the application's function with it, so a change reaches both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from changeover.jobs.apply import floors
from changeover.position import Version, format_lsn
from changeover.session import Connection
from changeover.stores.base import statements
from changeover.stores.base.interface import VERSION_COLUMNS, Counts
from changeover.stores.base.statements import BARRIER, CLOSE, COLLECT, GATE, LOAD, Part
from changeover.stores.postgres import batches, garbage, gate
from changeover.stores.postgres import store as postgres
from changeover.stores.postgres import truncate as truncating
from changeover.stores.postgres.batches import BATCH, OF_CHANGES, OF_IMAGES
from changeover.stores.postgres.gate import GatedTable, version_of
from tests.stress.field import TOUCHED

Cursor = psycopg.Cursor[Any]
NOTHING = sql.SQL("DELETE FROM changeover.gate WHERE false")
"""A statement that does nothing, in a function as elsewhere."""


class Mutant(NamedTuple):
    """What takes the place of what (an attribute of a module or class, or an entry of a dict), and SQL before and after."""

    changes: tuple[tuple[Any, Any, Any], ...] = ()
    before: str = ""
    after: str = ""


# -- the gate


def _touch(text: str) -> Callable[[GatedTable, sql.Composable], sql.Composed]:
    """Return a gate's second statement that is written otherwise."""

    def touch(table: GatedTable, source: sql.Composable) -> sql.Composed:
        return sql.SQL(
            "INSERT INTO {row_versions} AS t ({key}, {names})" f" SELECT {{b_key}}, {{b_names}} FROM {{source}} AS b, {text}"
        ).format(
            row_versions=table.row_versions, key=table.list(table.key), b_key=table.list(table.key, "b"), source=source,
            target=sql.Literal(table.target), lock=table.lock_key, names=table.list(VERSION_COLUMNS),
            b_names=table.list(VERSION_COLUMNS, "b"), new_names=table.list(VERSION_COLUMNS, "excluded"),
            b=version_of("b"), t=version_of("t"), new=version_of("excluded"),
        )  # fmt: skip

    return touch


KEPT = " ORDER BY {b_key} ON CONFLICT ({key}) DO UPDATE SET ({names}) = ROW({new_names})"
NEWER = " WHERE {new} > {t}"
HERE = "changeover.gate AS g WHERE g.target = {target}"
ABOVE = " AND {b} > (g.epoch, g.lsn, g.ordinal)"
LOCKED = "pg_advisory_xact_lock_shared({lock}) AS l, "

product_touch, product_delete, product_upsert = GatedTable.touch, GatedTable.delete, GatedTable.upsert


def _all_at_once(table: GatedTable, source: sql.Composable) -> sql.Composed:
    """The gate as one statement: all parts see the snapshot of the first."""
    winners = sql.SQL("(SELECT b.* FROM {source} AS b JOIN won ON {same})").format(source=source, same=table.same_key("b", "won"))
    return sql.SQL("WITH won AS ({touch} RETURNING {t_key}), gone AS ({delete}) {upsert}").format(
        touch=product_touch(table, source), t_key=table.list(table.key, "t"),
        delete=product_delete(table, winners), upsert=product_upsert(table, winners),
    )  # fmt: skip


def _nothing(table: GatedTable, source: sql.Composable) -> sql.Composable:
    return NOTHING


def _batch_at_once(cursor: Cursor, table: GatedTable) -> Counts:
    cursor.execute(_all_at_once(table, BATCH))
    return Counts(0, 0)


ONE_STATEMENT = (
    (GatedTable, "touch", _all_at_once), (GatedTable, "delete", _nothing), (GatedTable, "upsert", _nothing),
    (OF_CHANGES, Part.TOUCH, _batch_at_once),
)  # fmt: skip

UNLOCKED = tuple(statement for statement in GATE if statement != (Part.LOCK_SHARED,))
WITHOUT_LOCK = ((batches, "GATE", UNLOCKED), (gate, "GATE", UNLOCKED), (OF_CHANGES, Part.LOCK_SHARED, None))

FORGET = f"""
CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN
    DELETE FROM {TOUCHED} WHERE id = NEW.id; RETURN NULL; END $body$;
CREATE TRIGGER forget AFTER INSERT OR UPDATE ON {TOUCHED} FOR EACH ROW WHEN (NEW._changeover_deleted) EXECUTE FUNCTION forget();
ALTER TABLE {TOUCHED} ENABLE ALWAYS TRIGGER forget;
"""

# -- the loader


def _refuse_nothing(cursor: Cursor, table: GatedTable) -> Counts:
    return Counts(0, 0)


def _insert_anyway(cursor: Cursor, table: GatedTable) -> Counts:
    """Images over whatever is there."""
    inserted = cursor.execute(
        sql.SQL("INSERT INTO {} SELECT b.* FROM {} AS b ORDER BY id ON CONFLICT (id) DO UPDATE SET note = excluded.note").format(
            table.table, BATCH
        )
    ).rowcount
    return Counts(0, inserted)


def _insert_locked(cursor: Cursor, table: GatedTable) -> Counts:
    """Images with the lock inside their statement."""
    statement = sql.SQL(
        "INSERT INTO {} SELECT b.* FROM {} AS b, pg_advisory_xact_lock_shared({}) AS l, changeover.gate AS g"
        " WHERE (g.epoch, g.lsn, g.ordinal) = (0, g.image_lsn, -1) AND NOT EXISTS (SELECT FROM {} AS t WHERE {})"
        " ORDER BY b.id ON CONFLICT DO NOTHING"
    ).format(table.table, BATCH, table.lock_key, table.row_versions, table.same_key("t", "b"))
    return Counts(0, cursor.execute(statement).rowcount)


LOAD_UNLOCKED = tuple(statement for statement in LOAD if statement != (Part.LOCK_SHARED,))

# -- TRUNCATE


def _one_delete(connection: Connection, table: GatedTable, version: Version) -> int:
    """Delete what is older in one statement, under the lock."""
    with connection.transaction():
        connection.execute(sql.SQL("SELECT pg_advisory_xact_lock_shared({})").format(table.lock_key))
        connection.execute(
            sql.SQL("DELETE FROM {} AS t WHERE NOT EXISTS (SELECT FROM {} AS d WHERE {} AND {} >= ({}, {}::pg_lsn, {}))").format(
                table.table, table.row_versions, table.same_key("d", "t"), version_of("d"), *_literals(version)
            )
        )
    return 0


def _literals(version: Version) -> tuple[sql.Literal, sql.Literal, sql.Literal]:
    return sql.Literal(version.epoch), sql.Literal(format_lsn(version.lsn)), sql.Literal(version.ordinal)


def _no_barrier(connection: Connection, table: GatedTable, server: str, tries: int = 60) -> int:
    return 0


def _no_floor(connection: Connection, table: GatedTable, floor: Version) -> Version:
    return floor


def _own_version(connection: Connection, table: GatedTable, floor: Version) -> Version:
    """Raise the floor to the TRUNCATE's own version, at which its deletes are offered."""
    gate.raise_floor(connection, table, floor._replace(ordinal=floor.ordinal + 1))
    return floor


_delete_some = truncating._delete_some


def _delete_once(connection: Connection, table: GatedTable, version: Version) -> int:
    """Look once: deletes that the floor refuses would be offered for ever."""
    _delete_some(connection, table, version)
    return 0


# -- collection


def _deleted_where(table: GatedTable, condition: sql.Composable) -> sql.Composed:
    """Delete row versions as the product does: what a writer holds is passed over, so that no deadlock ends the trial."""
    return sql.SQL(
        "DELETE FROM {row_versions} WHERE ctid = ANY (ARRAY("
        "SELECT ctid FROM {row_versions} WHERE {condition} FOR UPDATE SKIP LOCKED))"
    ).format(row_versions=table.row_versions, condition=condition)


def _by_key(turn: Any) -> None:
    """List the keys first and delete them then, whatever version they have by now."""
    found = turn.connection.execute(
        sql.SQL("SELECT id FROM {} WHERE (_changeover_epoch, _changeover_lsn, _changeover_ordinal) <= ({}, {}::pg_lsn, {})").format(
            turn.table.row_versions, *_literals(turn.upto)
        )
    ).fetchall()
    turn.connection.execute(_deleted_where(turn.table, sql.SQL("id = ANY (%s)")), [[row[0] for row in found]])


def _tombstones_alone(table: GatedTable, upto: Version, block: int) -> sql.Composed:
    return _deleted_where(table, sql.SQL("_changeover_deleted"))


def _without(procedure: statements.Procedure, part: Part) -> statements.Procedure:
    return tuple(transaction for transaction in procedure if transaction != ((part,),))


RELIABLE: Mapping[str, Mutant] = {
    "no tombstone": Mutant(before=FORGET, after="DROP FUNCTION forget CASCADE"),
    "no gate": Mutant(((GatedTable, "touch", _touch(HERE + KEPT)),)),
    "no floor": Mutant(((GatedTable, "touch", _touch(HERE + KEPT + NEWER)),)),
    "image whatever is there": Mutant(
        ((OF_IMAGES, Part.REFUSE, _refuse_nothing), (OF_IMAGES, Part.INSERT, _insert_anyway))
    ),
    "TRUNCATE ignored": Mutant(((truncating, "truncate", lambda *_: 0),)),
    "TRUNCATE raises the floor to its own version": Mutant(
        ((truncating, "raise_floor", _own_version), (truncating, "_delete_some", _delete_once))
    ),
    "TRUNCATE without floor": Mutant(((truncating, "raise_floor", _no_floor),)),
    "collection without floor": Mutant(((garbage, "COLLECT", _without(COLLECT, Part.RAISE_FLOOR)),)),
    "collection before close": Mutant(((floors, "collectable", lambda closed, applied, upto: True),)),
    "collection by time": Mutant(((floors, "collection_bound", lambda epoch, applied: Version(epoch, applied + 300, -1)),
                                  (floors, "collectable", lambda closed, applied, upto: closed))),
    "collection of every tombstone": Mutant(((garbage, "purge", _tombstones_alone),)),
}  # fmt: skip

RARE: Mapping[str, Mutant] = {
    "gate in one statement": Mutant(ONE_STATEMENT),
    "no sweep": Mutant(((postgres, "CLOSE", (BARRIER,)),)),
    "sweep without barrier": Mutant(((postgres, "CLOSE", _without(CLOSE, Part.LOCK_EXCLUSIVE)),)),
    "lock inside the statement": Mutant(
        (*WITHOUT_LOCK, (GatedTable, "touch", _touch(LOCKED + HERE + ABOVE + KEPT + NEWER)))
    ),
    "no lock": Mutant((*WITHOUT_LOCK,)),
    "loader: lock inside the statement": Mutant(
        ((batches, "LOAD", LOAD_UNLOCKED), (OF_IMAGES, Part.INSERT, _insert_locked))
    ),
    "collection without barrier": Mutant(((garbage, "COLLECT", _without(COLLECT, Part.LOCK_EXCLUSIVE)),)),
    "collection by a list of keys": Mutant(((garbage.STEPS, Part.PURGE, _by_key),)),
    "TRUNCATE without barrier": Mutant(((truncating, "barrier", _no_barrier),)),
    "TRUNCATE by one DELETE": Mutant(((truncating, "_delete_some", _one_delete),)),
}  # fmt: skip

MUTANTS = {**RELIABLE, **RARE}
"""Every mutant, by the model's names where it has one too."""
