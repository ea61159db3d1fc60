"""The questions that a DBA may ask, as the documents write them, of a real migration: true when it holds, and false when not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from psycopg import sql

from changeover.position import parse_lsn
from changeover.session import Connection
from tests.support.fix_migration import STORE, Migration

PAGE = Path(__file__).parents[2] / "docs/concepts/guarantee.md"


def questions() -> list[str]:
    """Return the page's statements, in its order."""
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [text.strip() for block in blocks for text in block.split(";") if text.strip()]


CLOSED, WHOLE, APPLIED, SLOT, SERVER, FILE, AUTHORITY = range(7)


def asked(connection: Connection, number: int) -> list[tuple[Any, ...]]:
    """Return the answer to one question."""
    return connection.execute(sql.SQL(questions()[number])).fetchall()


def told(connection: Connection, number: int) -> bool:
    """Return whether every row of the answer says true."""
    rows = asked(connection, number)
    assert rows
    return all(row[-1] is True for row in rows)


def test_the_questions_have_the_answers_that_the_guarantee_needs(migration: Migration) -> None:
    assert len(questions()) == 7
    migration.prepare()
    assert not told(migration.new, CLOSED)
    migration.backfill()
    migration.old.execute("DELETE FROM follows WHERE from_user = 1")
    position = migration.old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert position is not None
    migration.catch_up()
    assert told(migration.new, CLOSED)
    assert told(migration.new, WHOLE)
    assert told(migration.new, APPLIED)
    assert all(parse_lsn(str(row[2])) >= parse_lsn(position[0]) for row in asked(migration.new, APPLIED))
    assert told(migration.old, SLOT)
    prepared = migration.new.execute("SELECT system_id, timeline FROM changeover.stream").fetchone()
    assert prepared is not None
    assert [(str(row[0]), row[1]) for row in asked(migration.old, SERVER)] == [prepared]
    file = migration.new.execute("SELECT filenode FROM changeover.source_table").fetchall()
    assert asked(migration.old, FILE) == file

    migration.new.execute("UPDATE changeover.load SET stopped = 'its definition changed'")
    assert not told(migration.new, APPLIED)
    migration.old.execute("ALTER TABLE follows ALTER note TYPE varchar(9000) USING left(note, 9000)")
    assert asked(migration.old, FILE) != file
    migration.new.execute("DELETE FROM changeover.chunk WHERE target = %s AND chunk = 1", [STORE])
    assert not told(migration.new, WHOLE)


def test_the_question_of_authority_is_answered_by_the_last_move_of_a_tenant(migration: Migration) -> None:
    migration.prepare()
    question = sql.SQL(questions()[AUTHORITY].replace("'follows'", "{}")).format(sql.Literal(migration.spec.name))
    answers = []
    for epoch, store, tenants in (
        (0, None, None),
        (1, "new", ["42", "7"]),
        (2, "old", ["7"]),
        (3, "new", None),
        (4, "old", ["42"]),
    ):
        if store is not None:
            migration.new.execute(
                "INSERT INTO changeover.authority (migration, epoch, store, from_lsn, pause_seconds, new_lsn, tenants)"
                " VALUES (%s, %s, %s, '0/1', 0.1, '0/1', %s)", [migration.spec.name, epoch, store, tenants],
            )  # fmt: skip
        answers.append(migration.new.execute(question).fetchone())
    assert answers == [("old",), ("new",), ("new",), ("new",), ("old",)]
