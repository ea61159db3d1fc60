"""Replay: what this version does not carry stops its table by name, after everything before it was applied, in every target."""

from __future__ import annotations

import pytest

from changeover.errors import TableStopped
from changeover.jobs.ledger.ledger import Ledger
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, LAKE, STORE, MakeMigration, Migration

SEED = "INSERT INTO follows (from_user, to_channel, note) SELECT i, i, 'seed' FROM generate_series(1, 20) i"
BEFORE = "UPDATE follows SET note = 'before' WHERE from_user <= 3; DELETE FROM follows WHERE from_user = 4"
AFTER = "INSERT INTO follows (from_user, to_channel, note) VALUES (100, 100, 'after')"

STOPS = [
    (
        "ALTER TABLE follows DROP COLUMN credit; INSERT INTO follows (from_user, to_channel) VALUES (101, 1)",
        "its definition changed: column credit was dropped",
    ),
    (
        "ALTER TABLE follows ALTER note TYPE varchar(99); INSERT INTO follows (from_user, to_channel) VALUES (101, 1)",
        "its definition changed: column note has another type",
    ),
]

TRUNCATES = {
    "alone": "TRUNCATE follows; INSERT INTO follows (from_user, to_channel, note) VALUES (1, 1, 'new'), (50, 1, 'new')",
    "inside": "BEGIN; INSERT INTO follows (from_user, to_channel) VALUES (7, 70); TRUNCATE follows;"
    " INSERT INTO follows (from_user, to_channel) VALUES (7, 71); COMMIT",
    "twice": "TRUNCATE follows; INSERT INTO follows (from_user, to_channel) VALUES (1, 2); TRUNCATE follows",
}

CARRIED = [
    "UPDATE follows SET from_user = 200 WHERE from_user = 9",
    "BEGIN; UPDATE follows SET from_user = 201 WHERE from_user = 11; UPDATE follows SET from_user = 11, to_channel = 99"
    " WHERE from_user = 8; UPDATE follows SET from_user = 202, note = 'twice' WHERE from_user = 201; COMMIT",
    "BEGIN; UPDATE follows SET from_user = 0 WHERE from_user = 5; UPDATE follows SET from_user = 5, to_channel = 5"
    " WHERE from_user = 6; UPDATE follows SET from_user = 6, to_channel = 6 WHERE from_user = 0; COMMIT",
    "UPDATE follows SET note = 'short' WHERE from_user = 10",
    "UPDATE follows SET from_user = 300 WHERE from_user = 12",
    "UPDATE follows SET note = 'a' WHERE from_user = 13;"
    " UPDATE follows SET settings = to_jsonb(repeat('y', 9000)) WHERE from_user = 13;"
    " UPDATE follows SET note = 'b' WHERE from_user = 13",
    "UPDATE follows SET note = 'a' WHERE from_user = 14; DELETE FROM follows WHERE from_user = 14",
    "UPDATE follows SET note = 'a' WHERE from_user = 15; DELETE FROM follows WHERE from_user = 15;"
    " INSERT INTO follows (from_user, to_channel, note) VALUES (15, 15, 'small')",
    "ALTER TABLE follows ADD COLUMN more text DEFAULT 'x'; UPDATE follows SET note = 'n', more = 'y' WHERE from_user = 3",
]
"""Keys that change, alone, in a chain and in a ring; values that an update does not send, to rows that then stay, move, grow,
vanish or come back; a column that the spec does not know."""


def prepared(make_migration: MakeMigration, *targets: str) -> Migration:
    """A migration that is prepared; some users have a value that is stored out of line."""
    external = "ALTER TABLE follows ALTER settings SET STORAGE EXTERNAL"
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, external, SEED, targets=targets)
    made.old.execute("UPDATE follows SET settings = to_jsonb(repeat('x' || from_user, 4000)) WHERE from_user >= 10")
    made.prepare()
    return made


def loaded(make_migration: MakeMigration, *targets: str) -> Migration:
    """The same, loaded."""
    made = prepared(make_migration, *targets)
    made.backfill()
    return made


def stopped(migration: Migration, *targets: str) -> str:
    with pytest.raises(TableStopped, match=r"table public\.follows is stopped") as caught:
        migration.replay(*targets)
    assert caught.value.exit_code == 1
    return str(caught.value)


def assert_stops(migration: Migration, statement: str, reason: str) -> None:
    """Assert that all before a statement is applied in every target, and nothing after it."""
    migration.old.execute(BEFORE)
    expected = migration.source_rows()
    migration.old.execute(statement.encode())
    migration.old.execute(AFTER)
    migration.capture()
    assert reason in stopped(migration)
    for target in migration.spec.targets:
        assert migration.target_rows(target) == expected, f"{target}: all before the stop, nothing after it"
    assert reason in stopped(migration), "a second run says the same"
    with Ledger.open(migration.spec, "test") as ledger:
        assert len({load.applied for load in ledger.loads()}) == 1
        assert reason in (ledger.stopped().get("public.follows") or "")


