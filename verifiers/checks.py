"""The spec's own checks: a pair of queries, each run by its own side's engine, whose results must be equal.

A transform that is verified by itself proves little; two queries that a person wrote for two schemas prove more. Rows are
compared as a multiset, because no side owes an order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from changeover.spec import Check
from changeover.stores import Frozen
from changeover.verifiers.verdict import CheckResult


def run(checks: Sequence[Check], old: Frozen, new: Frozen) -> list[CheckResult]:
    """Run every check on both frozen sides (driver)."""
    return [_compare(check, old.query(check.source), new.query(check.target)) for check in checks]


def _compare(check: Check, old: list[tuple[Any, ...]], new: list[tuple[Any, ...]]) -> CheckResult:
    left, right = Counter(map(_plain, old)), Counter(map(_plain, new))
    only = sorted([*(left - right), *(right - left)])
    first = f"{'source' if only[0] in left - right else 'target'} alone: {only[0]}" if only else None
    return CheckResult(check.name, not only, len(old), len(new), first)


def _plain(row: tuple[Any, ...]) -> str:
    """Return a row as text that two drivers agree on: numbers by value, moments in UTC."""
    return repr(tuple(_value(value) for value in row))


def _value(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    if isinstance(value, Decimal | float | int) and not isinstance(value, bool):
        return str(Decimal(str(value)).normalize())
    return value
