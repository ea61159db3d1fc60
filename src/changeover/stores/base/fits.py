"""Fits: whether one column's type holds every value of another's, exactly, as the values travel here (pure).

`holds` answers for PostgreSQL's types as `format_type` prints them, `lake_holds` for Spark's in a Delta table. In doubt the
answer is no: what is carried into such a type would change in silence, by the same cast on both sides of a comparison.
`refuses` is the weaker question, whether what does not fit is at least an error: then nothing is lost unseen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

INTEGERS: Mapping[str, int] = {"smallint": 5, "integer": 10, "bigint": 19}
"""Whole numbers, each of which holds those before it, with the digits of its greatest."""

SIXTHS = frozenset(
    {"timestamp with time zone", "timestamp without time zone", "time with time zone", "time without time zone", "interval"}
)
"""Types whose modifier is a number of digits after the second's point, six without one."""

AS_TEXT: Mapping[str, int] = {"boolean": 5, "smallint": 6, "integer": 11, "bigint": 20, "uuid": 36}
"""Types that reach a text as PostgreSQL itself writes them, with the longest one."""

LONG_TEXTS = frozenset(
    {"json", "jsonb", "numeric", "inet", "cidr", "macaddr", "interval", "time without time zone", "time with time zone"}
)
"""Types that travel as PostgreSQL's text from end to end, and have no short longest one."""

FLOATS = {"smallint": {"real", "double precision"}, "integer": {"double precision"}, "real": {"double precision"}}
"""Numbers that binary floating point holds exactly."""

LAKE_INTEGERS = {"tinyint": 3, "smallint": 5, "int": 10, "bigint": 19}
LAKE_FLOATS = {"tinyint": {"float", "double"}, "smallint": {"float", "double"}, "int": {"double"}, "float": {"double"}}


@dataclass(frozen=True)
class _Type:
    """A type's name without modifiers, and the modifiers."""

    base: str
    modifiers: tuple[int, ...] = ()


def holds(source: str, target: str) -> bool:
    """Return whether the target type holds every value of the source type as it is (pure).

    Args:
        source: The source's type, as `format_type` prints it.
        target: The target's type, as `format_type` prints it.

    Returns:
        Whether it does; in doubt not.
    """
    if source == target:
        return True
    if source.endswith("[]") or target.endswith("[]"):
        both = source.endswith("[]") and target.endswith("[]")
        # an element's text is made by Spark, so only what Spark writes as the server does may become one
        return both and _alike(source[:-2], target[:-2])
    return _holds(_read(source), _read(target))


def _alike(source: str, target: str) -> bool:
    """Return whether an array's elements fit without becoming another kind of value."""
    given, wanted = _read(source), _read(target)
    texts = {"text", "character varying"}
    kindred = given.base == wanted.base or {given.base, wanted.base} <= texts or {given.base, wanted.base} <= set(INTEGERS)
    return kindred and _holds(given, wanted)


def _holds(given: _Type, wanted: _Type) -> bool:
    if wanted.base in ("text", "character varying"):
        return _in_text(given, wanted.modifiers)
    if given.base in INTEGERS and wanted.base in INTEGERS:
        return INTEGERS[given.base] <= INTEGERS[wanted.base]
    if wanted.base == "numeric":
        return _in_numeric(given, wanted.modifiers)
    if given.base == wanted.base and given.base in SIXTHS:
        return _sixths(given) <= _sixths(wanted)
    if given.base == wanted.base == "character":
        return given.modifiers <= wanted.modifiers
    return given == wanted or wanted.base in FLOATS.get(given.base, ())


def _in_text(given: _Type, limit: tuple[int, ...]) -> bool:
    """A char(n) is not wanted: its pad, which means nothing there, would be part of the text."""
    if given.base == "character varying" and given.modifiers:
        return not limit or given.modifiers <= limit
    if given.base in AS_TEXT:
        return not limit or AS_TEXT[given.base] <= limit[0]
    return not limit and given.base in {"text", "character varying", *LONG_TEXTS}


