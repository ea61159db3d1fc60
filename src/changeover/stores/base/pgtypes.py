"""Types: how PostgreSQL's values become Spark's and come back, without a loss anywhere.

One table says for each PostgreSQL type which Spark type holds all of its values exactly, and how a
value is read. It is read `native` by the JDBC driver, or as PostgreSQL's own `text`. Spark casts a
text under ANSI rules, so what does not fit (a timestamp infinity, a numeric NaN) is an error with a
name. It is never a changed value. A type whose values Spark can't hold exactly travels as its text
from end to end. The change stream delivers the same text, so snapshot and stream meet in one
decoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column as SparkColumn


@dataclass(frozen=True)
class Column:
    """A column of a target table: PostgreSQL's type by name, and Spark's, in which frames carry it."""

    name: str
    type: str
    spark_type: str
    not_null: bool = False


NATIVE, TEXT, JSON, ARRAY = "native", "text", "json", "array"

NATIVE_ELEMENTS = {"text", "character varying", "integer", "bigint"}
"""Arrays of these come by the JDBC driver as they are; parsing the JSON of any other costs Spark several times as much."""

EXACT: dict[str, tuple[str, str]] = {
    "boolean": ("boolean", NATIVE),
    "smallint": ("smallint", NATIVE),
    "integer": ("int", NATIVE),
    "bigint": ("bigint", NATIVE),
    "real": ("float", NATIVE),
    "double precision": ("double", NATIVE),
    "text": ("string", NATIVE),
    "character varying": ("string", NATIVE),
    "character": ("string", NATIVE),
    "bytea": ("binary", NATIVE),
    "date": ("date", TEXT),
    "timestamp with time zone": ("timestamp", TEXT),
    "timestamp without time zone": ("timestamp_ntz", TEXT),
    # carried as PostgreSQL's text: Spark has no type with the same values
    "uuid": ("string", TEXT),
    "json": ("string", TEXT),
    "jsonb": ("string", TEXT),
    "time without time zone": ("string", TEXT),
    "time with time zone": ("string", TEXT),
    "interval": ("string", TEXT),
    "inet": ("string", TEXT),
    "cidr": ("string", TEXT),
    "macaddr": ("string", TEXT),
    "numeric": ("string", TEXT),
}
"""PostgreSQL type (without modifiers) -> (Spark type, how it is read)."""

TO_POSTGRES = {
    "boolean": "boolean", "tinyint": "smallint", "smallint": "smallint", "int": "integer", "bigint": "bigint",
    "float": "real", "double": "double precision", "string": "text", "binary": "bytea", "date": "date",
    "timestamp": "timestamp with time zone", "timestamp_ntz": "timestamp without time zone",
}  # fmt: skip
"""Spark type of a computed column -> the type of the column that prepare creates for it."""


NESTED = "a nested array or one whose bounds do not begin at 1"
UNHELD = "a value that Spark can't hold"
DATED = re.compile("date|timestamp")


@dataclass(frozen=True)
class SourceType:
    """How one PostgreSQL type is carried: Spark's type, and the form in which it is read."""

    spark: str
    form: str


def source_type(type_name: str) -> SourceType | None:
    """Return how a type is carried (pure).

    Args:
        type_name: The PostgreSQL type, as `format_type` prints it.

    Returns:
        How it is read and which Spark type holds it; None where that is not proven exact.
    """
    if type_name.endswith("[]"):
        element = source_type(type_name.removesuffix("[]"))
        if element is None or element.form in (JSON, ARRAY) or element.spark == "binary":
            return None
        base = re.sub(r"\(\d+\)", "", type_name.removesuffix("[]"))
        return SourceType(f"array<{element.spark}>", ARRAY if base in NATIVE_ELEMENTS else JSON)
    sized = re.fullmatch(r"numeric\((\d+),(\d+)\)", type_name)
    if sized:
        precision, scale = int(sized[1]), int(sized[2])
        return SourceType(f"decimal({precision},{scale})", TEXT) if scale <= precision <= 38 else SourceType("string", TEXT)
    base = re.sub(r"\([^)]*\)", "", type_name)
    if base not in EXACT or (base == "numeric" and type_name != "numeric"):
        return None
    return SourceType(*EXACT[base])


def form_of(type_name: str) -> str:
    """Return the form in which a carried type is read; raises TypeError for one that is not."""
    carried = source_type(type_name)
    if carried is None:
        raise TypeError(f"{type_name} is not carried")
    return carried.form


def postgres_type(spark_type: str) -> str | None:
    """Return the PostgreSQL type that holds a computed column (pure).

    Args:
        spark_type: The column's Spark type.

    Returns:
        The type, None where none does.
    """
    array = re.fullmatch(r"array<(.+)>", spark_type)
    if array:
        element = postgres_type(array[1])
        return f"{element}[]" if element else None
    decimal = re.fullmatch(r"decimal\((\d+),(\d+)\)", spark_type)
    return f"numeric({decimal[1]},{decimal[2]})" if decimal else TO_POSTGRES.get(spark_type)


def moved(value: SparkColumn, type_name: str) -> SparkColumn:
    """Return a value's text as PostgreSQL wrote it, for a column of the same type (lazy).

    So a value that is only moved is neither parsed nor printed on its way, and yet no step takes
    more than another one.

    Args:
        value: The text.
        type_name: The PostgreSQL type, as `format_type` prints it.

    Returns:
        A column of text; it raises for what `decode` would not take.
    """
    from pyspark.sql import functions as F

    if type_name.endswith("[]"):
        return _unless(value.startswith("{{") | value.startswith("["), value, type_name, NESTED)
    if DATED.match(type_name):
        return _dated(value, type_name)
    return _unless(value == F.lit("NaN"), value, type_name, UNHELD) if type_name.startswith("numeric") else value


