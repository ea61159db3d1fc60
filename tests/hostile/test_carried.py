"""Every cell that must be carried: all tables in one migration on each major, judged by the bytes of binary COPY on both sides.

It runs as a role that is no superuser and has every pinned setting at its worst, another worst in the new store. What is beside
it: that each pinned value holds in each kind of session, set for a role or a database, is `tests/unit/test_settings.py`; capture
by triggers under the same settings is `tests/scenarios/test_hostile_role.py`; all pairs of types under the server's own settings
are `tests/scenarios/test_types.py`. The judge's sessions are an administrator's, for whom nothing is set.
"""

from __future__ import annotations

from pyspark.sql import SparkSession

from tests.hostile.cells import CARRIED, Carried
from tests.support.fix_hostile import Field, columns_of, image, moved, statement
from tests.support.fix_roles import Mover


def make(field: Field, role: Mover, cells: tuple[Carried, ...]) -> None:
    """Make the role's tables, and rows of the snapshot, in the old store; in the new one what is there before."""
    for cell in cells:
        field.old.execute(statement(f"CREATE TABLE {{table}} ({cell.columns})", table=cell.name))
        names = [name for name in columns_of(field.old, cell.name) if name != "twice"]
        field.old.execute(statement(f"INSERT INTO {{table}} ({', '.join(names)}) {cell.rows}", table=cell.name))
        role.owns(field.old, f"public.{cell.name}")
        if cell.target:
            field.new.execute(statement(f"CREATE TABLE {{table}} ({cell.target})", table=cell.name))
            role.owns(field.new, f"public.{cell.name}")


def wrong(field: Field, cells: tuple[Carried, ...]) -> list[str]:
    """Return the columns that are not the same bytes on both sides, each read beside the table's key."""
    found = []
    for cell in cells:
        keys = [name.strip() for name in cell.key.split(",")]
        for column in columns_of(field.old, cell.name):
            sides = (image(session, cell.name, [*keys, column], cell.key) for session in (field.old, field.new))
            if len(set(sides)) > 1:
                found.append(f"{cell.name}.{column}")
    return found


def beset(field: Field, role: Mover) -> None:
    """Give the role the worst settings, and other ones that are as bad in the new store."""
    for session in (field.old, field.new):
        role.is_beset(session)
    role.is_beset_otherwise(field.new)


def test_every_carried_cell_arrives_as_it_is_whatever_is_set(field: Field, spark: SparkSession, role: Mover) -> None:
    make(field, role, CARRIED)
    beset(field, role)
    migration = field.migration(spark, "carried", *(moved(cell.name, cell.key) for cell in CARRIED))
    migration.prepare()
    migration.backfill()
    assert wrong(field, CARRIED) == [], "by the snapshot"
    for cell in CARRIED:
        for write in cell.writes:
            field.old.execute(statement(write, table=cell.name))
    migration.catch_up()
    assert wrong(field, CARRIED) == [], "by the stream"
    assert {verdict.word for verdict in migration.verify().values()} == {"equal"}
