"""The rehearsal: what passes it runs, what an engine refuses is one sentence, and nothing is left of it anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from pyspark.sql import DataFrame, SparkSession

from changeover.errors import SpecError
from changeover.jobs.init import toml
from changeover.jobs.preflight.division import examined
from changeover.names import folded, joined, nth, reserved
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.verifiers.rehearsal import rehearse, rehearsed

PARTS = """
name = "m"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[target.lake]
kind = "delta"
path = "{folder}/lake"
[work]
path = "{folder}/work/of/it"
[flag]
key = "k"
target = "store"
"""

GOODS = """
CREATE TABLE goods (id int PRIMARY KEY, "Name" text, "name" text, price numeric(10,2), made timestamptz, tags text[], big text);
INSERT INTO goods SELECT i, 'N' || i, 'n' || i, i, now(), ARRAY['x'], 'y' FROM generate_series(1, 10) i
"""

TABLE = '[[table]]\nsource = "goods"\ntarget = "wares"\nkey = ["id"]\n'
COLUMNS = '[table.columns]\nupper = "`Name`"\nlower = "name"\n'


def raising(frame: DataFrame) -> DataFrame:
    """Fail as an application's function may."""
    raise KeyError("no such thing")


@pytest.fixture
def folder(old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    with connect(old_dsn, "test") as old:
        old.execute(GOODS.encode())
    return tmp_path


def spec_of(folder: Path, tables: str) -> Spec:
    path = folder / "spec.toml"
    path.write_text(PARTS.format(folder=folder) + tables, encoding="utf-8")
    return load(path)


def reasons(folder: Path, spark: SparkSession, tables: str) -> list[str]:
    return rehearsed(spec_of(folder, tables), lambda: spark).reasons


CATALOGUE = """
SELECT 'c ' || relname FROM pg_class UNION ALL SELECT 'p ' || proname FROM pg_proc UNION ALL SELECT 'n ' || nspname
FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' UNION ALL SELECT slot_name FROM pg_replication_slots
WHERE database = current_database() ORDER BY 1
"""


def catalogue(connection: Connection) -> list[tuple[str]]:
    return connection.execute(CATALOGUE.encode()).fetchall()


def test_what_passes_leaves_nothing_and_existing_tables_as_they_were(folder: Path, spark: SparkSession, new_dsn: str) -> None:
    with connect(new_dsn, "test") as new:
        before = catalogue(new)
        assert reasons(folder, spark, TABLE + COLUMNS) == []
        assert catalogue(new) == before
        assert sorted(one.name for one in folder.iterdir()) == ["spec.toml"]
        # beside what is there already
        new.execute(
            "CREATE TABLE wares (tags text[], id bigint PRIMARY KEY, upper text, lower text, price numeric(12,2), made timestamptz,"
            " big text, own int DEFAULT 7)"
        )
        before = catalogue(new)
        (folder / "work/of").mkdir(parents=True)
        assert reasons(folder, spark, TABLE + COLUMNS) == []
        assert catalogue(new) == before
        assert list((folder / "work/of").iterdir()) == []
        assert not (folder / "lake").exists()


WRONG = [
    ('bad = "nope(big)"', "columns.bad: 'nope(big)' is not a valid expression: [UNRESOLVED_ROUTINE]"),
    ('bad = "upper(NAME)"', "columns.bad: 'upper(NAME)' is not a valid expression: [UNRESOLVED_COLUMN"),
    ('[table.reverse]\nName = "nope(upper)"\nname = "lower"', "'nope(upper)' is not a valid expression"),
]


@pytest.mark.parametrize(("rest", "told"), WRONG, ids=["an expression", "in another case", "reverse replication"])
def test_what_is_wrong_in_the_spec_is_told_as_such(folder: Path, spark: SparkSession, rest: str, told: str) -> None:
    with pytest.raises(SpecError) as caught:
        reasons(folder, spark, TABLE + COLUMNS + rest)
    assert told in str(caught.value)
    assert nth(1) not in str(caught.value), "our own names are nobody's business"


REFUSED = [
    (f'{COLUMNS}[table.transform]\nfunction = "{__name__}:raising"', "goods into store: 'no such thing'"),
    ("", 'two columns that differ in case alone, "Name" and "name", which Delta does not take'),
]


@pytest.mark.parametrize(("rest", "told"), REFUSED, ids=["a function", "Delta"])
def test_what_an_engine_refuses_is_a_reason(folder: Path, spark: SparkSession, rest: str, told: str) -> None:
    found = reasons(folder, spark, TABLE + rest)
    assert any(told in one for one in found), found
    assert all("\n" not in one and "Traceback" not in one for one in found)
    assert sorted(one.name for one in folder.iterdir()) == ["spec.toml"]


def test_a_name_of_ours_is_refused_in_whatever_case(folder: Path, spark: SparkSession, old_dsn: str) -> None:
    with connect(old_dsn, "test") as old:
        old.execute('ALTER TABLE goods ADD "_Changeover_x" int')
    assert "public.goods or its target has a column _Changeover_x, a name that changeover needs for itself" in reasons(
        folder, spark, TABLE + COLUMNS
    )


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: len(name.encode()) <= 63 and not reserved(name)
)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.tuples(NAMES, NAMES), st.lists(NAMES, min_size=3, max_size=12, unique_by=folded))
def test_any_names_at_all(folder: Path, spark: SparkSession, old_dsn: str, place: tuple[str, str], names: list[str]) -> None:
    """Nothing is found but what the lake's names rule out, and that by its sentence alone."""
    with connect(old_dsn, "test") as old, old.transaction():
        schema, columns = sql.Identifier(f"s{place[0]}"[:20]), [sql.Identifier(name) for name in names]
        old.execute(sql.SQL("DROP SCHEMA IF EXISTS {0} CASCADE; CREATE SCHEMA {0}").format(schema))
        made = sql.SQL(", ").join(sql.SQL("{} text").format(column) for column in columns)
        table = sql.Identifier(f"s{place[0]}"[:20], place[1])
        old.execute(sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY ({}))").format(table, made, columns[0]))
    source = toml(joined(f"s{place[0]}"[:20], place[1]))
    spec = spec_of(folder, f'[[table]]\nsource = {source}\ntarget = "wares"\nkey = [{toml(names[0])}]\n')
    found = examined(spec)
    assert all("which Delta does not take" in reason for reason in found.reasons), found.reasons
    assert rehearse(spec, spark, found.tables) == [] or found.reasons
