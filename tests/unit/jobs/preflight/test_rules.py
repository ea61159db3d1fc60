"""What check refuses by itself, without a JVM: limits of the servers at which a step would break off later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from changeover.jobs.preflight import obstacles
from changeover.jobs.preflight.rules import preflight
from changeover.position import Version
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres import gate
from changeover.stores.postgres.batches import BATCH, OWNED, WIDEST, apply_batch, prepare_batch

SPEC = """
name = "wide"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "wide"
target = "wares"
key = ["id"]
{rest}
[flag]
key = "f"
target = "store"
[work]
path = "work"
"""


def wide(connection: Connection, name: str, columns: int) -> None:
    """Create a table of so many columns."""
    rest = "".join(f", c{number} integer" for number in range(1, columns))
    connection.execute(f"CREATE TABLE {name} (id integer PRIMARY KEY{rest})".encode())


def spec_of(folder: Path, rest: str = "") -> Spec:
    path = folder / "spec.toml"
    path.write_text(SPEC.format(rest=rest))
    return load(path)


def test_a_target_that_is_too_wide_for_a_batch_is_refused(
    old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    told = (
        "target table wares would be filled in 1,597 columns, and 1,596 is the most that a batch holds beside its versions: leave"
        " columns out by `drop`"
    )
    with connect(old_dsn, "test") as old:
        wide(old, "wide", WIDEST + 1)
    assert preflight(spec_of(tmp_path)).reasons == [told]
    assert preflight(spec_of(tmp_path, '[table.columns]\ntwo = "c1 + c2"\n')).reasons == [told.replace("1,597", "1,598")]
    assert preflight(spec_of(tmp_path, 'drop = ["c5"]')).reasons == []
    assert any(note.startswith("public.wide has 1,597 columns: 1,596 is the most") for note in obstacles.notes(spec_of(tmp_path)))
    computed, dropped = '[table.columns]\nid = "id + 1"\n', [f"c{number}" for number in range(1, 4)]
    told = told.replace("1,597", "1,595").replace("1,596", "1,594").replace("versions", "versions and the keys of their rows")
    assert preflight(spec_of(tmp_path, f"drop = {dropped[:2]}\n{computed}")).reasons == [told]
    assert preflight(spec_of(tmp_path, f"drop = {dropped}\n{computed}")).reasons == []


def test_the_widest_table_fits_into_a_batch_and_no_wider_one(old_dsn: str) -> None:
    with connect(old_dsn, "test") as connection:
        for name, columns in (("fits", WIDEST), ("breaks", WIDEST + 1)):
            wide(connection, name, columns)
            gate.install_gate(connection, "public", name, ["id"], Version(0, 1, -1))
        with connection.transaction(), connection.cursor() as cursor:
            table = gate.gated(connection, "public", "fits", ["id"])
            prepare_batch(cursor, table, versions=True)
            cursor.execute(psycopg.sql.SQL("INSERT INTO {} VALUES (0, '0/99', 0, false, 2)").format(BATCH))
            assert apply_batch(cursor, table).taken == 1
        with pytest.raises(psycopg.errors.TooManyColumns), connection.transaction(), connection.cursor() as cursor:
            prepare_batch(cursor, gate.gated(connection, "public", "breaks", ["id"]), versions=True)
        fits = replace(table, owned=True)
        with pytest.raises(psycopg.errors.TooManyColumns), connection.transaction(), connection.cursor() as cursor:
            prepare_batch(cursor, fits, versions=True)
        with connection.transaction(), connection.cursor() as cursor:
            prepare_batch(cursor, replace(fits, columns=fits.columns[: -len(OWNED)]), versions=True)


def test_what_cannot_be_a_target_is_refused_and_an_unlogged_one_is_noted(
    old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    with connect(old_dsn, "test") as old, connect(new_dsn, "test") as new:
        old.execute("CREATE TABLE wide (id integer PRIMARY KEY, email text)")
        for made, reason in (
            (
                "TABLE wares (id integer PRIMARY KEY, email text); CREATE UNIQUE INDEX low ON wares (lower(email))",
                "an expression low",
            ),
            (
                "TABLE wares (id integer, email text, PRIMARY KEY (id), EXCLUDE (email WITH =))",
                "exclusion constraint wares_email_excl",
            ),
            ("VIEW wares AS SELECT 1 AS id, ''::text AS email", "public.wares is a view"),
            ("TYPE wares AS ENUM ()", "public.wares is the name of a type"),
        ):
            new.execute(f"CREATE {made}".encode())
            (told,) = preflight(spec_of(tmp_path)).reasons
            assert told.startswith("target store: public.wares "), told
            assert reason in told
            new.execute(f"DROP {made.split()[0]} wares".encode())
        new.execute("CREATE UNLOGGED TABLE wares (id integer, email text, PRIMARY KEY (id) INCLUDE (email))")
        found = preflight(spec_of(tmp_path))
        assert found.reasons == []
        assert any(note.startswith("target store: public.wares is unlogged: a crash") for note in found.notes)


def test_a_statement_names_its_table_as_sql_does(
    old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    with connect(old_dsn, "test") as old:
        old.execute("""CREATE TABLE "My ""odd"".t" (id integer PRIMARY KEY, n integer GENERATED ALWAYS AS IDENTITY)""")
        spec = spec_of(tmp_path)
        odd = replace(spec, tables=(replace(spec.tables[0], source="""public."My ""odd"".t\""""),))
        (told,) = preflight(odd).reasons
        old.execute("SET search_path = ''")
        old.execute(told.partition(": ")[2].encode())
        assert preflight(odd).reasons == []
        old.execute("""ALTER TABLE public."My ""odd"".t" DROP CONSTRAINT "My ""odd"".t_pkey\"""")
        (told,) = preflight(odd).reasons
        old.execute(told.partition(": ")[2].partition(",")[0].encode() + b" (id)")
        assert preflight(odd).reasons == []
