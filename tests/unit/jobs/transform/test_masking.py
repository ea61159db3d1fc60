"""Masking: what is computed from a sensitive column is hidden too, a key shows as a hash, NULL stays NULL."""

from __future__ import annotations

import pytest

from changeover.jobs.transform.derivation import Derivation
from changeover.jobs.transform.masking import MASK, hashed, of_source, of_target
from changeover.spec import Table

TEXTS = {"id": "`id`", "mail": "lower(Email)", "odd": "`e.mail`", "paid": "paid", "emails": "emails + 1"}
DERIVED = {name: Derivation(text) for name, text in TEXTS.items()}


def table(*sensitive: str, function: str | None = None) -> Table:
    return Table("public.t", "t", ("id",), sensitive=sensitive, function=function)


@pytest.mark.parametrize(
    ("sensitive", "hidden"),
    [
        ((), set()),
        (("email",), {"mail", "email"}),
        (("e.mail",), {"odd", "e.mail"}),
        (("id",), {"id"}),
        (("ID", "paid"), {"id", "ID", "paid"}),
    ],
)
def test_a_column_is_hidden_with_what_is_computed_from_it(sensitive: tuple[str, ...], hidden: set[str]) -> None:
    assert of_target(table(*sensitive), DERIVED).columns == hidden


def test_where_a_function_makes_the_rows_all_are_hidden() -> None:
    assert of_target(table("email", function="m:f"), DERIVED).columns == {*DERIVED, "email"}


def test_a_key_is_a_hash_by_which_its_row_is_found_again() -> None:
    mask = of_target(table("id", "email"), DERIVED)
    assert mask.row({"id": "7", "mail": "a@x", "paid": "1", "email": None}) == {
        "id": hashed("7"), "mail": MASK, "paid": "1", "email": None,
    }  # fmt: skip
    assert hashed("7") == "sha256:7902699be42c"
    assert of_source(table("id"), ("id",)).shown("id", 7) == hashed("7")
