"""A role for which every setting is at its worst moves a table all the same; a policy that comes midway leaves no row out."""

from __future__ import annotations

import pytest
from psycopg import sql

from changeover.errors import CouldNotFinish
from changeover.jobs.preflight.rules import preflight
from changeover.session import Connection
from tests.support.fix_migration import STORE, MakeMigration, Migration
from tests.support.fix_roles import Mover

TABLE = '[[table]]\nsource = "public.odd"\ntarget = "odd"\nkey = ["id"]\n'
DDL = """
CREATE TABLE odd (id bigint PRIMARY KEY, f double precision, at timestamptz, day date, span interval, raw bytea, tags text[],
    note text, price numeric(12,4))
"""
ROWS = r"""
INSERT INTO odd SELECT i, 1 / (i + 2.0), timestamptz '2024-03-31 01:30:00Z' + i * interval '61.000003 s', date '2024-01-02' + i,
    i * interval '1 mon -1 day 0.5 s', decode('00ff5c27', 'hex'), CASE i % 3 WHEN 0 THEN ARRAY['NULL', NULL, 'a\b'] END,
    CASE i % 4 WHEN 0 THEN 'it''s \ a "q"' WHEN 1 THEN NULL ELSE 'é' END, i / 7.0
FROM generate_series({}, {}) i
"""


def image(connection: Connection) -> bytes:
    """Return the table as the server's own binary COPY has it."""
    with connection.cursor() as cursor, cursor.copy("COPY (SELECT * FROM odd ORDER BY id) TO STDOUT (FORMAT binary)") as copy:
        return b"".join(bytes(block) for block in copy)


@pytest.fixture(params=["slot", "trigger"])
def beset(
    request: pytest.FixtureRequest, make_migration: MakeMigration, mover: Mover, old_dsn: str, new_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Migration:  # fmt: skip
    """Return a migration that runs as a role whose settings are the worst in both stores, not yet prepared."""
    made = make_migration(TABLE, DDL, targets=[STORE], kind=request.param)
    made.old.execute(sql.SQL(ROWS).format(1, 300))
    mover.owns(made.old, "public.odd")
    mover.owns(made.new)
    for admin in (made.old, made.new):
        mover.is_beset(admin)
    monkeypatch.setenv("OLD_DSN", mover.dsn(old_dsn))
    monkeypatch.setenv("NEW_DSN", mover.dsn(new_dsn))
    return made


def test_the_worst_settings_and_a_policy_midway_change_nothing(beset: Migration, mover: Mover) -> None:
    role = sql.Identifier(mover.name)
    assert not preflight(beset.spec).reasons
    beset.prepare()
    beset.old.execute(sql.SQL(ROWS).format(301, 400))
    beset.old.execute("ALTER TABLE odd ENABLE ROW LEVEL SECURITY; ALTER TABLE odd FORCE ROW LEVEL SECURITY")
    beset.old.execute("CREATE POLICY p ON odd USING (id % 3 = 0)")
    beset.old.execute(
        "UPDATE odd SET note = 'later', tags = ARRAY['NULL', NULL] WHERE id % 50 = 1; DELETE FROM odd WHERE id % 50 = 2"
    )
    with pytest.raises(CouldNotFinish, match=r"row-level security that hides rows from the role \S+: ALTER ROLE \S+ BYPASSRLS"):
        beset.backfill()

    beset.old.execute(sql.SQL("ALTER ROLE {} BYPASSRLS").format(role))
    beset.backfill()
    beset.catch_up()
    beset.old.execute("UPDATE odd SET f = f / 3, id = id + 1000 WHERE id % 50 = 3; DELETE FROM odd WHERE id % 50 = 4")
    beset.catch_up()
    assert image(beset.new) == image(beset.old)
    assert {verdict.word for verdict in beset.verify().values()} == {"equal"}
    found = beset.new.execute("SELECT DISTINCT amname FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE relkind = 'r'")
    assert found.fetchall() == [("heap",)]

    beset.old.execute(sql.SQL("ALTER ROLE {} NOBYPASSRLS").format(role))
    with pytest.raises(CouldNotFinish, match="BYPASSRLS"):
        beset.verify()
