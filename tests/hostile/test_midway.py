"""What happens midway: one sentence each, after which the migration goes on, and no "equal" that is not true."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pyspark.sql import SparkSession

from changeover.errors import ChangeoverError
from tests.fix_hostile import Field, image, moved, statement
from tests.fix_migration import Migration
from tests.fix_roles import Mover
from tests.hostile.midway import MIDWAY, Midway, Step

TABLE, COLUMNS = "t", ("id", "n", "v")
DDL = "CREATE TABLE {table} (id integer PRIMARY KEY, n numeric(12,4), v text)"
ROWS = "INSERT INTO {table} SELECT i, i + 0.0055, 'v' || i FROM generate_series(1, 30) i"
LATER = (
    "UPDATE {table} SET v = 'later' WHERE id % 3 = 1",
    "DELETE FROM {table} WHERE id % 10 = 2",
    "INSERT INTO {table} VALUES (100, -0.0001, NULL)",
)


def play(field: Field, role: Mover, row: Midway, act: Callable[[], Any]) -> str | None:
    """Do what the row says, take the step, and undo it; return what is wrong."""
    names = {"table": TABLE, "role": f'"{role.name}"'}
    session = field.old if row.store == "old" else field.new
    for text in row.does:
        session.execute(statement(text, **names))
    try:
        came = act()
    except ChangeoverError as error:
        said = str(error)
        fits = re.search(row.words, said) and "\n" not in said and error.exit_code in (1, 3)
        return None if fits else f"{row.name}: {error.exit_code}, {said}"
    finally:
        for text in row.undo:
            session.execute(statement(text, **names))
    return f"{row.name}: {came}"


def test_what_happens_midway_is_a_sentence_and_no_loss(field: Field, spark: SparkSession, role: Mover) -> None:
    for session in (field.old, field.new):
        session.execute(statement(DDL, table=TABLE))
        role.owns(session, f"public.{TABLE}")
    field.old.execute(statement(ROWS, table=TABLE))
    migration = field.migration(spark, "midway", moved(TABLE))
    migration.prepare()
    steps = _steps(migration)
    wrong = []
    for step, act in steps.items():
        if step is Step.REPLAY:
            for text in LATER:
                field.old.execute(statement(text, table=TABLE))
            migration.capture()
        wrong += [said for row in MIDWAY if row.step is step and (said := play(field, role, row, act))]
        act()
    assert not wrong
    assert image(field.old, TABLE, COLUMNS, "id") == image(field.new, TABLE, COLUMNS, "id")
    assert migration.verify()["store"].equal


def _steps(migration: Migration) -> Mapping[Step, Callable[[], Any]]:
    return {Step.BACKFILL: migration.backfill, Step.REPLAY: migration.replay, Step.VERIFY: migration.verify}
