"""Names: how a user's column or table of any name stands beside ours, in Spark, in the catalogue, in a spec and in a folder.

Whatever PostgreSQL takes for a name may have been taken. So everything of ours that can stand
beside a user's columns bears one reserved prefix. Frames of ours know columns by their positions.
Every spelling has one reader: two tables are never one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from changeover.errors import UsageError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

NAME_BYTES = 63
"""PostgreSQL cuts a longer identifier (Lexical Structure, Identifiers and Key Words)."""

MARKER_PREFIX = "changeover"
"""The prefix of what we write into a store's write-ahead log."""

RESERVED = "_changeover_"
"""What the names of ours begin with that can stand beside a user's columns; `check` refuses a user's, in whatever case."""


def folded(name: str) -> str:
    """Return what is left of a name in Spark and Delta, which do not tell upper from lower case (pure).

    Some letters meet here that they tell apart; none of those that meet there is told apart.

    Args:
        name: The name.

    Returns:
        The folded name, for comparing alone.
    """
    return name.replace("İ", "i").upper().casefold()


def reserved(name: str) -> bool:
    """Return whether a column's name is one of ours (pure).

    Args:
        name: The column's name.

    Returns:
        True where it begins as ours do, in any case.
    """
    return folded(name).startswith(RESERVED)


def quoted(name: str) -> str:
    """Return a column's name as Spark SQL quotes it (pure).

    Args:
        name: The column's name.

    Returns:
        The name in backquotes.
    """
    return "`" + name.replace("`", "``") + "`"


def nth(number: int) -> str:
    """Return the name under which the column at a place stands in a frame of ours (pure).

    Args:
        number: The column's place, from 0.

    Returns:
        The name.
    """
    return f"{RESERVED}{number}"


def placed(frame: DataFrame, names: Sequence[str]) -> DataFrame:
    """Return the frame with its columns of these names, as they are written, under their places; others keep theirs (driver).

    Nothing is looked up by name, so names may hold dots and quotes, and may differ in case alone.

    Args:
        frame: The frame.
        names: The columns' names; the place in this sequence is the column's.

    Returns:
        A frame with other names and the same rows.
    """
    places = {name: nth(number) for number, name in enumerate(names)}
    return frame.toDF(*(places.get(name, name) for name in frame.columns))


def chosen(frame: DataFrame, names: Sequence[str]) -> DataFrame:
    """Return the columns of these names, as they are written, in that order and by their places (driver).

    Args:
        frame: The frame.
        names: The columns' names.

    Returns:
        A frame whose columns bear the names of their places.
    """
    return placed(frame, names).select(*map(nth, range(len(names))))


def held(names: Sequence[str]) -> dict[str, str]:
    """Return by which name Spark finds each column: its own, or where it differs from another in case alone its place (pure).

    Args:
        names: All columns' names, in order.

    Returns:
        Each column's name as it is written, and the one that Spark finds.
    """
    times = Counter(map(folded, names))
    return {name: nth(number) if times[folded(name)] > 1 else name for number, name in enumerate(names)}


def hold(frame: DataFrame, names: Mapping[str, str]) -> DataFrame:
    """Return the frame with its columns by other names, as `held` has them; others keep theirs (driver).

    Args:
        frame: The frame.
        names: The other name of each column.

    Returns:
        The frame itself where no name differs.
    """
    return frame.toDF(*(names.get(name, name) for name in frame.columns)) if any(n != names[n] for n in names) else frame


def segment(name: str) -> str:
    """Return a table's name as one segment of a path, another one for every name (pure).

    It is percent-encoded, but with a tilde for the percent sign, which delta-rs decodes once more
    when it reads a table.

    Args:
        name: The table's name.

    Returns:
        The segment, in ASCII.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", lambda match: "".join(f"~{byte:02X}" for byte in match[0].encode()), name)
    return f"~2E{safe[1:]}" if safe.startswith(".") else safe


PART = re.compile(r'"(?P<quoted>(?:[^"]|"")+)"|(?P<plain>[^".][^.]*)')


def qualified(name: str) -> tuple[str, str]:
    """Split ``schema.table``; without a schema it is ``public`` (pure).

    A part is taken as it is, upper and lower case too. One that holds a dot, or begins with a
    double quote, stands in double quotes as in SQL: ``public."a.b"``.

    Args:
        name: The table's name.

    Returns:
        (schema, table), without quotes.

    Raises:
        UsageError: The text names no table.
    """
    parts, at = [], 0
    while (match := PART.match(name, at)) is not None:
        parts.append(match["plain"] or match["quoted"].replace('""', '"'))
        at = match.end() + 1
        if name[match.end() : at] != ".":
            break
    if at <= len(name) or "\0" in name or len(parts) not in (1, 2):
        raise UsageError(f'{name!r} names no table: write schema.table, a part with a dot or a quote in it as in public."a.b"')
    return (parts[0], parts[1]) if len(parts) == 2 else ("public", parts[0])


def joined(schema: str, name: str) -> str:
    """Return the one spelling of a table's name, which `qualified` reads back; no two tables share one (pure).

    Args:
        schema: The schema.
        name: The table.

    Returns:
        The spelling, schema first.
    """
    return f"{part(schema)}.{part(name)}"


def part(text: str) -> str:
    """Return a name as one part of a table's (pure).

    Args:
        text: A schema or a table.

    Returns:
        The part, in double quotes where it needs them.
    """
    return '"' + text.replace('"', '""') + '"' if "." in text or text.startswith('"') else text
