"""Sessions with PostgreSQL and Spark: the one place where they are made and pinned.

Every PostgreSQL session of ours, the walsender's and Spark's JDBC ones too, has the values of `settings.PINNED`, so that nothing of
what it reads, writes or waits for depends on a server's, a role's or the environment's settings; one that does not hold them is
refused. It bears `changeover:<migration>:<step>` as its application name. Nothing here runs at import.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from changeover import settings as pins
from changeover.errors import ChangeoverError, DatabaseFailed, LockNotGranted, RowsHidden, ServerUnavailable, TextRefused
from changeover.settings import Kind

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Row = tuple[Any, ...]
Connection = psycopg.Connection[Row]

LOCK_TIMEOUT = "2s"
"""How long a statement of ours on a user's table may wait for a lock before it makes way and tries again."""

CONNECT_TIMEOUT = 10


def application_name(migration: str, step: str) -> str:
    """Return the name that all sessions of a step bear in pg_stat_activity."""
    return f"changeover:{migration}:{step}"


def escaped(statement: sql.Composable) -> sql.SQL:
    """Return composed SQL that gets parameters: psycopg takes a percent sign, in a name too, for the beginning of one."""
    return sql.SQL(statement.as_string(None).replace("%", "%%"))


def server_name(dsn: str) -> str:
    """Return host, port and database of a DSN for messages: never a user or a secret."""
    given = conninfo_to_dict(dsn)
    parts = {**_defaults(), **given}
    if parts.get("service") and not (given.get("host") or given.get("hostaddr")):
        return f"service {parts['service']}"
    host = parts.get("host") or parts.get("hostaddr") or "local socket"
    return f"{host}:{parts.get('port') or 5432}/{parts.get('dbname') or parts.get('user') or ''}"


def _defaults() -> dict[str, str]:
    """Return what libpq takes from the environment where a DSN says nothing."""
    return {one.keyword.decode(): one.val.decode() for one in pq.Conninfo.get_defaults() if one.val and one.envvar}


def connect(
    dsn: str,
    application: str,
    *,
    autocommit: bool = True,
    replication: bool = False,
    settings: Mapping[str, str] | None = None,
    kind: Kind = Kind.OURS,
) -> Connection:
    """Open a pinned session; raises ServerUnavailable in one sentence (driver, task or application).

    `kind` says whose statements it runs: what is pinned goes by that.
    """
    wanted = {**pins.pinned(kind), **(settings or {})}
    conninfo = make_conninfo(
        dsn,
        application_name=application,
        connect_timeout=str(CONNECT_TIMEOUT),
        client_encoding=wanted["client_encoding"],
        options=options_of(dsn, wanted),
        **({"replication": "database"} if replication else {}),
    )
    try:
        connection = psycopg.connect(conninfo, autocommit=autocommit)
    except psycopg.OperationalError as error:
        said = _first_line(error)
        hint = f"; {NO_POOLER}" if "unsupported startup parameter" in said else ""  # pgbouncer's words
        raise ServerUnavailable(server_name(dsn), f"{said}{hint}") from error
    try:
        _pin(connection, dsn, kind, settings or {})
    except BaseException:
        connection.close()
        raise
    return connection


def options_of(dsn: str, settings: Mapping[str, str]) -> str:
    """Return the options of a session: ours come behind those of the DSN, and win."""
    given = _given_options(dsn)
    ours = " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())
    return f"{given} {ours}" if given else ours


def _given_options(dsn: str) -> str | None:
    """Return the options that the DSN, its service or the environment give; libpq takes the first of them alone."""
    parts = conninfo_to_dict(dsn)
    if "options" in parts or not (parts.get("service") or os.environ.get("PGSERVICE")):
        return str(parts.get("options") or os.environ.get("PGOPTIONS") or "") or None
    begun = pq.PGconn.connect_start(dsn.encode())  # it reads the service file first
    found = next((one.val for one in begun.info if one.keyword == b"options"), None)
    begun.finish()
    return found.decode() if found else None


OURS_OR_FILES = frozenset(
    {"application_name", "client_encoding", "connect_timeout", "passfile", "replication", "service", "servicefile"}
)
"""Words of a session that are ours, or name a file that is at hand here alone."""


