"""Encodings: whether every text of the old store has a place in the new one, asked by `check`.

Everything of ours is UTF-8. A server whose encoding is SQL_ASCII has none: it keeps whatever bytes it was given. So its texts are
read once, as bytes, and rows that are no UTF-8 are named by their keys. Any other server converts what it sends.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from changeover.errors import CouldNotFinish
from changeover.jobs.transform.masking import Mask
from changeover.session import NO_ENCODING, Connection, connect, has_no_encoding, speaking_to
from changeover.stores.base.reader import ReadTable

HOLDS_ALL = frozenset({"UTF8", NO_ENCODING})
TEXTUAL = ("text", "character", "json", "xml", "citext")
"""What the names of types begin with whose values may hold any byte."""

NAMED = 3
"""How many rows are named of those that are no text."""


def target_reasons(old: str, new: str, target: str) -> list[str]:
    """Return why a target of one encoding can't hold the texts of a source of another (pure)."""
    if new in HOLDS_ALL or new == old:
        return []
    return [
        f"target {target} has the encoding {new}, which has no place for every text of the old store's {old}: name a database"
        " that was made with ENCODING 'UTF8'"
    ]


def notes(old: str, new: str, target: str) -> list[str]:
    """Return what can't come back once the new store takes writes (pure)."""
    if old in HOLDS_ALL or new == old:
        return []
    return [f"the old store has the encoding {old}: a text that target {target} takes and {old} has no place for can't come back"]


def unreadable(old: Connection, dsn: str, application: str, read: ReadTable, mask: Mask) -> list[str]:
    """Return which rows of a table hold bytes that are no UTF-8 (driver).

    All of its texts are read where the server has no encoding; a table that can't be read says so in its place.
    """
    if not has_no_encoding(old):
        return []
    try:
        return _unreadable(dsn, application, read, mask)
    except CouldNotFinish as error:
        return [str(error)]


def _unreadable(dsn: str, application: str, read: ReadTable, mask: Mask) -> list[str]:
    key = [column.name for column in read.key]
    names = [*key, *(c.name for c in read.columns if c.type.startswith(TEXTUAL) and c.name not in key)]
    query = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(sql.SQL(", ").join(map(sql.Identifier, names)), read.rows)
    with (
        connect(dsn, application, settings={"client_encoding": NO_ENCODING}) as session,
        speaking_to(dsn, f"reading the texts of {read.name}"),
        session.cursor() as cursor,
        cursor.copy(query) as lines,
    ):
        bad_rows = [_named(bytes(line), key, names, mask) for line in lines if not _is_text(bytes(line))]
    if not bad_rows:
        return []
    which = "; ".join(bad_rows[:NAMED]) + (f" and {len(bad_rows) - NAMED:,} more" if len(bad_rows) > NAMED else "")
    return [f"{read.schema}.{read.name} holds bytes that are no UTF-8, and no target takes them: {which}: correct them"]


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _named(raw: bytes, key: Sequence[str], names: Sequence[str], mask: Mask) -> str:
    values = raw.rstrip(b"\n").split(b"\t")
    texts = {name: value.decode(errors="backslashreplace") for name, value in zip(key, values, strict=False)}
    where = ", ".join(f"{name} = {text}" for name, text in mask.row(texts).items())
    wrong = [name for name, value in zip(names, values, strict=False) if not _is_text(value)]
    return f"{', '.join(wrong)} of the row with {where}"
