"""Many tables: a role that may open few sessions moves them all, since no step holds more of them for more tables."""

from __future__ import annotations

import pytest
from psycopg import sql

from changeover.jobs.preflight.division import examined
from changeover.verifiers.verification import verify
from tests.support.fix_migration import STORE, MakeMigration
from tests.support.fix_roles import Mover

TABLES = 24
LIMIT = 18
"""Fewer sessions than there are tables, and fewer than three a table by far."""

NAMES = [f"t{number:02}" for number in range(TABLES)]


@pytest.mark.parametrize("kind", ["slot"])
def test_every_table_has_its_verdict_however_many_they_are(
    make_migration: MakeMigration, mover: Mover, old_dsn: str, new_dsn: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("changeover.jobs.load.copier.FEWEST_CHUNKS", 1)
    tables = "".join(f'[[table]]\nsource = "public.{name}"\ntarget = "{name}"\nkey = ["id"]\n' for name in NAMES)
    create = [f"CREATE TABLE {name} (id bigint PRIMARY KEY, said text); INSERT INTO {name} VALUES (1, 'a')" for name in NAMES]
    made = make_migration(tables, *create, targets=[STORE], kind=kind)
    mover.owns(made.old, *(f"public.{name}" for name in NAMES))
    mover.owns(made.new)
    made.old.execute(sql.SQL("ALTER ROLE {} CONNECTION LIMIT {}").format(sql.Identifier(mover.name), sql.Literal(LIMIT)))
    monkeypatch.setenv("OLD_DSN", mover.dsn(old_dsn))
    monkeypatch.setenv("NEW_DSN", mover.dsn(new_dsn))

    assert examined(made.spec).reasons == []
    made.prepare()
    made.backfill()
    for name in NAMES:
        made.old.execute(sql.SQL("INSERT INTO {} VALUES (2, 'b')").format(sql.Identifier(name)))
    made.catch_up()
    with made.capturing():
        verdicts = verify(made.spec, made.spark)
    assert {verdict.table: (verdict.word, verdict.source_rows) for verdict in verdicts} == {
        f"public.{name}": ("equal", 2) for name in NAMES
    }