@pytest.mark.parametrize(("statement", "reason"), STOPS, ids=["dropped", "retyped"])
def test_a_table_stops_by_name_after_everything_before(make_migration: MakeMigration, statement: str, reason: str) -> None:
    assert_stops(loaded(make_migration, STORE), statement, reason)


def test_every_target_is_brought_up_to_the_stop(make_migration: MakeMigration) -> None:
    assert_stops(loaded(make_migration, STORE, LAKE), *STOPS[0])


BATCHES = {"truncate " + name: [statement] for name, statement in TRUNCATES.items()} | {"keys and unsent values": CARRIED}


@pytest.mark.parametrize("loaded_first", [True, False], ids=["chunks first", "changes first"])
@pytest.mark.parametrize("statements", BATCHES.values(), ids=BATCHES.keys())
def test_every_kind_of_change_is_carried(make_migration: MakeMigration, statements: list[str], loaded_first: bool) -> None:
    made = prepared(make_migration, STORE)
    if loaded_first:
        made.backfill()
    made.old.execute(BEFORE)
    made.catch_up()
    for statement in statements:
        made.old.execute(statement.encode())
    made.catch_up()
    made.backfill()
    made.assert_equal()
    made.new.execute("UPDATE changeover.load SET applied = (SELECT l0 FROM changeover.stream)")
    made.old.execute(AFTER)
    made.catch_up()
    made.assert_equal()


def test_every_kind_of_change_is_carried_to_the_lake(make_migration: MakeMigration) -> None:
    made = loaded(make_migration, LAKE)
    for statements in (CARRIED, *TRUNCATES.values(), AFTER):
        for statement in [statements] if isinstance(statements, str) else statements:
            made.old.execute(statement.encode())
        made.catch_up()
        made.assert_equal()


TWO = FOLLOWS_TABLE + '[[table]]\nsource = "other"\ntarget = "other_too"\nkey = ["id"]\n'


def test_the_other_tables_go_on(make_migration: MakeMigration) -> None:
    made = make_migration(TWO, FOLLOWS, SEED, "CREATE TABLE other (id integer PRIMARY KEY, note text)", targets=[STORE])
    made.prepare()
    made.backfill()
    made.old.execute("ALTER TABLE follows DROP note; DELETE FROM follows; INSERT INTO other VALUES (1, 'goes on')")
    made.capture()
    stopped(made)
    assert made.new.execute("SELECT id, note FROM other_too").fetchall() == [(1, "goes on")]
    made.old.execute("INSERT INTO other VALUES (2, 'still')")
    made.capture()
    stopped(made)
    assert made.new.execute("SELECT id, note FROM other_too ORDER BY id").fetchall() == [(1, "goes on"), (2, "still")]


def test_replay_repeated_and_in_pieces_gives_the_same(make_migration: MakeMigration) -> None:
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, SEED, targets=[STORE])
    made.prepare()
    for number in range(3):
        made.old.execute("UPDATE follows SET note = %s WHERE from_user <= 5", [f"n{number}"])
        made.old.execute("DELETE FROM follows WHERE from_user = 6")
        made.old.execute("INSERT INTO follows (from_user, to_channel, note) VALUES (6, 6, 'back')")
        made.catch_up()
    made.backfill()
    made.new.execute("UPDATE changeover.load SET applied = (SELECT l0 FROM changeover.stream)")
    again = made.replay()
    assert (again.events > 0, again.taken) == (True, 0), "what was offered before is refused"
    made.assert_equal()
    # a reader that is sent back to before its spool begins has a gap in front of it
    made.new.execute("UPDATE changeover.load SET applied = (SELECT l0 - 1 FROM changeover.stream)")
    with pytest.raises(TableStopped, match="the spool begins at"):
        made.replay()


def test_a_row_that_leaves_and_enters_where(make_migration: MakeMigration) -> None:
    table = '[[table]]\nsource = "t"\ntarget = "kept"\nkey = ["id"]\nwhere = "note IS NOT NULL"\n'
    made = make_migration(
        table,
        "CREATE TABLE t (id integer PRIMARY KEY, note text)",
        "INSERT INTO t VALUES (1, 'in'), (2, NULL), (3, 'in')",
        targets=[STORE],
    )
    made.prepare()
    made.backfill()
    made.old.execute(
        "UPDATE t SET note = NULL WHERE id = 1; UPDATE t SET note = 'entered' WHERE id = 2; DELETE FROM t WHERE id = 3"
    )
    made.catch_up()
    assert made.new.execute("SELECT id, note FROM kept").fetchall() == [(2, "entered")]
