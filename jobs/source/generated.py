"""Generated columns: they are computed where they are written, never carried; a spec that speaks of one is told what to write.

Stored ones are left out of the change stream, and virtual ones are nowhere (PostgreSQL, Generated Columns). To the rest of the
pipeline a source's are no columns, so one that nobody asks for disturbs nothing; a target's are filled by its own server.
"""

from __future__ import annotations

import json
import re

from changeover.errors import SpecError
from changeover.session import Connection
from changeover.spec import Spec, Table

GENERATED = """
SELECT a.attname, pg_get_expr(d.adbin, d.adrelid)
FROM pg_attribute a JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = %s AND a.attgenerated <> '' AND NOT a.attisdropped
"""

LITERAL = re.compile(r"'(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.)*\"")
"""A text in Spark SQL, which may say anything."""


def generated_of(connection: Connection, oid: int) -> dict[str, str]:
    """Return a table's generated columns, each with its expression in PostgreSQL's own words."""
    return {row[0]: row[1] for row in connection.execute(GENERATED, [oid]).fetchall()}


def require_not_asked_for(spec: Spec, table: Table, name: str, expression: str) -> None:
    """Raise SpecError where a table's section speaks of a generated column (pure).

    Its values reach nobody.

    Args:
        spec: The migration's spec.
        table: The table of the spec.
        name: The generated column.
        expression: Its expression, in PostgreSQL's words.

    Raises:
        SpecError: The section speaks of it.
    """
    speaks = re.compile(rf"(?<![\w.])`?{re.escape(name)}`?(?!\w|\s*\()", re.IGNORECASE)
    texts = [(f"columns.{column}", text) for column, text in table.columns.items()] + [("where", table.where or "")]
    texts += [("key", column) for column in table.key if column not in table.columns]
    for where, text in texts:
        if speaks.search(LITERAL.sub("", text)):
            raise SpecError(
                spec.path, f"table {table.source}: {where}",
                f"{name} is a generated column of {table.source}, which the change stream does not carry: write what it is made of"
                f" in [table.columns], which in PostgreSQL's words is {name} = {json.dumps(expression, ensure_ascii=False)}",
            )  # fmt: skip
    if name in table.drop:
        raise SpecError(spec.path, f"table {table.source}: drop", f"{name} is a generated column, which is left out by itself")
