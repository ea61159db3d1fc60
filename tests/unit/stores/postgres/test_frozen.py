"""One snapshot holds many tables: what fails of one leaves the others theirs, and all are of one moment."""

from __future__ import annotations

from typing import Any, cast

import pytest

from changeover.errors import ChangeoverError
from changeover.session import connect
from changeover.stores.base.pgtypes import Column
from changeover.stores.base.reader import ReadTable
from changeover.stores.postgres.store import freeze

ID = (Column("id", "integer", "int"),)


def read(name: str) -> ReadTable:
    return ReadTable("public", name, ID, ID)


def test_a_table_that_fails_leaves_the_others_their_moment(old_dsn: str) -> None:
    with connect(old_dsn, "test") as session:
        session.execute("CREATE TABLE one (id integer PRIMARY KEY); CREATE TABLE two (id integer PRIMARY KEY)")
        no_spark = cast(Any, None)  # rows are read on demand alone
        with freeze(no_spark, old_dsn, "test", [read("one"), read("gone"), read("two")], 4) as hold:
            one = hold(read("one"))
            with pytest.raises(ChangeoverError, match="gone"):
                hold(read("gone"))
            session.execute("INSERT INTO one VALUES (1); INSERT INTO two VALUES (1)")
            two = hold(read("two"))
            with pytest.raises(ChangeoverError, match="no_such"):
                one.query("SELECT no_such FROM one")
            assert [frozen.query("SELECT count(*) FROM one, two") for frozen in (one, two)] == [[(0,)], [(0,)]]
            assert one.position == two.position