def settled(dsn: str, connection: Connection) -> str:
    """Return the DSN of a session in words that mean the same elsewhere: tasks have not the driver's files and environment."""
    wire = connection.pgconn
    told = {one.keyword.decode(): one.val.decode() for one in wire.info if one.val and one.val != one.compiled}
    told |= {"password": wire.password.decode(), "options": _given_options(dsn) or ""}
    return make_conninfo("", **{name: value for name, value in told.items() if value and name not in OURS_OR_FILES})


FROM_ENVIRONMENT = ("TimeZone", "DateStyle")
"""What libpq sends for PGTZ and PGDATESTYLE, behind the options and so above them: they are set once more."""


def _pin(connection: Connection, dsn: str, kind: Kind, given: Mapping[str, str]) -> None:
    """Pin what the options could not, and look whether all of it holds, in one round trip; `given` is the caller's own."""
    first = pins.pinned(kind)
    after = {**{name: first[name] for name in FROM_ENVIRONMENT}, **pins.later(connection.info.server_version, kind)}
    wanted = {name: value for name, value in {**first, **after}.items() if name not in given}
    after = {name: value for name, value in after.items() if name not in given}
    query = sql.SQL("{}; {}").format(pins.statements(after), pins.deviations(wanted))
    with speaking_to(dsn, "pinning a session's settings"):
        result = connection.pgconn.exec_(query.as_bytes(connection))
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise psycopg.errors.error_from_result(result)
    if result.ntuples:
        name, value = ((result.get_value(0, place) or b"").decode() for place in (0, 1))
        raise ServerUnavailable(server_name(dsn), f"the session has {name} = {value} whatever we set: {NO_POOLER}")


NO_POOLER = "name the server itself in the DSN, and no pooler that keeps settings back or changes sessions between transactions"


@contextmanager
def speaking_to(dsn: str, doing: str) -> Iterator[None]:
    """Turn psycopg's errors into ours: a broken connection is not a refused statement."""
    try:
        yield
    except psycopg.Error as error:
        raise failure(dsn, doing, error) from error


def failure(dsn: str, doing: str, error: psycopg.Error) -> ChangeoverError:
    """Return an error of psycopg as ours."""
    server, said = server_name(dsn), _first_line(error)
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return LockNotGranted(server, f"lock for {doing}", said)
    if isinstance(error, psycopg.errors.AdminShutdown | psycopg.errors.CrashShutdown | psycopg.errors.CannotConnectNow):
        return ServerUnavailable(server, said)
    if error.sqlstate is None:  # no answer of a server: the connection itself failed
        return ServerUnavailable(server, said)
    if hides_rows(error):
        return RowsHidden(server, role_of(dsn), said)
    if isinstance(error, psycopg.errors.CharacterNotInRepertoire | psycopg.errors.UntranslatableCharacter):
        return TextRefused(server, doing, "; ".join([said, *WHERE.findall(error.diag.context or "")]))
    return DatabaseFailed(server, doing, said)


WHERE = re.compile(r"column \S+(?=:)|associated LSN \S+")
"""What a server tells of the place of a value, without the value."""


def hides_rows(error: psycopg.Error) -> bool:
    """Return whether the server refused a statement because a policy would have hidden rows, whatever language it speaks."""
    return error.sqlstate == "42501" and error.diag.source_function == "check_enable_rls"


def role_of(dsn: str) -> str:
    """Return the role that a DSN names as a statement has it, for messages."""
    name = conninfo_to_dict(dsn).get("user")
    return sql.Identifier(str(name)).as_string() if name else "ROLE"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].removeprefix("connection failed: ") if text else type(error).__name__


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

    from changeover.files import folders
    from changeover.spark import java, launch

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
    # one physical form for all files of a lake, whoever writes them: readers take INT96 and shifted days for other moments
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.parquet.writeLegacyFormat": "false",
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.datetimeRebaseModeInRead": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInRead": "CORRECTED",
}


def _submitted() -> bool:
    """Return whether spark-submit has already started the JVM, whose own configuration then counts."""
    return "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_ENV_LOADED" in os.environ