def _in_numeric(given: _Type, limit: tuple[int, ...]) -> bool:
    if given.base in INTEGERS:
        return not limit or INTEGERS[given.base] <= limit[0] - limit[1]
    if given.base != "numeric" or not limit:
        return given.base == "numeric"
    if not given.modifiers:
        return False
    return given.modifiers[1] <= limit[1] and given.modifiers[0] - given.modifiers[1] <= limit[0] - limit[1]


def _sixths(given: _Type) -> int:
    return given.modifiers[0] if given.modifiers else 6


def _read(name: str) -> _Type:
    """``numeric(12,4)`` -> numeric, (12, 4); ``timestamp(3) with time zone`` -> timestamp with time zone, (3,)."""
    match = re.search(r"\(([-\d, ]+)\)", name)
    if match is None:
        return _Type(name)
    return _Type(name[: match.start()] + name[match.end() :], tuple(int(part) for part in match[1].split(",")))


def refuses(source: str, target: str) -> bool:
    """Return whether a value of the source type fits the target type as it is, or is an error (pure).

    Args:
        source: The source's type, as `format_type` prints it.
        target: The target's type, as `format_type` prints it.

    Returns:
        Whether no value is changed in silence.
    """
    given, wanted = _read(source), _read(target)
    if holds(source, target) or (given.base in INTEGERS and wanted.base in INTEGERS):
        return True
    if given.base == wanted.base == "numeric" and given.modifiers and wanted.modifiers:
        return given.modifiers[1] <= wanted.modifiers[1]
    return False


def lake_holds(source: str, target: str) -> bool:
    """Return whether a lake's type holds every value of another Spark type as it is (pure).

    Args:
        source: The source's Spark type.
        target: The Spark type of the lake's column.

    Returns:
        Whether it does; in doubt not.
    """
    if source == target:
        return True
    arrays = re.fullmatch(r"array<(.+)>", source), re.fullmatch(r"array<(.+)>", target)
    if arrays[0] and arrays[1]:
        return lake_holds(arrays[0][1], arrays[1][1])
    if source in LAKE_INTEGERS and target in LAKE_INTEGERS:
        return LAKE_INTEGERS[source] <= LAKE_INTEGERS[target]
    decimal = re.fullmatch(r"decimal\((\d+),(\d+)\)", target)
    if decimal is None:
        return target in LAKE_FLOATS.get(source, ())
    limit = int(decimal[1]), int(decimal[2])
    given = re.fullmatch(r"decimal\((\d+),(\d+)\)", source)
    own = (LAKE_INTEGERS.get(source), 0) if given is None else (int(given[1]), int(given[2]))
    return own[0] is not None and own[1] <= limit[1] and own[0] - own[1] <= limit[0] - limit[1]


def loss(name: str, source: str, target: str, spark_type: str) -> str | None:
    """Return an expression that makes of a column what the target type holds (pure).

    Args:
        name: The column, as Spark SQL.
        source: The source's type, as `format_type` prints it.
        target: The target's type, as `format_type` prints it.
        spark_type: The target's Spark type, empty where it has none.

    Returns:
        The expression, in Spark SQL; None where no short one does.
    """
    given, wanted = _read(source), _read(target)
    if wanted.base in ("text", "character varying", "character") and given.base in ("text", "character varying", "character"):
        whole = f"rtrim({name})" if given.base == "character" else name
        return f"substring({whole}, 1, {wanted.modifiers[0]})" if wanted.modifiers else whole
    if given.base == wanted.base and given.base.startswith("timestamp"):
        return f"date_trunc('{'millisecond' if _sixths(wanted) >= 3 else 'second'}', {name})"
    if given.base == wanted.base or not spark_type:
        return f"cast({name} as {spark_type})" if given.base == "numeric" else None
    return f"cast({name} as {spark_type})"
