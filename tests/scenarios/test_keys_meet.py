"""Source rows that meet in one target key, which an expression makes of them: two that are alive stop the table, by name.

One that takes a key which another has given up is carried, whatever is offered together or twice, into both kinds of store.
"""

from __future__ import annotations

import re

import pytest

from changeover.errors import RowRefused
from changeover.verifiers.verification import verify
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, rows

SPEC = """
[[table]]
source = "people"
target = "mails"
key = ["mail"]
drop = ["email"]
[table.columns]
mail = "lower(email)"
"""
PEOPLE = """
CREATE TABLE people (email text PRIMARY KEY, v text);
INSERT INTO people SELECT 'Mail' || i, 'v' || i FROM generate_series(1, 30) i
"""
EXPECTED = "SELECT lower(email), v FROM people"


def assert_followed(migration: Migration, *targets: str) -> None:
    expected = rows(migration.old.execute(EXPECTED).fetchall())
    if STORE in targets:
        assert rows(migration.new.execute("SELECT mail, v FROM mails").fetchall()) == expected
    if LAKE in targets:
        lake = migration.lake("mails").toArrow().to_pylist()
        assert rows([(row["mail"], row["v"]) for row in lake]) == expected
        assert set(lake[0]) == {"mail", "v"}


def refused(migration: Migration, target: str, one: str, other: str) -> None:
    with pytest.raises(RowRefused) as caught:
        migration.replay(target)
    told = str(caught.value)
    assert all(re.search(rf'"email":"{name}"', told) for name in (one, other)), told
    assert "that are alive have this one target key" in told


def test_what_meets_alive_stops_and_what_takes_over_a_key_passes(make_migration: MakeMigration) -> None:
    made = make_migration(SPEC, PEOPLE)
    made.prepare()
    made.backfill()
    begun = made.new.execute("SELECT source, target, applied FROM changeover.load").fetchall()
    # a key given up and taken by another row, in one batch and over two; a row that only gets another case
    made.old.execute("DELETE FROM people WHERE email = 'Mail1'")
    made.old.execute("INSERT INTO people VALUES ('MAIL1', 'another')")
    made.old.execute("UPDATE people SET email = 'mail2', v = 'itself' WHERE email = 'Mail2'")
    made.old.execute("DELETE FROM people WHERE email = 'Mail3'")
    made.old.execute("INSERT INTO people VALUES ('New', 'one')")
    made.catch_up()
    assert_followed(made, STORE, LAKE)
    made.old.execute("INSERT INTO people VALUES ('MAIL3', 'later')")
    made.old.execute("UPDATE people SET v = 'touched' WHERE email IN ('MAIL1', 'mail2', 'New')")
    # the first batch once more, as after a kill before its position was written down
    for source, target, applied in begun:
        made.new.execute("UPDATE changeover.load SET applied = %s WHERE (source, target) = (%s, %s)", [applied, source, target])
    made.catch_up()
    assert_followed(made, STORE, LAKE)
    # a row of the backfill, one that came by the stream, and two that are new
    for held, taken in (("Mail5", "mail5"), ("New", "NEW"), ("both", "Both")):
        made.old.execute("INSERT INTO people VALUES (%s, 'in the way') ON CONFLICT DO NOTHING", [held])
        made.old.execute("INSERT INTO people VALUES (%s, 'in the way')", [taken])
        made.capture()
        for target in (STORE, LAKE):
            refused(made, target, held, taken)
        made.old.execute("DELETE FROM people WHERE email = %s", [held])
    # once one of them is gone the same command goes on
    made.catch_up()
    assert_followed(made, STORE, LAKE)
    with made.capturing():
        assert [verdict.word for verdict in verify(made.spec, made.spark)] == ["equal", "equal"]


def test_images_that_meet_are_named_by_both_source_keys(make_migration: MakeMigration) -> None:
    made = make_migration(SPEC, PEOPLE, "INSERT INTO people VALUES ('mail7', 'twin')")
    made.prepare()
    for target in (STORE, LAKE):
        with pytest.raises(RowRefused) as caught:
            made.backfill(target)
        told = str(caught.value)
        assert '"email":"Mail7"' in told, target
        assert '"email":"mail7"' in told, target
    made.abort()
    left = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('changeover') AND relname LIKE 'owner%'"
    assert made.new.execute(left).fetchall() == []
