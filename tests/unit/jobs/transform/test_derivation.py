"""Derivations: what is carried is known by construction, whatever its name."""

from __future__ import annotations

import pytest

from changeover.jobs.transform.derivation import Derivation, derivations, mentioned, origin, reference, resolved
from changeover.names import held, nth
from changeover.spec import Table
from changeover.stores.base.pgtypes import Column

SOURCE = [Column(name, "uuid", "string") for name in ("id", "Größe", "a b", "a.b", "tick`ed", "Mixed", "mixed", "plain", "true")]


def table(**columns: str) -> Table:
    return Table("s", "t", ("id",), columns)


def test_every_name_is_carried() -> None:
    assert {name: one.origin for name, one in derivations(table(), SOURCE).items()} == {c.name: c.name for c in SOURCE}
    assert derivations(table(), SOURCE)["tick`ed"].expression == "`tick``ed`"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain", "plain"), (" `plain` ", "plain"), ("PLAIN", "plain"), ("`a b`", "a b"), ("`tick``ed`", "tick`ed"),
        ("`a.b`", "a.b"), ("Mixed", "Mixed"), ("`mixed`", "mixed"), ("MIXED", None), ("true", None), ("`true`", "true"),
        ("nothing", None), ("`a` || `b`", None), ("'plain'", None), ("a.b", None), ("plain + 1", None),
    ],
)  # fmt: skip
def test_a_name_alone_is_a_column_that_goes_on_under_another_one(text: str, found: str | None) -> None:
    made = derivations(table(other=text), SOURCE)
    assert made["other"].origin == found
    assert set(made) == {"other", *(c.name for c in SOURCE if c.name != found)}
    if found is None:
        assert made["other"] == Derivation(text)


def test_after_a_function_nothing_is_known_to_be_what_it_was() -> None:
    shaped = Table("s", "t", ("id",), {"other": "plain"}, function="a:b")
    assert {one.origin for one in derivations(shaped, SOURCE).values()} == {None}
    assert "plain" not in derivations(shaped, SOURCE)
    assert origin(shaped, "id") is None


def test_without_the_source_a_name_stands_for_itself() -> None:
    assert origin(table(other="`a b`"), "other") == "a b"
    assert origin(table(other="upper(id)"), "other") is None
    assert origin(table(), "a b") == "a b"
    assert reference("NULL") is None


def test_an_expression_may_ask_for_what_it_mentions() -> None:
    names = [c.name for c in SOURCE]
    assert mentioned(names, ["upper(ID) || `A B`", "größe > 0"]) == {"id", "a b", "Größe"}
    assert mentioned(names, ["`tick``ed`", "`a.b` = 1"]) == {"tick`ed", "a.b"}


def test_an_expression_means_the_column_whose_name_it_writes_as_it_is() -> None:
    names = held(["Name", "name", "NAME", "id", "a b", "A B"])
    assert names == {"Name": nth(0), "name": nth(1), "NAME": nth(2), "id": "id", "a b": nth(4), "A B": nth(5)}
    text = "upper(Name) || `name` || 'Name' || \"name\" || s.Name || Name (1) || nAME || `a b` || id -- `A B`"
    told = f"upper({nth(0)}) || {nth(1)} || 'Name' || \"name\" || s.Name || Name (1) || nAME || {nth(4)} || id -- {nth(5)}"
    assert resolved(text, names) == told
    assert resolved("it's Name", held(["Name", "other"])) == "it's Name", "every other table's is left as it is"


def test_letters_that_spark_does_not_tell_apart_are_told_apart_by_place() -> None:
    for one, other in (("a", "A"), ("\u017f", "S"), ("\u212a", "k"), ("İ", "i"), ("é", "É")):
        assert held([one, other]) == {one: nth(0), other: nth(1)}
    assert held(["a", "b"]) == {"a": "a", "b": "b"}
