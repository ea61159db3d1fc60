"""Sessions with PostgreSQL and Spark: the one place where they are made and pinned.

Every PostgreSQL session of ours, Spark's JDBC ones too, runs with TimeZone UTC, DateStyle ISO, IntervalStyle postgres,
extra_float_digits 1 and bytea_output hex, so that the text of a value does not depend on a server's or a user's settings, and bears
`changeover:<migration>:<step>` as its application name. Nothing here runs at import.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from changeover.errors import DatabaseFailed, LockNotGranted, ServerUnavailable

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Row = tuple[Any, ...]
Connection = psycopg.Connection[Row]

PINNED = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "client_encoding": "UTF8",
}
"""Settings that decide how a value reads as text; the same in psycopg's and in Spark's sessions."""

LOCK_TIMEOUT = "2s"
"""How long a statement of ours on a user's table may wait for a lock before it makes way and tries again."""

CONNECT_TIMEOUT = 10


def application_name(migration: str, step: str) -> str:
    """Return the name that all sessions of a step bear in pg_stat_activity."""
    return f"changeover:{migration}:{step}"


def server_name(dsn: str) -> str:
    """Return host, port and database of a DSN for messages: never a user or a secret."""
    parts = conninfo_to_dict(dsn)
    host = parts.get("host") or parts.get("hostaddr") or "local socket"
    return f"{host}:{parts.get('port') or 5432}/{parts.get('dbname') or parts.get('user') or ''}"


def connect(
    dsn: str,
    application: str,
    *,
    autocommit: bool = True,
    replication: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Connection:
    """Open a pinned session; raises ServerUnavailable in one sentence (driver, task or application)."""
    options = {**PINNED, **(settings or {})}
    conninfo = make_conninfo(
        dsn,
        application_name=application,
        connect_timeout=str(CONNECT_TIMEOUT),
        options=_merged_options(dsn, options),
        **({"replication": "database"} if replication else {}),
    )
    try:
        return psycopg.connect(conninfo, autocommit=autocommit)
    except psycopg.OperationalError as error:
        raise ServerUnavailable(server_name(dsn), _first_line(error)) from error


def _merged_options(dsn: str, settings: Mapping[str, str]) -> str:
    given = conninfo_to_dict(dsn).get("options")
    ours = " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())
    return f"{given} {ours}" if given else ours


@contextmanager
def speaking_to(dsn: str, doing: str) -> Iterator[None]:
    """Turn psycopg's errors into ours: a broken connection is not a refused statement."""
    try:
        yield
    except psycopg.errors.LockNotAvailable as error:
        raise LockNotGranted(server_name(dsn), f"lock for {doing}", _first_line(error)) from error
    except (psycopg.errors.AdminShutdown, psycopg.errors.CrashShutdown, psycopg.errors.CannotConnectNow) as error:
        raise ServerUnavailable(server_name(dsn), _first_line(error)) from error
    except psycopg.Error as error:
        if error.sqlstate is None:  # no answer of a server: the connection itself failed
            raise ServerUnavailable(server_name(dsn), _first_line(error)) from error
        raise DatabaseFailed(server_name(dsn), doing, _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].removeprefix("connection failed: ") if text else type(error).__name__


def jdbc_options(dsn: str, application: str) -> dict[str, str]:
    """Return Spark's JDBC options for a psycopg DSN; the password travels as an option that Spark redacts."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    host, port, database = parts.get("host", "localhost"), parts.get("port", "5432"), parts.get("dbname", "")
    settings = {name: value for name, value in PINNED.items() if name != "client_encoding"}  # pgjdbc insists on its own UTF8
    options = {
        "url": f"jdbc:postgresql://{host}:{port}/{quote(database, safe='')}",
        "driver": "org.postgresql.Driver",
        "ApplicationName": application,
        "options": _merged_options("", settings),
        "user": parts.get("user", ""),
    }
    if "password" in parts:
        options["password"] = parts["password"]
    if "sslmode" in parts:
        options["sslmode"] = parts["sslmode"]
    return options


def spark_session(
    app_name: str, *, cores: int | None = None, memory: str = "2g", shuffle_partitions: int = 4, scratch: Path | None = None
) -> SparkSession:
    """Return a Spark session with Delta and the pinned settings (driver).

    What Spark spills, which are rows, goes to the folder `scratch`, else to where Spark's own default is.
    Under spark-submit the cluster's master and memory win; the SQL settings that correctness needs are set in any case.
    """
    from pyspark import SparkContext
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    from changeover import folders, java, launch

    java.require()
    options: dict[str, bool | float | int | str | None] = {
        "spark.app.name": app_name,
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    }
    if SparkContext._active_spark_context is None and not _submitted():
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # tasks need the packages of this interpreter
        options |= {
            "spark.master": f"local[{cores or '*'}]",
            "spark.driver.memory": memory,
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.sql.shuffle.partitions": str(shuffle_partitions),
            "spark.databricks.delta.snapshotPartitions": "1",
            "spark.scheduler.mode": "FAIR",
            "spark.hadoop.fs.permissions.umask-mode": f"{folders.umask():03o}",  # Hadoop's own is not the process's
            **({"spark.local.dir": str(scratch), "spark.sql.warehouse.dir": str(scratch / "warehouse")} if scratch else {}),
        }
        launch.start(options)
    spark = SparkSession.builder.config(map=options).getOrCreate()
    for name in QUERY_LOGGERS:
        PySparkLogger.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger().addFilter(_not_of_the_bridge)
    for name, value in SQL_SETTINGS.items():
        spark.conf.set(name, value)
    return spark


QUERY_LOGGERS = ("SQLQueryContextLogger", "DataFrameQueryContextLogger")
"""PySpark's own: they print an error that is raised anyway, with the JVM's traceback and the values of rows."""


def _not_of_the_bridge(record: logging.LogRecord) -> bool:
    """Leave out what py4j logs as the root: a call that broke off, by Ctrl-C as by an error, which it raises anyway."""
    return f"{os.sep}py4j{os.sep}" not in record.pathname


SQL_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",  # a value that does not fit is an error, never a NULL
    "spark.sql.execution.arrow.maxRecordsPerBatch": "20000",
    "spark.sql.adaptive.enabled": "false",  # our frames know their partitions; re-planning costs more than it gains
    "spark.databricks.delta.schema.autoMerge.enabled": "false",
}


def _submitted() -> bool:
    """Return whether spark-submit has already started the JVM, whose own configuration then counts."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_ENV_LOADED" in os.environ
