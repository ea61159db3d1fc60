"""Names: every spelling has one reader, no two tables share one, and none leaves the folder or meets a name of ours."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from changeover.errors import UsageError
from changeover.names import joined, qualified, quoted, reserved, segment
from changeover.stores.delta.appends import APART, MARKS, marks, marks_among
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres.gate import ours
from changeover.stores.postgres.store import PostgresStore

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda n: len(n.encode()) <= 63
)
"""What PostgreSQL takes for a name."""


@given(NAMES, NAMES)
def test_a_table_reads_back_from_its_one_spelling(schema: str, name: str) -> None:
    assert qualified(joined(schema, name)) == (schema, name)


@given(NAMES, NAMES, NAMES, NAMES)
def test_two_tables_are_never_one(schema: str, name: str, other_schema: str, other: str) -> None:
    same = (schema, name) == (other_schema, other)
    assert (joined(schema, name) == joined(other_schema, other)) is same
    assert (ours("versions", schema, name) == ours("versions", other_schema, other)) is same


def test_a_dot_belongs_to_the_part_that_quotes_say() -> None:
    assert joined("a", "b.c") == 'a."b.c"' != joined("a.b", "c")
    assert qualified('public."a.b"') == ("public", "a.b")
    assert qualified('"a.b"') == ("public", "a.b")
    assert qualified('"we ""said"" so".T') == ('we "said" so', "T")
    assert qualified('we"ird.Name') == ('we"ird', "Name"), "a quote inside is a character"
    assert ours("versions", "a", "b.c") != ours("versions", "a.b", "c")


@pytest.mark.parametrize("wrong", ["", ".", "a.", ".a", "a..b", "a.b.c", '"a', '"a"b', '"".a', "a\0b", 'a."b'])
def test_what_names_no_table_is_one_sentence(wrong: str) -> None:
    with pytest.raises(UsageError, match="names no table: write schema"):
        qualified(wrong)


@given(NAMES, NAMES)
def test_a_lakes_table_is_one_segment_of_its_own(name: str, other: str) -> None:
    folder = PurePosixPath("/lake") / segment(name)
    assert folder.parent == PurePosixPath("/lake")
    assert folder.name not in ("", ".", "..")
    assert len(folder.name.encode()) <= 255
    assert (segment(name) == segment(other)) is (name == other)
    assert not set(folder.name) & set("%/\\ ")


def test_plain_names_keep_their_folder() -> None:
    assert [segment(name) for name in ("associations", "Follows-2", "a.b", "_x")] == ["associations", "Follows-2", "a.b", "_x"]
    assert [segment(name) for name in ("..", "../up", "/etc", "a~b", "é")] == ["~2E.", "~2E.~2Fup", "~2Fetc", "a~7Eb", "~C3~A9"]


@given(NAMES)
def test_a_quoted_column_ends_where_it_ends(name: str) -> None:
    inside = quoted(name)[1:-1]
    assert inside.replace("``", "") == name.replace("`", "")
    assert inside.replace("``", "`") == name


def test_the_prefix_is_reserved_in_any_case() -> None:
    assert reserved("_changeover_x")
    assert reserved("_Changeover_x"), "Spark and Delta take it for the same"
    assert not any(map(reserved, ("_change", "x_changeover_", "_key0")))


def test_a_lake_tells_its_two_columns_from_a_tables_own() -> None:
    assert marks(["id", "note"]) == MARKS
    assert marks(["id", "_VERSION"]) == marks(["_deleted"]) == APART
    assert marks_among(["id", *MARKS]) == MARKS
    assert marks_among([*MARKS, *APART]) == APART, "the others are the user's"
    assert marks_among(["id"]) is None


def test_names_that_a_store_does_not_take_are_told(tmp_path: Path) -> None:
    lake = DeltaStore("lake", tmp_path, "m")
    assert lake.misfits("t", ["id", "a.b", "a`b", 'a"b', "select", "_version", "a%b", "é"]) == []
    remedy = "which Delta does not take: give another name in [table.columns]"
    assert lake.misfits("t", ["Name", "name", "a b", "x\ny"]) == [
        f'target table t would have two columns that differ in case alone, "Name" and "name", {remedy}',
        f'target table t would have a column "a b", {remedy}',
        f'target table t would have a column "x\\ny", {remedy}',
    ]
    store = PostgresStore.__new__(PostgresStore)
    assert store.misfits("t", ["Name", "name", "a b", "é" * 31, "x" * 63]) == []
    assert store.misfits("t", ["é" * 32]) == [
        f"target table t would have the column {'é' * 32}, whose name is too long: 63 bytes at most"
    ]
