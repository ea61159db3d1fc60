"""What happens midway: one sentence each, after which the migration goes on, and no "equal" that is not true."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pyspark.sql import SparkSession

from changeover.errors import ChangeoverError
from changeover.verifiers.compare.verdict import Verdict
from changeover.verifiers.verification import verify
from tests.hostile.midway import MIDWAY, NARROWED, Midway, Narrowed, Step
from tests.support.fix_hostile import Field, image, moved, statement
from tests.support.fix_migration import Migration
from tests.support.fix_roles import Mover

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


def test_a_column_that_is_narrowed_midway_is_told_and_never_equal(field: Field, spark: SparkSession) -> None:
    tables = [row.table for row in NARROWED]
    for table in tables:
        field.old.execute(statement(DDL, table=table))
        field.old.execute(statement(ROWS, table=table))
    migration = field.migration(spark, "narrowed", *map(moved, tables))
    migration.prepare()
    steps: Mapping[Step, Callable[[], Any]] = {**_steps(migration), Step.VERIFY: lambda: None}
    for step, act in steps.items():
        if step is Step.REPLAY:
            for table in tables:
                for text in LATER:
                    field.old.execute(statement(text, table=table))
            migration.capture()
        retype(field, [(row, row.narrower) for row in NARROWED if row.before is step])
        act()
    assert differences(migration) == {row.table: ["type", *["mismatched"] * row.cut] for row in NARROWED}
    retype(field, [(row, row.wider) for row in NARROWED])
    for row in NARROWED:  # whether values were cut, as the bytes say it
        sides = {image(session, row.table, COLUMNS, "id") for session in (field.old, field.new)}
        assert (len(sides) > 1) == row.cut, row.table


def retype(field: Field, rows: list[tuple[Narrowed, str]]) -> None:
    for row, kind in rows:
        field.new.execute(
            statement("ALTER TABLE {table} ALTER {column} TYPE {kind}", table=row.table, column=row.column, kind=kind)
        )


def differences(migration: Migration) -> dict[str, list[str]]:
    """Return the classes of differences that a verification tells of each table; nothing of those that it calls equal."""
    with migration.capturing():
        verdicts = verify(migration.spec, migration.spark)
    return {one.table.removeprefix("public."): classes(one) for one in verdicts}


def classes(verdict: Verdict) -> list[str]:
    found = sorted((name for name, count in verdict.counts.items() if count), reverse=True)
    assert verdict.word == ("different" if found else "equal")
    return found
