"""Each assumption is asked at each of its moments, where a violation made midway is found; the documents have the same table."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from pyspark.sql import SparkSession

from changeover.embedded.server import EmbeddedServer
from changeover.errors import ChangeoverError
from changeover.jobs.capture.feed import feed_of
from changeover.jobs.capture.slot import SlotRun
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import RULES, Asked, Moment
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.load.prepared import require_prepared
from changeover.jobs.preflight.division import examined
from changeover.jobs.spool.writer import CaptureResult
from changeover.session import Connection, connect
from tests.support.fix_capture import Prepared, by_hand
from tests.support.fix_postgres import binaries_by_major, fresh_database, passing_server

ROOT = Path(__file__).parents[4]

TABLES = """
CREATE TABLE follows (id integer PRIMARY KEY, name text);
CREATE TABLE other (a integer, b text, PRIMARY KEY (a, b)) PARTITION BY RANGE (a);
CREATE TABLE low PARTITION OF other FOR VALUES FROM (0) TO (10);
"""

ROLE = "changeover_filtered"
"""A role of the servers of these tests that is no superuser, and owns what policies hide from it."""


@pytest.fixture
def prepared(any_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepared]:
    with by_hand(any_dsn, new_dsn, tmp_path, monkeypatch, TABLES) as made:
        yield made


# -- violations, each made midway by plain SQL


def filtered(connection: Connection, dsn: str, table: str) -> str:
    """Have a policy hide rows of a table from a role that owns it; return the DSN by which that role comes."""
    if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [ROLE]).fetchone() is None:
        connection.execute(sql.SQL("CREATE ROLE {} REPLICATION").format(sql.Identifier(ROLE)))
    for statement in (
        "ALTER TABLE {table} OWNER TO {role}", "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE {table} FORCE ROW LEVEL SECURITY", "CREATE POLICY few ON {table} USING (id > 10)",
    ):  # fmt: skip
        connection.execute(sql.SQL(statement).format(table=sql.Identifier(table), role=sql.Identifier(ROLE)))
    return make_conninfo(dsn, options=f"-c role={ROLE}")


def hide_source(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_DSN", filtered(made.old, made.spec.source.dsn.resolve(), "follows"))


def hide_target(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    new = made.ledger.connection
    new.execute("CREATE TABLE IF NOT EXISTS follows (id integer PRIMARY KEY, name text)")
    dsn = filtered(new, made.spec.targets["store"].dsn_value, "follows")
    for grant in ("ALL ON SCHEMA changeover", "ALL ON ALL TABLES IN SCHEMA changeover"):
        new.execute(sql.SQL(f"GRANT {grant} TO {{}}").format(sql.Identifier(ROLE)))
    monkeypatch.setenv("NEW_DSN", dsn)


def run(*statements: str) -> Callable[[Prepared, pytest.MonkeyPatch], None]:
    """Return a violation made of statements in the old store."""

    def violate(made: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        for statement in statements:
            made.old.execute(statement.format(name=made.spec.slot).encode())

    return violate


VIOLATIONS: dict[str, tuple[Callable[[Prepared, pytest.MonkeyPatch], None], str]] = {
    "plan": (run("ALTER TABLE follows ADD bad xml"), "is not proven exact"),
    "slot": (run("SELECT pg_drop_replication_slot('{name}')"), "replication slot is missing"),
    "definition": (
        run("ALTER PUBLICATION {name} DROP TABLE ONLY follows", "ALTER PUBLICATION {name} ADD TABLE ONLY follows"),
        "publication of public.follows is another one by now",
    ),
    "partitions": (run("ALTER TABLE other DETACH PARTITION low"), "its partition public.low was detached"),
    "file": (run("ALTER TABLE follows RENAME TO elsewhere"), "was rewritten since prepare"),
    "rows seen": (hide_source, "public.follows has row-level security that hides rows"),
    "rows seen in targets": (hide_target, "target store: public.follows has row-level security that hides rows"),
}
"""How each rule is broken, and what is told; of a server's own rules see below."""


# -- the moments, each by what the product calls there


