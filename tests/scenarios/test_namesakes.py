"""Two migrations into one database, whose tables have one name in two schemas: neither knows of the other's keys."""

from __future__ import annotations

import pytest

from changeover.flags.mirror.change import Change
from changeover.flags.mirror.gatecall import GateCall
from changeover.jobs import finalize
from changeover.position import Version
from tests.support.fix_migration import STORE, MakeMigration, Migration

TABLE = '[[table]]\nsource = "{schema}.kept"\ntarget = "{schema}.kept"\nkey = ["id"]\n'
SOURCE = """
CREATE SCHEMA {schema};
CREATE TABLE {schema}.kept (id integer PRIMARY KEY, note text);
INSERT INTO {schema}.kept SELECT i, '{schema}' FROM generate_series(1, 20) i
"""

Namesakes = tuple[Migration, Migration]


@pytest.fixture
def namesakes(make_migration: MakeMigration) -> Namesakes:
    made = []
    for schema in ("one", "two"):
        migration = make_migration(TABLE.format(schema=schema), SOURCE.format(schema=schema), targets=[STORE])
        migration.new.execute(f"CREATE SCHEMA {schema}".encode())
        migration.prepare()
        made.append(migration)
    return made[0], made[1]


def kept(migration: Migration, *, old: bool = False) -> list[tuple[int, str]]:
    """Return the rows of a migration's table in the new store, or in the old one."""
    connection = migration.old if old else migration.new
    return connection.execute(f"SELECT id, note FROM {migration.spec.tables[0].target} ORDER BY id".encode()).fetchall()


def test_a_delete_in_one_is_no_tombstone_in_the_other(namesakes: Namesakes) -> None:
    one, two = namesakes
    one.old.execute("DELETE FROM one.kept WHERE id <= 5; UPDATE one.kept SET note = 'later' WHERE id = 6")
    one.catch_up()
    for migration in namesakes:
        migration.backfill()
        migration.catch_up()
        assert kept(migration) == kept(migration, old=True)
    assert (len(kept(one)), len(kept(two))) == (15, 20)


def test_the_end_of_one_leaves_the_others_tombstones(namesakes: Namesakes) -> None:
    one, two = namesakes
    two.old.execute("DELETE FROM two.kept WHERE id = 7; INSERT INTO two.kept VALUES (21, 'new')")
    two.catch_up()
    finalize.abort(one.spec)
    two.backfill()
    two.catch_up()
    assert kept(two) == kept(two, old=True)


def test_a_mirrored_delete_goes_through_its_own_gate(namesakes: Namesakes) -> None:
    one, two = namesakes
    for migration in namesakes:
        migration.backfill()
    call = GateCall.of(two.new, two.spec.tables[0].target)
    assert call.key == ("id",)
    gone = call.parameters(Version(0, 1 << 60, -1), Change({"id": 3}, deleted=True))
    assert two.new.execute(call.statement, gone).fetchone() == (True,)
    one.old.execute("UPDATE one.kept SET note = 'later' WHERE id = 3")
    one.catch_up()
    assert (3, "later") in kept(one)
    assert [row[0] for row in kept(two)] == [1, 2, *range(4, 21)]
