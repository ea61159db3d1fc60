"""The reader: the first and the middle keys of a range come in the order of the key's type."""

from __future__ import annotations

from changeover.session import connect
from changeover.stores.base.pgtypes import Column
from changeover.stores.base.reader import KeyRange, ReadTable, some_rows

KEY = (Column("id", "integer", "int"), Column("part", "text", "string"))
TABLE = ReadTable("public", "counted", KEY, KEY)


def test_the_keys_of_a_range_come_in_the_keys_order(any_dsn: str) -> None:
    with connect(any_dsn, "test") as session:
        session.execute("CREATE TABLE counted (id integer, part text, PRIMARY KEY (id, part))")
        session.execute("INSERT INTO counted SELECT i, 'p' FROM generate_series(1, 21) i")
        below: KeyRange = (None, ("21", "p"))
        assert some_rows(session, TABLE, below, 3) == [("1", "p"), ("2", "p"), ("3", "p")]
        assert some_rows(session, TABLE, below, 1, middle=True) == [("11", "p")]
        two: KeyRange = (("2", "p"), ("4", "p"))
        assert some_rows(session, TABLE, two, 1, middle=True) == [("3", "p")], "a half is smaller than the whole"