def told_at(made: Prepared, moment: Moment) -> str:
    """Return what a moment has to say."""
    ledger = made.ledger
    run = SlotRun(made.spec, feed_of(made.spec, ledger, ledger.stream("test")), threading.Event(), bool, 0, CaptureResult())
    told = ""
    with connect(made.spec.source.dsn.resolve(), "test") as old:
        try:
            if moment in (Moment.CHECK, Moment.PREPARE):
                told = "; ".join(examined(made.spec, moment).reasons)
            elif moment is Moment.RUN:
                with suppress(AttributeError):  # what comes next would be Spark's
                    require_prepared(made.spec, None, ledger, "replay")  # type: ignore[arg-type]
            elif moment is Moment.CONNECT:
                with run._proved():
                    pass
            elif moment is Moment.WATCH:
                run._watch(old)
            else:
                assumptions.require(moment, Asked(made.spec, old, ledger))
        except ChangeoverError as error:
            told = str(error)
    return "; ".join([told, *ledger.stopped().values()])


BY_STATEMENT = [(rule.name, moment) for rule in RULES if rule.name in VIOLATIONS for moment in Moment if moment in rule.moments]


@pytest.mark.parametrize(("name", "moment"), BY_STATEMENT, ids=[f"{name}-{moment.value}" for name, moment in BY_STATEMENT])
def test_a_violation_made_midway_is_found_at_each_moment(
    prepared: Prepared, name: str, moment: Moment, monkeypatch: pytest.MonkeyPatch
) -> None:
    violate, sentence = VIOLATIONS[name]
    assert sentence not in told_at(prepared, moment)
    violate(prepared, monkeypatch)
    assert sentence in told_at(prepared, moment)


OF_A_SERVER = ("server", "identity")


@pytest.mark.parametrize("major", sorted(binaries_by_major()))
def test_another_server_is_found_at_each_moment(major: int, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {rule.name: rule for rule in RULES}
    with (
        passing_server(binaries_by_major()[major]) as alone,
        fresh_database(alone, "old") as dsn,
        by_hand(dsn, new_dsn, tmp_path, monkeypatch, TABLES) as made,
    ):
        stand_by(alone)
        for moment in rules["server"].moments:
            assert "the server is a standby: name the primary" in told_at(made, moment), moment
        with connect(dsn, "test") as old:
            old.execute("SELECT pg_promote()")
        for moment in rules["identity"].moments:
            assert "timeline is 2, but 1 was prepared" in told_at(made, moment), moment
            assert made.ledger.stopped() == {}, "what another server looks like says nothing of the prepared one"


def stand_by(server: EmbeddedServer) -> None:
    """Have a server start as a standby of none."""
    (server.data / "standby.signal").touch()
    server.restart()


def test_another_database_stops_nothing_for_good(prepared: Prepared, monkeypatch: pytest.MonkeyPatch, new_dsn: str) -> None:
    for moment in (Moment.RUN, Moment.CONNECT, Moment.WATCH, Moment.VERDICT):
        with monkeypatch.context() as mistaken:
            mistaken.setenv("OLD_DSN", new_dsn)
            assert "was prepared" in told_at(prepared, moment), moment
    assert prepared.ledger.stopped() == {}


# -- the table itself


def test_every_rule_is_broken_by_a_test() -> None:
    assert {*VIOLATIONS, *OF_A_SERVER} == {rule.name for rule in RULES}


@pytest.mark.parametrize("moment", Moment)
def test_every_moment_is_asked_by_the_product(moment: Moment) -> None:
    places = [
        path
        for folder in ("jobs", "verifiers", "flags")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "assumptions" and re.search(rf"Moment\.{moment.name}\b", path.read_text())
    ]
    assert places, f"{moment} is asked nowhere"
    assert any(moment in rule.moments for rule in RULES)


def test_the_documents_have_the_same_table() -> None:
    text = (ROOT / "docs/concepts/guarantee.md").read_text()
    for rule in RULES:
        moments = ", ".join(moment.value for moment in Moment if moment in rule.moments)
        assert f"| {rule.name} | {rule.says} | {moments} |" in text, rule.name
    table = text.partition("| assumption | what it says | asked at |")[2].partition("\n\n")[0]
    assert len(table.strip().splitlines()) == 1 + len(RULES)


def test_a_plan_that_holds_has_nothing_to_say(prepared: Prepared, spark: SparkSession) -> None:
    require_prepared(prepared.spec, spark, prepared.ledger, "replay")
    with connect(prepared.spec.source.dsn.resolve(), "test") as old, Ledger.open(prepared.spec, "test") as ledger:
        for moment in Moment:
            assert assumptions.sentences(moment, Asked(prepared.spec, old, ledger)) == [], moment
