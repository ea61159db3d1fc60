"""Values: when two of them are the same, when they are the same but for notation, and how they read as text.

`same` is exact: typed and null-safe, it tells NULL from '', and one zero from the other. What it
calls different may still be one value in two notations (1.50 and 1.5, the key order of json).
`form` says so for the types that have notations, in plain Python over the text of the few values
that differ. Where a text can't be read as its type says, its form is the text itself, so a doubt is
a difference and never an equality.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column

NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
FLOATING = re.compile(r"\b(float|double)\b")


def same(left: Column, right: Column, spark_type: str) -> Column:
    """Return whether two values of one Spark type are exactly the same; NULL is the same as NULL, NaN as NaN (task)."""
    from pyspark.sql import functions as F

    equal = left.eqNullSafe(right)
    if not FLOATING.search(spark_type):
        return equal
    # Spark's equality ignores the sign of zero; where it holds, the texts differ by that sign alone.
    signs = text(left, spark_type).eqNullSafe(text(right, spark_type))
    if spark_type in ("float", "double"):
        return equal & ((left != F.lit(0)) | signs)
    return equal & signs


def text(value: Column, spark_type: str) -> Column:
    """Return a value as text that no other value of its type has; NULL stays NULL (task)."""
    from pyspark.sql import functions as F

    if spark_type == "binary":
        return F.concat(F.lit("\\x"), F.lower(F.hex(value)))
    if spark_type.startswith("array<"):
        texts = re.sub(r"<[^<>]+>", "<string>", spark_type)
        return F.to_json(value.cast(texts), {"ignoreNullFields": "false"})
    return value.cast("string")


def has_form(pg_type: str) -> bool:
    """Return whether a PostgreSQL type has more than one notation for a value."""
    return _base(pg_type) in FORMS


def notation_only(pg_type: str, left: str | None, right: str | None) -> bool:
    """Return whether two texts are one value of a PostgreSQL type in two notations."""
    if left is None or right is None:
        return left is right
    return left == right or form(pg_type, left) == form(pg_type, right)


def form(pg_type: str, value: str) -> object:
    """Return what is left of a value without its notation; only `==` between forms of one type means anything."""
    read = FORMS.get(_base(pg_type))
    if read is None:
        return value
    try:
        if pg_type.endswith("[]"):
            return _elements(json.loads(value), read)
        return read(value)
    except (ValueError, ArithmeticError, RecursionError):
        return value


def really_different(
    columns: Sequence[str],
    source: Sequence[str | None],
    target: Sequence[str | None],
    pg_types: Mapping[str, str],
) -> list[str]:
    """Return those of the differing columns, given with both sides' values, that differ in more than notation (task)."""
    return [
        name for name, left, right in zip(columns, source, target, strict=True) if not notation_only(pg_types[name], left, right)
    ]


def _base(pg_type: str) -> str:
    """``character(4)[]`` -> ``character``."""
    return re.sub(r"\([^)]*\)|(\[\])+$", "", pg_type)


def _elements(values: object, read: Callable[[str], object]) -> object:
    if isinstance(values, list):
        return [_elements(value, read) for value in values]
    return read(values) if isinstance(values, str) else values


def _number(value: str) -> object:
    """Decimal's constructor and comparison are exact at any length, its arithmetic is not."""
    if not NUMBER.fullmatch(value):
        return value
    return ("number", Decimal(value))


def _float(value: str) -> object:
    """Read a float, which its text names exactly, so that only the zeros meet."""
    return float(value)


def _json(value: str) -> object:
    return json.loads(value, parse_int=_number, parse_float=_number, object_pairs_hook=_object, parse_constant=_refuse)


def _jsonb(value: str) -> object:
    """As PostgreSQL stores it: of a key that stands twice, the last one counts."""
    return json.loads(
        value, parse_int=_number, parse_float=_number, parse_constant=_refuse,
        object_pairs_hook=lambda pairs: _object(list(dict(pairs).items())),
    )  # fmt: skip


def _object(pairs: list[tuple[str, object]]) -> object:
    return ("object", sorted(pairs, key=lambda pair: pair[0]))


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _unpadded(value: str) -> object:
    return value.rstrip(" ")


FORMS: dict[str, Callable[[str], object]] = {
    "numeric": _number,
    "real": _float,
    "double precision": _float,
    "json": _json,
    "jsonb": _jsonb,
    "character": _unpadded,
    "uuid": uuid.UUID,
}
"""PostgreSQL type, without modifiers, that has more than one notation for a value -> how a text is read."""
