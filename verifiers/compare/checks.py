"""The spec's own checks: a pair of queries, each run by its own side's engine, whose results must be equal.

A transform that is verified by itself proves little; two queries that a person wrote for two schemas prove more. Rows are
compared as a multiset, because no side owes an order. A query that fails leaves the question open, which is `CouldNotCheck`.
"""

from __future__ import annotations

import decimal
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from changeover.errors import CouldNotCheck, DatabaseFailed
from changeover.spec import Check
from changeover.stores.base.interface import Frozen
from changeover.verifiers.compare.verdict import CheckResult

EXACT = decimal.Context(prec=decimal.MAX_PREC, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
"""Takes trailing zeros from a number of any length; Python's own context would round it to 28 digits."""


def run(table: str, checks: Sequence[Check], old: Frozen, new: Frozen) -> list[CheckResult]:
    """Run every check of a table on both frozen sides (driver).

    Args:
        table: The table, for messages.
        checks: The spec's checks of it.
        old: The source, frozen.
        new: The target, frozen.

    Returns:
        One result a check, in their order.

    Raises:
        CouldNotCheck: A query fails.
    """
    return [_compare(check, _rows(table, check, "source", old), _rows(table, check, "target", new)) for check in checks]


def _rows(table: str, check: Check, side: str, frozen: Frozen) -> list[tuple[Any, ...]]:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        return frozen.query(check.source if side == "source" else check.target)
    except (DatabaseFailed, PySparkException, Py4JError) as error:
        message = error.problem if isinstance(error, DatabaseFailed) else str(error).strip().partition("\n")[0]
        problem = f"the {side}'s query of the check {check.name} failed ({message}): correct it in the spec"
        raise CouldNotCheck(table, problem) from error


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
        number = Decimal(str(value))
        return EXACT.normalize(number) if number else Decimal(0)
    if isinstance(value, list | tuple):
        return [_value(element) for element in value]
    return str(value) if isinstance(value, UUID) else value
