"""Changes: all result sets, their table, and what a command deleted."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from changeover.flags.mirror.change import Change, returned
from changeover.session import Connection, connect


@pytest.fixture
def session(old_dsn: str) -> Iterator[Connection]:
    with connect(old_dsn, "test") as made:
        made.execute("CREATE TABLE kept (id bigint PRIMARY KEY, note text); CREATE TABLE other (id bigint, more text)")
        yield made


def relation(session: Connection, table: str = "kept") -> int:
    row = session.execute("SELECT %s::regclass::oid", [table]).fetchone()
    assert row is not None
    return int(row[0])


def test_rows_of_any_row_factory_are_changes_of_their_table(session: Connection) -> None:
    plain = session.execute("INSERT INTO kept VALUES (1, 'a') RETURNING *")
    named = session.cursor(row_factory=psycopg.rows.dict_row)
    named.execute("UPDATE kept SET note = 'a' RETURNING *")
    assert returned(plain) == returned(named) == [Change({"id": 1, "note": "a"}, relation=relation(session))]


def test_what_a_command_deleted_is_told_by_its_tag(session: Connection) -> None:
    session.execute("INSERT INTO kept VALUES (1, 'a'), (2, 'b')")
    assert [change.deleted for change in returned(session.execute("DELETE FROM kept RETURNING *"))] == [True, True]
    assert returned(session.execute("DELETE FROM kept RETURNING *")) == []


def test_all_result_sets_are_taken(session: Connection) -> None:
    cursor = session.cursor()
    cursor.executemany("INSERT INTO kept VALUES (%s, 'many') RETURNING *", [(number,) for number in range(1, 6)], returning=True)
    assert [change.row["id"] for change in returned(cursor)] == [1, 2, 3, 4, 5]
    cursor.execute(
        "UPDATE kept SET note = 'x' WHERE id = 1 RETURNING *; INSERT INTO other VALUES (1, 'y');"
        " DELETE FROM kept WHERE id = 2 RETURNING *; INSERT INTO other VALUES (2, 'z') RETURNING *"
    )
    found = [(change.row["id"], change.deleted, change.relation) for change in returned(cursor)]
    assert found == [(1, False, relation(session)), (2, True, relation(session)), (2, False, relation(session, "other"))]


def test_a_row_of_a_merge_says_what_became_of_it(session: Connection) -> None:
    session.execute("INSERT INTO kept VALUES (1, 'a'), (2, 'b')")
    merge = (
        "MERGE INTO kept USING (VALUES (1), (2), (3)) AS v (n) ON kept.id = v.n WHEN MATCHED AND n = 1 THEN DELETE"
        " WHEN MATCHED THEN UPDATE SET note = 'merged' WHEN NOT MATCHED THEN INSERT VALUES (n, 'new') RETURNING {}"
    )
    cursor = session.execute(merge.format("merge_action(), kept.*").encode())
    assert [(change.row, change.deleted, change.relation) for change in returned(cursor)] == [
        ({"id": 1, "note": "a"}, True, relation(session)),
        ({"id": 2, "note": "merged"}, False, relation(session)),
        ({"id": 3, "note": "new"}, False, relation(session)),
    ]
    with pytest.raises(TypeError, match="MERGE does not tell which rows it deleted"):
        returned(session.execute(merge.format("kept.*").encode()))


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("SELECT * FROM kept", "SELECT does not tell which are deleted"),
        ("WITH gone AS (DELETE FROM kept RETURNING *) SELECT * FROM gone", "SELECT does not tell which are deleted"),
        ("UPDATE kept SET note = more FROM other RETURNING *", "UPDATE returned columns of several tables"),
        ("UPDATE kept SET note = 'x' RETURNING id, note AS id", "or two of one name"),
    ],
)
def test_what_does_not_tell_is_refused(session: Connection, statement: str, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        returned(session.execute(statement.encode()))
