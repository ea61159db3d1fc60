"""Notation: what is one value in two notations, and what only looks like it."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from changeover.stores.base.pgtypes import EXACT
from changeover.verifiers.compare.values import FORMS, has_form, notation_only, really_different

SAME_VALUE = [
    ("numeric", "1.50", "1.5"),
    ("numeric", "0.00", "0"),
    ("numeric", "-0", "0"),
    ("numeric", "100", "1e2"),
    ("numeric(50,4)", "1234567890123456789012345678901234567890.1200", "1234567890123456789012345678901234567890.12"),
    ("double precision", "-0.0", "0.0"),
    ("real", "-0.0", "0.0"),
    ("json", '{"a":1,"b":[1,2]}', '{ "b": [1, 2], "a": 1 }'),
    ("json", '{"a":1.50}', '{"a":1.5}'),
    ("json", '"é"', '"\\u00e9"'),
    ("jsonb", '{"a":1,"a":2}', '{"a":2}'),
    ("character(4)", "ab", "ab  "),
    ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("numeric[]", '["1.50",null]', '["1.5",null]'),
    ("character(3)[]", '["a  "]', '["a"]'),
]

OTHER_VALUE = [
    ("numeric", "1.50", "1.51"),
    ("numeric", "1234567890123456789012345678901234567890", "1234567890123456789012345678901234567891"),
    ("numeric", "NaN", "0"),
    ("numeric", "Infinity", "-Infinity"),
    ("numeric", "1_0", "10"),
    ("numeric", "", "0"),
    ("double precision", "0.1", "0.10000000000000002"),
    ("json", '{"a":1}', '{"a":"1"}'),
    ("json", '{"a":1}', '{"a":true}'),
    ("json", '{"a":null}', "{}"),
    ("json", "[1,2]", "[2,1]"),
    ("json", '{"a":1,"a":2}', '{"a":2}'),
    ("json", '{"a":1,"a":2}', '{"a":2,"a":1}'),
    ("json", '{"a":1}', '[["a",1]]'),
    ("json", '["number",1]', "1"),
    ("json", "12345678901234567890123456789012345678901", "12345678901234567890123456789012345678902"),
    ("json", "[" * 100_000, "["),
    ("character(4)", "ab", " ab"),
    ("character(4)", "ab\t", "ab"),
    ("text", "ab", "ab "),
    ("text", "1.50", "1.5"),
    ("character varying(4)", "ab", "ab "),
    ("text", "\u00e9", "e\u0301"),
    ("uuid", "nonsense", "Nonsense"),
    ("text[]", '["NULL"]', "[null]"),
    ("numeric[]", '["1.5",null]', '["1.5"]'),
    ("time without time zone", "24:00:00", "00:00:00"),
]


@pytest.mark.parametrize(("pg_type", "left", "right"), SAME_VALUE)
def test_one_value_in_two_notations(pg_type: str, left: str, right: str) -> None:
    assert notation_only(pg_type, left, right)
    assert notation_only(pg_type, right, left)


@pytest.mark.parametrize(("pg_type", "left", "right"), OTHER_VALUE, ids=range(len(OTHER_VALUE)))
def test_two_values(pg_type: str, left: str, right: str) -> None:
    assert not notation_only(pg_type, left, right)
    assert not notation_only(pg_type, right, left)


@pytest.mark.parametrize("pg_type", sorted(EXACT))
def test_null_is_no_value_of_any_type(pg_type: str) -> None:
    assert notation_only(pg_type, None, None)
    for text in ("", "NULL", "null", "0", "[]", "{}"):
        assert not notation_only(pg_type, None, text)
        assert not notation_only(pg_type, text, None)


@given(st.decimals(allow_nan=False, allow_infinity=False), st.decimals(allow_nan=False, allow_infinity=False))
def test_numbers_meet_exactly_when_they_are_equal(left: Decimal, right: Decimal) -> None:
    assert notation_only("numeric", f"{left:f}", f"{right:f}") == (left == right)


@given(st.text(), st.text())
def test_text_has_one_notation(left: str, right: str) -> None:
    assert notation_only("text", left, right) == (left == right)


@given(st.sampled_from(sorted(FORMS)), st.text(alphabet='0123456789.-+e "{}[]:,abu\\n'))
def test_any_text_at_all_has_a_form(pg_type: str, value: str) -> None:
    assert notation_only(pg_type, value, value)


def test_types_with_notations_are_types_that_are_carried() -> None:
    assert set(FORMS) <= set(EXACT)
    assert has_form("numeric(12,2)[]")
    assert not has_form("timestamp with time zone")


def test_only_real_differences_are_named() -> None:
    source, target = ["1.50", "x", None], ["1.5", "y", "1"]
    types = {"a": "numeric", "b": "text", "c": "numeric"}
    assert really_different(["a", "b", "c"], source, target, types) == ["b", "c"]
