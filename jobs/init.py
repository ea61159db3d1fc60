"""Init: a spec for a live table, ready to be edited.

Names and key are the catalogue's, each column stands there as a comment that says what holds without it, and there is no secret in
it. Runs on the driver, changes nothing.
"""

from __future__ import annotations

import json
import re

from changeover.errors import Refused
from changeover.jobs.ledger.records import SourceColumn
from changeover.jobs.source.catalog import source_table
from changeover.names import joined, part, qualified
from changeover.secret import secret
from changeover.session import application_name, connect
from changeover.spec import IDENTIFIER, Table


def draft(dsn: str, table: str) -> str:
    """Return a spec for a live table, ready to be edited: names and key from the catalogue, no secret (driver).

    Args:
        dsn: The old store's DSN without a password, or `env:NAME`.
        table: The table, as schema.table.

    Returns:
        The spec's text, in TOML.

    Raises:
        Refused: The table is not there, or has no key.
        SpecError: The DSN has a password in it, or is none.
        SecretMissing: The environment variable of the DSN is not set.
        ServerUnavailable: The old store can't be reached.
    """
    schema, name = qualified(table)
    source = joined(schema, name)
    with connect(secret("init", "dsn", dsn).resolve(), application_name("init", "init")) as old:
        live = source_table(old, Table(source, source, ()))
    if live is None:
        raise Refused(f"init: there is no table {source} in that database: name it as schema.table")
    if not live.identity:
        raise Refused(f"init: {source} has no primary key and no replica identity with a key: add one first")
    key = ", ".join(toml(column) for column in live.identity)
    columns = "\n".join(_drafted(column) for column in live.columns)
    return DRAFT.format(
        name=_migration_name(name), dsn=toml(dsn), source=toml(source), table=toml(part(name)), key=key,
        columns=columns,
    )  # fmt: skip


def _migration_name(table: str) -> str:
    """Return a name that a spec may have, since it becomes part of a slot's name."""
    plain = re.sub(r"[^a-z0-9_]", "_", table.lower())
    return (plain if re.match("[a-z]", plain) else f"t{plain}")[:40]


def toml(text: str) -> str:
    """Return a TOML string, whose escapes are JSON's but for DEL, which may not stand there as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _drafted(column: SourceColumn) -> str:
    """Return a column's line: a comment that says what holds without it."""
    simple = IDENTIFIER.fullmatch(column.name)
    name = column.name if simple else toml(column.name)
    expression = column.name if simple else "`" + column.name.replace("`", "``") + "`"
    return f"# {name} = {toml(expression)}  # {column.type}"


DRAFT = """name = "{name}"

[source]
dsn = {dsn}

[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"

[[table]]
source = {source}
target = {table}
key = [{key}]

[table.columns]  # target column = Spark SQL expression; what is not named here keeps its name and type
{columns}

[work]
path = "changeover-work"
"""
