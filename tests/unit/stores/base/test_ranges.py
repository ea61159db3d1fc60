"""Ranges partition a table in the database's own order of the key, whatever its size, types and collation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql

from changeover.errors import CouldNotCheck
from changeover.session import Connection, connect
from changeover.stores.base.ranges import chunk_count, plan_ranges, ranges_between, require_partition
from changeover.stores.base.reader import KeyRange


def count_in(connection: Connection, key: Sequence[str], types: Sequence[str], bounds: KeyRange) -> int:
    """Return how many rows lie in a range, as the database compares."""
    columns = sql.SQL(", ").join(map(sql.Identifier, key))
    sides = [
        sql.SQL("({}) {} ({})").format(
            columns, sql.SQL(operator),
            sql.SQL(", ").join(sql.SQL("{}::{}").format(sql.Literal(v), sql.SQL(t)) for v, t in zip(bound, types, strict=True)),
        )
        for operator, bound in ((">=", bounds[0]), ("<", bounds[1]))
        if bound is not None
    ]  # fmt: skip
    where = sql.SQL(" AND ").join([sql.SQL("true"), *sides])
    row = connection.execute(sql.SQL("SELECT count(*) FROM keyed WHERE {}").format(where)).fetchone()
    assert row is not None
    return int(row[0])


def planned(connection: Connection, key: Sequence[str], types: Sequence[str], count: int) -> list[int]:
    """Return the rows of each planned range, after proof that the ranges partition the table."""
    ranges = plan_ranges(connection, "public", "keyed", key, count)
    require_partition("keyed", ranges)
    sizes = [count_in(connection, key, types, bounds) for bounds in ranges]
    row = connection.execute("SELECT count(*) FROM keyed").fetchone()
    assert row is not None
    assert sum(sizes) == row[0]
    return sizes


def test_numbers_are_in_the_order_of_numbers(old_dsn: str) -> None:
    with connect(old_dsn, "test") as connection:
        connection.execute("CREATE TABLE keyed (id bigint PRIMARY KEY); INSERT INTO keyed SELECT generate_series(-1200, 1200)")
        assert planned(connection, ["id"], ["bigint"], 8) == [301, *[300] * 7]
        lower = [int(bounds[0][0]) for bounds in plan_ranges(connection, "public", "keyed", ["id"], 8) if bounds[0]]
        assert lower == sorted(lower), "as text, 9 comes after 10"


def test_keys_of_two_columns(old_dsn: str) -> None:
    with connect(old_dsn, "test") as connection:
        connection.execute(
            "CREATE TABLE keyed (a integer, b numeric, PRIMARY KEY (a, b));"
            " INSERT INTO keyed SELECT i / 5, (i % 5) * 10.5 FROM generate_series(1, 1000) i"
        )
        assert planned(connection, ["a", "b"], ["integer", "numeric"], 4) == [250] * 4
        assert planned(connection, ["b", "a"], ["numeric", "integer"], 4) == [250] * 4


WORDS = ["a", "A", "b", "B", "é", "Z", "z", "_", "-a", "a-b", "ab", "A b", "10", "9", "100", "ß", "", "\t", "'", "\\", '"', "ä,ö"]


COLLATIONS = """
SELECT collname FROM pg_collation WHERE collname IN ('C', 'pg_unicode_fast', 'C.utf8', 'en_US.utf8', 'de_DE.utf8')
    OR (collname IN ('en-x-icu', 'und-x-icu') AND collprovider = 'i')
"""
"""What a server has of these depends on how it was built and on the machine; codepoint order is always there."""


def test_texts_are_in_the_order_of_their_collation(any_dsn: str) -> None:
    with connect(any_dsn, "test") as connection:
        for [collation] in connection.execute(COLLATIONS).fetchall():
            connection.execute("DROP TABLE IF EXISTS keyed")
            connection.execute(sql.SQL("CREATE TABLE keyed (word text COLLATE {} PRIMARY KEY)").format(sql.Identifier(collation)))
            connection.cursor().executemany("INSERT INTO keyed VALUES (%s)", [(word,) for word in WORDS])
            sizes = planned(connection, ["word"], ["text"], 6)
            assert (len(sizes), max(sizes) - min(sizes)) == (6, 1), collation


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9])
def test_tiny_and_empty_tables(old_dsn: str, rows: int) -> None:
    with connect(old_dsn, "test") as connection:
        connection.execute("CREATE TABLE keyed (id integer PRIMARY KEY)")
        connection.execute("INSERT INTO keyed SELECT generate_series(1, %s::integer)", [rows])
        sizes = planned(connection, ["id"], ["integer"], 8)
        assert len(sizes) == max(1, min(rows, 8))
        assert chunk_count(connection, "public", "keyed", 100_000, 8) == 8


def test_rows_outside_of_what_was_sampled_are_in_the_outer_ranges(old_dsn: str) -> None:
    with connect(old_dsn, "test") as connection:
        connection.execute("CREATE TABLE keyed (id bigint PRIMARY KEY); INSERT INTO keyed SELECT generate_series(1, 100)")
        ranges = plan_ranges(connection, "public", "keyed", ["id"], 4)
        connection.execute("INSERT INTO keyed SELECT generate_series(-50, 0); INSERT INTO keyed SELECT generate_series(101, 150)")
        assert [count_in(connection, ["id"], ["bigint"], bounds) for bounds in ranges] == [76, 25, 25, 75]


@given(st.lists(st.integers(), unique=True, max_size=20).map(sorted))
def test_ranges_between_bounds_partition(bounds: list[int]) -> None:
    ranges = ranges_between([(str(bound),) for bound in bounds])
    require_partition("t", ranges)
    assert len(ranges) == len(bounds) + 1


@given(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=8).map(sorted), st.data())
def test_a_gap_or_an_overlap_is_found(bounds: list[int], data: st.DataObject) -> None:
    ranges = ranges_between([(str(bound),) for bound in bounds])
    place = data.draw(st.integers(0, len(ranges) - 1))
    broken = data.draw(st.sampled_from(["left out", "twice", "moved"]))
    if broken == "left out":
        del ranges[place]
    elif broken == "twice":
        ranges.insert(place, ranges[place])
    else:
        lower, upper = ranges[place]
        ranges[place] = (("elsewhere",), upper) if lower is None or place % 2 else (lower, ("elsewhere",))
    with pytest.raises(CouldNotCheck):
        require_partition("t", ranges)
