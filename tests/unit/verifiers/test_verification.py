"""Tables without rows, and tables that can't be checked: each table has its own verdict, and "0 rows" is proved."""

from __future__ import annotations

from typing import Any

import pytest
from pyspark.sql import SparkSession

from changeover.errors import CouldNotCheck, CouldNotFinish
from changeover.jobs.ledger.ledger import Ledger
from changeover.verifiers import moment
from changeover.verifiers import verification as verifying
from changeover.verifiers.compare import diff
from changeover.verifiers.compare.coverage import require_read
from changeover.verifiers.compare.verdict import Verdict
from changeover.verifiers.verification import verify
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration

DDL = """
CREATE TABLE a (id int PRIMARY KEY, v text); INSERT INTO a SELECT i, 'v' FROM generate_series(1, 50) i;
CREATE TABLE e (id int PRIMARY KEY, v text);
CREATE TABLE f (id int PRIMARY KEY, v text); INSERT INTO f VALUES (1, 'left out'), (2, NULL);
CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10); CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20)
"""

TABLE = '[[table]]\nsource = "public.{0}"\ntarget = "{0}2"\nkey = ["id"]\n'
WHERE = {"f": "where = \"v <> 'left out'\"\n"}
TABLES = "".join(TABLE.format(name) + WHERE.get(name, "") for name in "aef")


def on_record(migration: Migration) -> dict[tuple[str, str], str]:
    with Ledger.open(migration.spec, "test") as ledger:
        found = ledger.verdicts()
    return {(one.source.removeprefix("public."), one.target): one.verdict for one in reversed(found)}


def failing(migration: Migration, error: type[Exception], match: str) -> list[Verdict]:
    """Verify, beside a running capture, with an error that is raised when all is done; return the verdicts that were told."""
    told: list[Verdict] = []
    with migration.capturing(), pytest.raises(error, match=match):
        verify(migration.spec, migration.spark, on_verdict=told.append)
    return told


def loaded(migration: Migration) -> Migration:
    migration.prepare()
    migration.backfill()
    migration.catch_up()
    return migration


def test_every_table_gets_its_verdict(make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch) -> None:
    migration = loaded(make_migration(TABLES, DDL))
    with migration.capturing():
        verdicts = verify(migration.spec, migration.spark)
    assert {(v.table, v.target): (v.word, v.source_rows, v.target_rows) for v in verdicts} == {
        (f"public.{name}", target): ("equal", rows, rows)
        for name, rows in {"a": 50, "e": 0, "f": 0}.items()
        for target in (STORE, LAKE)
    }
    assert all(Verdict.from_json(v.to_json()) == v for v in verdicts)
    with Ledger.open(migration.spec, "test") as ledger:
        ledger.stop("a test stopped it", "public.a")
    compare = diff.compare

    def refused(*arguments: Any, **options: Any) -> Any:
        if (options["table"], options["store"]) == ("public.e", STORE):
            raise CouldNotCheck("public.e", "a test said no")
        return compare(*arguments, **options)

    migration.new.execute("INSERT INTO e2 VALUES (7, 'rogue'); INSERT INTO f2 VALUES (7, 'rogue')")
    monkeypatch.setattr(verifying, "compare", refused)
    told = failing(
        migration, CouldNotFinish, "public.a is stopped: a test stopped it; .*; could not check public.e: a test said no"
    )
    assert {(v.table, v.target): v.word for v in told} == {
        ("public.e", LAKE): "equal", ("public.f", STORE): "different", ("public.f", LAKE): "equal",
    }  # fmt: skip
    assert on_record(migration)["f", STORE] == "different"


def test_a_table_that_reads_as_empty_because_its_file_was_replaced_is_not_equal(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    migration = loaded(make_migration("".join(map(TABLE.format, "pa")), DDL, targets=(STORE,)))
    migration.old.execute("INSERT INTO p VALUES (1, 'lost'), (11, 'lost')")
    migration.catch_up()
    migration.new.execute("DELETE FROM p2")  # every row is lost, which a verdict has to say
    replay_to = moment._Holding._replay_to

    def rewritten(*arguments: Any) -> None:
        """Replace the source's file after the snapshot was taken, and before its session holds a lock of the table."""
        replay_to(*arguments)
        migration.old.execute("ALTER TABLE p ALTER v TYPE varchar(9) USING v || ''")

    monkeypatch.setattr(moment._Holding, "_replay_to", rewritten)
    told = failing(migration, CouldNotCheck, "public.p: the source table was rewritten, truncated or repartitioned")
    assert [(v.table, v.word) for v in told] == [("public.a", "equal")]
    assert ("p", STORE) not in on_record(migration)


def test_a_range_that_no_task_read_is_not_empty(spark: SparkSession) -> None:
    nothing = spark.range(0, 5, numPartitions=3).where("id > 10")
    require_read(nothing, 3, table="t", side="source", empty=True)
    with pytest.raises(CouldNotCheck, match="3 of 4 ranges of the source were read to their end"):
        require_read(nothing, 4, table="t", side="source", empty=True)
    rows = spark.range(0, 5, numPartitions=3)
    require_read(rows, 3, table="t", side="source", empty=False)
    with pytest.raises(CouldNotCheck, match="the target read as empty at first and has 5 rows"):
        require_read(rows, 1, table="t", side="target", empty=True)
