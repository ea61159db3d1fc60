"""Two stores on a server of one major release, a migration between them, and the judge: the bytes of a binary COPY.

What the product says of itself is never the judge: `image` asks each server for the rows in the order of their key, as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.embedded.server import EmbeddedServer
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from tests.support.fix_migration import STORE, Migration, spec_text
from tests.support.fix_postgres import fresh_database
from tests.support.fix_roles import Mover, passing_mover


@dataclass
class Field:
    """Two empty databases and the folder of a migration between them."""

    old_dsn: str
    new_dsn: str
    old: Connection
    new: Connection
    folder: Path

    def spec(self, name: str, *tables: str, more: str = "") -> Spec:
        """Write a spec of tables, each as `moved` says it, in a folder of its own."""
        folder = self.folder / name
        folder.mkdir()
        path = folder / "spec.toml"
        path.write_text(spec_text(name, "".join(tables), folder, [STORE]) + more, encoding="utf-8")
        return load(path)

    def migration(self, spark: SparkSession, name: str, *tables: str, more: str = "") -> Migration:
        """Return a migration that is not yet prepared."""
        return Migration(self.spec(name, *tables, more=more), spark, self.old, self.new)


def moved(name: str, key: str = "id", more: str = "") -> str:
    """Return the part of a spec that moves a table under its own name."""
    keys = ", ".join(f'"{column.strip()}"' for column in key.split(","))
    return f'[[table]]\nsource = "public.{name}"\ntarget = "{name}"\nkey = [{keys}]\n{more}\n'


@pytest.fixture
def database_prefix() -> str:
    """Return what the names of the two databases begin with; a module of tests may have another one."""
    return ""


@pytest.fixture
def field(any_server: EmbeddedServer, database_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Field]:
    """Yield two empty databases on a server of each major."""
    with (
        fresh_database(any_server, f"{database_prefix}old") as old_dsn,
        fresh_database(any_server, f"{database_prefix}new") as new_dsn,
        connect(old_dsn, "test-old") as old, connect(new_dsn, "test-new") as new,
    ):  # fmt: skip
        monkeypatch.setenv("OLD_DSN", old_dsn)
        monkeypatch.setenv("NEW_DSN", new_dsn)
        monkeypatch.setattr("changeover.jobs.load.copier.FEWEST_CHUNKS", 1)
        yield Field(old_dsn, new_dsn, old, new, tmp_path)


@pytest.fixture
def role(field: Field, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mover]:
    """Yield a role that is no superuser; migrations run as it, and it has to be given the tables."""
    with passing_mover(field.old_dsn, field.new_dsn) as made:
        for session in (field.old, field.new):
            made.owns(session)
        monkeypatch.setenv("OLD_DSN", made.dsn(field.old_dsn))
        monkeypatch.setenv("NEW_DSN", made.dsn(field.new_dsn))
        yield made


def statement(text: str, **names: str) -> sql.SQL:
    """Return a statement of a cell; its braces are names as SQL writes them."""
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return sql.SQL(text)


def image(connection: Connection, table: str, columns: Sequence[str], key: str) -> bytes:
    """Return all rows of a table in the order of their key, in the server's own binary form."""
    chosen = sql.SQL(", ").join(map(sql.Identifier, columns)).as_string(connection)
    query = statement(
        "COPY (SELECT {columns} FROM {table} ORDER BY {key}) TO STDOUT (FORMAT binary)", columns=chosen, table=table, key=key
    )
    with connection.cursor() as cursor, cursor.copy(query) as rows:
        return b"".join(bytes(part) for part in rows)


def columns_of(connection: Connection, table: str) -> list[str]:
    """Return the names of a table's columns in their order."""
    rows = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        [table],
    )
    return [row[0] for row in rows.fetchall()]