def unmovable(texts: pa.Array, type_name: str) -> str | None:
    """Return a text of the stream for which `moved` and `decode` would raise (pure, by Arrow).

    The rules are those of `moved`; arrays are JSON, as the stream has them.

    Args:
        texts: The texts, NULLs among them.
        type_name: The PostgreSQL type, as `format_type` prints it.

    Returns:
        The type, the reason and the text as one sentence; None where all can be moved.
    """
    import pyarrow.compute as pc

    refused = UNMOVABLE[_family(type_name)]
    if refused is None:
        return None
    pattern, problem = refused
    bad = texts.filter(pc.match_substring_regex(texts, pattern))
    return f"{type_name}: {problem}: {bad[0].as_py()}" if len(bad) else None


def _family(type_name: str) -> str:
    if type_name.endswith("[]"):
        return "array"
    dated = DATED.match(type_name)
    if dated is not None:
        return dated[0]
    carried = source_type(type_name)
    return "decimal" if carried is not None and carried.spark.startswith("decimal") else "other"


UNMOVABLE: dict[str, tuple[str, str] | None] = {
    "array": (r"^\[\[", NESTED),
    "date": ("(infinity|BC)$", UNHELD),
    "timestamp": ("(infinity|BC)$|^(29424[7-9]|2942[5-9][0-9]|294[3-9][0-9]{2}|29[5-9][0-9]{3}|[3-9][0-9]{5})-", UNHELD),
    "decimal": ("^NaN$", UNHELD),
    "other": None,
}
"""Family of types -> what no text of theirs may look like, and why."""


def passable(type_name: str) -> bool:
    """Return whether a value goes on in PostgreSQL's text with nothing lost of what `decode` checks.

    Args:
        type_name: The PostgreSQL type, as `format_type` prints it.

    Returns:
        Whether it does (pure).
    """
    carried = source_type(type_name)
    return carried is not None and (not type_name.endswith("[]") or movable(type_name))


def movable(type_name: str) -> bool:
    """Return whether moving the text of a type saves work, and shows unparsed what `decode` refuses.

    Args:
        type_name: The PostgreSQL type, as `format_type` prints it.

    Returns:
        Whether it does (pure).
    """
    if type_name.endswith("[]"):  # an element's infinity or NaN does not show
        element = source_type(type_name.removesuffix("[]"))
        return element is not None and not DATED.match(element.spark) and not element.spark.startswith("decimal")
    carried = source_type(type_name)
    return carried is not None and carried.spark not in {"string", "binary", "boolean", "smallint", "int", "bigint"}


def decode(value: SparkColumn, type_name: str, *, native: bool) -> SparkColumn:
    """Return a column decoded from its read form (lazy).

    Args:
        value: The column as it was read.
        type_name: The PostgreSQL type, as `format_type` prints it.
        native: Whether the JDBC driver has decoded it; else it is text as the change stream has it.

    Returns:
        A column of the type's Spark type; it raises for what that can't hold.
    """
    from pyspark.sql import functions as F

    carried = source_type(type_name)
    if carried is None:
        raise TypeError(f"{type_name} is not carried")
    if native and carried.form in (NATIVE, ARRAY):
        # the cast takes from a char(n) what the JDBC reader says of it, by which Spark would pad what it is compared with
        return value.cast("string") if carried.spark == "string" else value
    if carried.form in (JSON, ARRAY):
        texts = re.sub(r"<[^<>]+>", "<string>", carried.spark)
        # an array of arrays would read as texts; no other JSON of ours begins so
        flat = _unless(value.startswith("[["), value, type_name, NESTED)
        # the JSON is written by PostgreSQL or by the capture, so a failure is ours and must be loud
        elements = F.from_json(flat, texts, {"mode": "FAILFAST"})
        if DATED.match(type_name):
            elements = F.transform(elements, lambda element: _dated(element, type_name))
        return elements.cast(carried.spark)
    if carried.spark == "binary":
        return F.unhex(F.substring(value, 3, 2147483647))
    if DATED.match(type_name):
        value = _dated(value, type_name)
    return value.cast(carried.spark) if carried.spark != "string" else value


def _dated(text: SparkColumn, type_name: str) -> SparkColumn:
    """Return the text of a date or timestamp; raises for one that no cast may see, because Spark holds it not or otherwise.

    Spark reads `0044-03-15 BC` as a day of the year 44, and its timestamps end in the year 294247.
    """
    from pyspark.sql import functions as F

    refused = text.endswith("infinity") | text.endswith("BC")
    if not type_name.startswith("date"):
        refused = refused | ((text >= F.lit("294247")) & (F.substring(text, 7, 1) == F.lit("-")))
    return _unless(refused, text, type_name, UNHELD)


def _unless(refused: SparkColumn, text: SparkColumn, type_name: str, problem: str) -> SparkColumn:
    """Return a text, or NULL, and raise where it is refused."""
    from pyspark.sql import functions as F

    reason = F.concat(F.lit(f"[NOT_CARRIED] {type_name}: {problem}: "), text)
    return F.when(~refused, text).when(refused, F.raise_error(reason).cast("string"))
