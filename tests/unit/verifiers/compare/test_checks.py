"""Checks: two engines' answers are compared by value, exactly, as multisets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from changeover.errors import CouldNotCheck, DatabaseFailed
from changeover.spec import Check
from changeover.stores.base.interface import Frozen
from changeover.verifiers.compare.checks import run

Rows = list[tuple[Any, ...]]
ONE = UUID("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")
NOON = datetime(2024, 3, 1, 12, 0, 0, 1, tzinfo=UTC)


def answers(rows: Rows) -> Frozen:
    """Return a state whose every query has one answer."""
    return Frozen("here", (), lambda keys: pytest.fail("no frame is asked for"), lambda text: rows, lambda: True)


def equal(old: Rows, new: Rows) -> bool:
    (result,) = run("public.t", [Check("c", "SELECT 1", "SELECT 2")], answers(old), answers(new))
    assert (result.first_difference is None) == result.equal
    return result.equal


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Decimal("1.50"), Decimal("1.5")), (3, 3.0), (3, Decimal("3.00")), (100, Decimal("1E+2")), (0.0, -0.0),
        (float("nan"), Decimal("NaN")), (NOON, NOON.astimezone(timezone(timedelta(hours=9)))), (NOON, NOON.replace(tzinfo=None)),
        ([Decimal("1.0"), None], [1, None]), (ONE, str(ONE)), (None, None),
    ],
)  # fmt: skip
def test_one_value_of_two_drivers_is_equal(left: Any, right: Any) -> None:
    assert equal([(left,)], [(right,)])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Decimal("1234567890123456789012345678901.5"), Decimal("1234567890123456789012345678901.6")),
        (10**40, 10**40 + 1), (NOON, NOON.replace(microsecond=2)), (None, ""), (None, 0), (True, 1), ("1", 1), ([1, 2], [2, 1]),
    ],
)  # fmt: skip
def test_two_values_are_not(left: Any, right: Any) -> None:
    assert not equal([(left,)], [(right,)])


def test_rows_have_no_order_but_a_number() -> None:
    assert equal([(1,), (2,), (2,)], [(2,), (1,), (2,)])
    assert not equal([(1,), (2,), (2,)], [(2,), (1,), (1,)])
    assert not equal([(1,), (2,)], [(1,), (2,), (2,)])


def test_a_query_that_fails_names_check_side_and_table() -> None:
    def refused(text: str) -> Rows:
        raise DatabaseFailed("host/db", "running a check of the spec", "column x does not exist")

    broken = Frozen("here", (), lambda keys: pytest.fail("no frame is asked for"), refused, lambda: True)
    with pytest.raises(CouldNotCheck, match=r"could not check public\.t: the target's query of the check c failed \(column x"):
        run("public.t", [Check("c", "SELECT 1", "SELECT 2")], answers([(1,)]), broken)
