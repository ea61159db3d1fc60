"""What a server answers Java means the same in whatever language it is said, and no value is repeated."""

from __future__ import annotations

import pytest
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.errors import ChangeoverError, CouldNotFinish, RowRefused, RowsHidden, ServerUnavailable, SnapshotLost, TextRefused
from changeover.session import connect
from changeover.spark import jdbc
from changeover.spark.failures import Answer, from_spark, translated
from changeover.spark.jars import JarsMissing
from changeover.stores.postgres.tasks import _without_value

WORDS = "ungültige Eingabe: »geheim«"

LOUD = """
CREATE FUNCTION loud(state text) RETURNS text LANGUAGE plpgsql AS
    $$BEGIN RAISE EXCEPTION 'ungültige Eingabe: »geheim«' USING ERRCODE = state; END$$
"""


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("57P01", ServerUnavailable), ("53300", ServerUnavailable), ("08006", ServerUnavailable), ("22021", TextRefused),
        ("22P05", TextRefused), ("22P02", RowRefused), ("22007", RowRefused), ("42P01", CouldNotFinish),
    ],
)  # fmt: skip
def test_an_answer_is_told_by_its_state(old_dsn: str, spark: SparkSession, state: str, kind: type[ChangeoverError]) -> None:
    with connect(old_dsn, "test") as session:
        session.execute(LOUD)
    query = sql.SQL("SELECT loud({}) AS x").format(sql.Literal(state)).as_string(None)
    with pytest.raises(ChangeoverError) as caught, from_spark("public.t", "a chunk"):
        spark.read.format("jdbc").options(**jdbc.options(old_dsn, "test"), query=query).load().collect()
    assert type(caught.value) is kind
    if isinstance(caught.value, RowRefused):
        assert caught.value.problem == f"a value can't be read (SQLSTATE {state})"


def test_a_socket_without_its_archive_is_told_by_what_to_run(old_dsn: str, spark: SparkSession) -> None:
    given = {**jdbc.options(old_dsn, "test"), "socketFactory": "org.newsclub.net.unix.Missing$Factory"}
    with (
        pytest.raises(JarsMissing, match=r"run `python -m changeover\.spark\.jars`.*junixsocket-common:"),
        from_spark("t", "a chunk"),
    ):
        spark.read.format("jdbc").options(**given, query="SELECT 1").load().collect()


@pytest.mark.parametrize(
    ("state", "routine", "kind"),
    [
        ("42501", "check_enable_rls", RowsHidden), ("42501", "aclcheck_error", CouldNotFinish),
        ("22023", "ImportSnapshot", SnapshotLost), ("55000", "SetTransactionSnapshot", SnapshotLost),
        ("22023", "other", RowRefused),
    ],
)  # fmt: skip
def test_what_shares_a_state_is_told_by_the_server_s_own_function(state: str, routine: str, kind: type[ChangeoverError]) -> None:
    assert type(translated("org.postgresql.util.PSQLException: FEHLER", "t", "here", Answer(state, routine, WORDS))) is kind


@pytest.mark.parametrize(
    ("message", "state", "left"),
    [
        ('invalid input syntax for type integer: "geheim"', "22P02", "invalid input syntax for type integer"),
        ("ungültige Eingabesyntax für Typ integer: »geheim«", "22P02", "ungültige Eingabesyntax für Typ integer"),
        ('value "99999" is out of range for type smallint', "22003", "value is out of range for type smallint"),
        ('значение "99999" вне диапазона для типа smallint', "22003", "значение вне диапазона для типа smallint"),
        ("la valeur « 99999 » est en dehors des limites", "22003", "la valeur"),
        ('null value in column "v" violates not-null constraint', "23502", 'null value in column "v" violates not-null constraint'),
    ],
)
def test_a_value_is_repeated_in_no_language(message: str, state: str, left: str) -> None:
    assert _without_value(message, state) == left
