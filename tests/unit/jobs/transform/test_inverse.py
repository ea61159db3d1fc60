"""What of a row goes back by itself, and what the spec has to state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from changeover.errors import SpecError
from changeover.jobs.transform import inverse
from changeover.spec import Spec, Table, load
from changeover.stores.base.pgtypes import Column, source_type

TEXT = """
name = "t"
[source]
dsn = "env:OLD"
[target.store]
kind = "postgres"
dsn = "env:NEW"
[[table]]
source = "follows"
target = "associations"
key = ["a", "kind"]
drop = ["obsolete"]
[table.columns]
a = "from_user"
kind = "'follows'"
joined = "to_timestamp(joined)"
doubled = "2 * amount"
[table.reverse]
joined = "date_format(joined, 'yyyy')"
obsolete = "NULL"
[work]
path = "w"
"""

OLD = [
    Column("from_user", "integer", "int", True), Column("joined", "text", "string"), Column("amount", "numeric", "string"),
    Column("obsolete", "text", "string"), Column("note", "text", "string"),
]  # fmt: skip
NEW = [
    Column("a", "bigint", "bigint", True), Column("kind", "text", "string", True),
    Column("joined", "timestamp with time zone", "timestamp"), Column("doubled", "double precision", "double"),
    Column("amount", "numeric", "string"), Column("note", "character varying(90)", "string"), Column("own", "point", ""),
]  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    path = tmp_path / "spec.toml"
    path.write_text(TEXT)
    return load(path)


def table(spec: Spec, **changed: object) -> Table:
    return replace(spec.tables[0], **changed)  # type: ignore[arg-type]


def test_a_moved_column_goes_back_and_the_rest_is_stated(spec: Spec) -> None:
    expected = {
        "from_user": "`a`",
        "joined": "date_format(joined, 'yyyy')",
        "amount": "`amount`",
        "obsolete": "NULL",
        "note": "`note`",
    }
    for new in (None, NEW):  # before prepare has made the table, and since
        assert inverse.expressions(table(spec), OLD, new) == expected
        assert inverse.missing(spec, table(spec), OLD, new) is None


def test_what_is_neither_moved_nor_stated_is_named(spec: Spec) -> None:
    assert inverse.missing(spec, table(spec, reverse={}), OLD, NEW) == (
        "follows has no reverse replication from associations: nothing gives its columns joined, obsolete (state each in"
        " [table.reverse] as an expression over the row of associations)"
    )
    lacking = inverse.missing(spec, table(spec, function="a:b"), OLD, NEW)
    assert lacking is not None
    assert "from_user, amount, note" in lacking, "what a function makes of a row is not known"


def test_a_column_that_may_have_changed_on_the_way_does_not_go_back_by_itself(spec: Spec) -> None:
    for type_name, spark in (("date", "date"), ("text", "string"), ("smallint", "smallint")):
        narrowed = [Column("a", type_name, spark, True), *NEW[1:]]
        lacking = inverse.missing(spec, table(spec), OLD, narrowed)
        assert lacking is not None
        assert "its column from_user" in lacking


@pytest.mark.parametrize(
    ("old", "new", "back"),
    [
        ("integer", "bigint", True), ("numeric(10,2)", "numeric(12,2)", True), ("numeric(10,2)", "numeric(12,4)", False),
        ("numeric(10,2)", "numeric", False), ("real", "double precision", False), ("character varying(9)", "text", False),
        ("timestamp(0) with time zone", "timestamp with time zone", False), ("uuid", "text", False), ("uuid", "uuid", True),
    ],
)  # fmt: skip
def test_a_wider_column_goes_back_by_itself_only_where_what_is_too_much_is_an_error(
    spec: Spec, old: str, new: str, back: bool
) -> None:
    def column(name: str, type_name: str) -> Column:
        carried = source_type(type_name)
        assert carried is not None
        return Column(name, type_name, carried.spark)

    lacking = inverse.missing(
        spec,
        table(spec, reverse={"joined": "''", "obsolete": "NULL"}),
        [*OLD[:4], column("note", old)],
        [*NEW[:5], column("note", new)],
    )
    assert (lacking is None) is back


def test_a_lake_that_would_cut_what_the_new_store_takes_does_not_follow_it(spec: Spec) -> None:
    new = [*NEW[:4], Column("amount", "numeric(12,4)", "decimal(12,4)"), Column("note", "text", "string")]
    lake = [Column("a", "integer", "int"), Column("amount", "numeric(10,2)", "decimal(10,2)"), Column("note", "text", "string")]
    assert inverse.cut(table(spec), new, lake) == [
        "associations.amount is numeric(12,4) in the new store and decimal(10,2) in a lake, which would not hold all that is"
        " written there after the hand-over: state the wider type by an expression in [table.columns], such as"
        ' amount = "cast(amount as decimal(12,4))"'
    ]
    assert inverse.cut(table(spec), new, [*lake[:1], *new[4:]]) == []


def test_a_column_that_is_not_there_is_a_mistake(spec: Spec) -> None:
    with pytest.raises(SpecError, match=r"reverse.joint: there is no such column in follows: its columns are from_user, joined"):
        inverse.missing(spec, table(spec, reverse={"joint": "a"}), OLD, NEW)


def test_reverse_replication_may_be_told_after_prepare(spec: Spec, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(TEXT.replace('obsolete = "NULL"', "obsolete = \"'x'\""))
    assert load(other).digest == spec.digest
    other.write_text(TEXT.replace("2 * amount", "3 * amount"))
    assert load(other).digest != spec.digest
