"""Each setting alone at its worst changes what a session shows, and nothing of what a session of ours shows, of whatever kind."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.session import connect
from changeover.spark import jdbc
from tests.hostile.settings import SHOWN, Shown
from tests.support.fix_hostile import Field
from tests.support.fix_roles import Mover


def shown(session: psycopg.Connection[Any], row: Shown) -> str:
    """Return what a session shows, or the error that it ends with."""
    try:
        found = session.execute(f"SELECT {row.expression}".encode()).fetchone()
    except psycopg.Error as error:
        return str(error)
    assert found is not None
    return str(found[0])


def test_no_single_setting_reaches_a_session_of_ours(field: Field, role: Mover) -> None:
    dsn = role.dsn(field.old_dsn)
    role.is_beset(field.old)  # makes what a search_path leads to
    for row in SHOWN:
        role.is_beset_by(field.old, row.name)
        with closing(psycopg.connect(dsn)) as plain:
            assert shown(plain, row) != row.text, row.name
        with closing(connect(dsn, "test")) as ours, closing(connect(dsn, "test", replication=True)) as walsender:
            assert (shown(ours, row), shown(walsender, row)) == (row.text, row.text), row.name


def test_all_of_them_reach_no_session_of_java(field: Field, role: Mover, spark: SparkSession) -> None:
    dsn = role.dsn(field.old_dsn)
    role.is_beset(field.old)
    options = {
        **jdbc.options(dsn, "test"),
        "sessionInitStatement": jdbc.start(sql.SQL("SET LOCAL work_mem TO '4MB'")).as_string(None),
    }
    asked = ", ".join(f"{row.expression} AS v{place}" for place, row in enumerate(SHOWN))
    found = spark.read.format("jdbc").options(**options, query=f"SELECT {asked}").load().collect()
    assert [tuple(row) for row in found] == [tuple(row.text for row in SHOWN)]
