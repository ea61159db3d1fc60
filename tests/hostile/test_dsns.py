"""Every form of a DSN, for a role with an odd password and databases with odd names, is checked, and some carry a table.

That Java gets to the same server as psycopg by each form, over TLS too, is `tests/unit/spark/test_jdbc.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from pyspark.sql import SparkSession

from changeover.jobs.preflight.division import examined
from tests.hostile.dsns import DATABASE, FORMS, PASSWORD, Form, Place, write_files
from tests.support.fix_hostile import Field, image, moved, statement
from tests.support.fix_roles import Mover

DDL = "CREATE TABLE {table} (id integer PRIMARY KEY, v text)"


@pytest.fixture
def database_prefix() -> str:
    return DATABASE


def places_of(field: Field, role: Mover) -> tuple[Place, Place]:
    old, new = (
        Place(side, str(told["port"]), str(told["dbname"]), role.name)
        for side, dsn in (("old", field.old_dsn), ("new", field.new_dsn))
        for told in [conninfo_to_dict(dsn)]
    )
    return old, new


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take the environment's own words about PostgreSQL away."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_every_form_of_a_dsn_is_taken_and_carries_a_table(
    field: Field, spark: SparkSession, role: Mover, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field.old.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role.name), sql.Literal(PASSWORD)))
    places = places_of(field, role)
    write_files(alone, places)
    for number, form in enumerate(FORMS):
        with monkeypatch.context() as here:
            take(form, here, alone, places)
            carry(field, spark, role, f"form{number}", form)


def take(form: Form, here: pytest.MonkeyPatch, folder: Path, places: tuple[Place, Place]) -> None:
    """Give the stores' DSNs the form."""
    for name, value in form.environment.items():
        here.setenv(name, value.format(folder=folder, port=places[0].port, user=places[0].user))
    for variable, place in zip(("OLD_DSN", "NEW_DSN"), places, strict=True):
        here.setenv(variable, form.dsn(place))


def carry(field: Field, spark: SparkSession, role: Mover, table: str, form: Form) -> None:
    """Check a table, and carry it by snapshot and stream where the form is one of those that do."""
    field.old.execute(statement(DDL, table=table))
    field.old.execute(statement("INSERT INTO {table} VALUES (1, 'first')", table=table))
    role.owns(field.old, f"public.{table}")
    migration = field.migration(spark, table, moved(table))
    assert examined(migration.spec).reasons == [], form.name
    if not form.carries:
        return
    migration.prepare()
    field.old.execute(statement("INSERT INTO {table} VALUES (2, 'second')", table=table))
    migration.backfill()
    migration.catch_up()
    sides = {image(session, table, ["id", "v"], "id") for session in (field.old, field.new)}
    assert len(sides) == 1, form.name
    migration.abort()
