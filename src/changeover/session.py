"""Sessions with PostgreSQL: the one place where they are made and pinned.

Every PostgreSQL session of ours, the walsender's and Spark's JDBC ones too, has the values of
`settings.PINNED`. So what it reads, writes or waits for depends on no setting of a server, a role
or the environment. A session that does not hold them is refused. It bears
`changeover:<migration>:<step>` as its application name. Nothing here runs at import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import pq, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from changeover import settings as pins
from changeover.errors import ChangeoverError, DatabaseFailed, LockNotGranted, RowsHidden, ServerUnavailable, TextRefused
from changeover.position import parse_lsn
from changeover.settings import Kind

Row = tuple[Any, ...]
Connection = psycopg.Connection[Row]

LOCK_TIMEOUT = "2s"
"""How long a statement of ours on a user's table may wait for a lock before it makes way and tries again."""


NO_ENCODING = "SQL_ASCII"
"""The encoding of a server that keeps whatever bytes it is given."""

CONNECT_TIMEOUT = 10


def application_name(migration: str, step: str) -> str:
    """Return the name that all sessions of a step bear in pg_stat_activity.

    Args:
        migration: The migration's name.
        step: The step.

    Returns:
        The name.
    """
    return f"changeover:{migration}:{step}"


def escaped(statement: sql.Composable) -> sql.SQL:
    """Return composed SQL that gets parameters: psycopg takes a percent sign, in a name too, for the beginning of one.

    Args:
        statement: The SQL, which needs no connection to be written.

    Returns:
        The SQL, each percent sign doubled.
    """
    return sql.SQL(statement.as_string(None).replace("%", "%%"))


def server_name(dsn: str) -> str:
    """Return host, port and database of a DSN for messages: never a user or a secret.

    Args:
        dsn: The DSN.

    Returns:
        `host:port/database`, or the service's name.
    """
    given = conninfo_to_dict(dsn)
    parts = {**_defaults(), **given}
    if parts.get("service") and not (given.get("host") or given.get("hostaddr")):
        return f"service {parts['service']}"
    host = parts.get("host") or parts.get("hostaddr") or "local socket"
    return f"{host}:{parts.get('port') or 5432}/{parts.get('dbname') or parts.get('user') or ''}"


def _defaults() -> dict[str, str]:
    """Return what libpq takes from the environment where a DSN says nothing."""
    return {option.keyword.decode(): option.val.decode() for option in pq.Conninfo.get_defaults() if option.val and option.envvar}


def connect(
    dsn: str,
    application: str,
    *,
    autocommit: bool = True,
    replication: bool = False,
    settings: Mapping[str, str] | None = None,
    kind: Kind = Kind.OURS,
) -> Connection:
    """Open a pinned session (driver, task or application).

    Args:
        dsn: The DSN.
        application: The session's name in pg_stat_activity.
        autocommit: Whether each statement is a transaction.
        replication: Whether it speaks the replication protocol.
        settings: What it sets besides what is pinned; these win.
        kind: Whose statements it runs: what is pinned goes by that.

    Returns:
        The session; the caller closes it.

    Raises:
        ServerUnavailable: The server can't be reached, or refuses the session.
    """
    values = {**pins.pinned(kind), **(settings or {})}
    conninfo = make_conninfo(
        dsn,
        application_name=application,
        connect_timeout=str(CONNECT_TIMEOUT),
        client_encoding=values["client_encoding"],
        options=options_of(dsn, values),
        **({"replication": "database"} if replication else {}),
    )
    try:
        connection = psycopg.connect(conninfo, autocommit=autocommit)
    except psycopg.OperationalError as error:
        message = _first_line(error)
        hint = f"; {NO_POOLER}" if "unsupported startup parameter" in message else ""  # pgbouncer's words
        raise ServerUnavailable(server_name(dsn), f"{message}{hint}") from error
    try:
        _pin(connection, dsn, kind, settings or {})
    except BaseException:
        connection.close()
        raise
    return connection


def options_of(dsn: str, settings: Mapping[str, str]) -> str:
    """Return the options of a session: ours come behind those of the DSN, and win.

    Args:
        dsn: The DSN.
        settings: Our settings, by name.

    Returns:
        The text of libpq's `options`.
    """
    given = _given_options(dsn)
    ours = " ".join(f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items())
    return f"{given} {ours}" if given else ours


def _given_options(dsn: str) -> str | None:
    """Return the options that the DSN, its service or the environment give; libpq takes the first of them alone."""
    parts = conninfo_to_dict(dsn)
    if "options" in parts or not (parts.get("service") or os.environ.get("PGSERVICE")):
        return str(parts.get("options") or os.environ.get("PGOPTIONS") or "") or None
    begun = pq.PGconn.connect_start(dsn.encode())  # it reads the service file first
    options = next((option.val for option in begun.info if option.keyword == b"options"), None)
    begun.finish()
    return options.decode() if options else None


OURS_OR_FILES = frozenset(
    {"application_name", "client_encoding", "connect_timeout", "passfile", "replication", "service", "servicefile"}
)
"""Words of a session that are ours, or name a file that is at hand here alone."""


def settled(dsn: str, connection: Connection) -> str:
    """Return the DSN of a session in words that mean the same elsewhere: tasks have not the driver's files and environment.

    Args:
        dsn: The DSN by which the session was opened.
        connection: A session with the server.

    Returns:
        The DSN, which holds the password.
    """
    wire = connection.pgconn
    options = [option for option in wire.info if option.val and option.val != option.compiled]
    parameters = {option.keyword.decode(): option.val.decode() for option in options if option.val}
    parameters |= {"password": wire.password.decode(), "options": _given_options(dsn) or ""}
    return make_conninfo("", **{name: value for name, value in parameters.items() if value and name not in OURS_OR_FILES})


FROM_ENVIRONMENT = ("TimeZone", "DateStyle")
"""What libpq sends for PGTZ and PGDATESTYLE, behind the options and so above them: they are set once more."""


def _pin(connection: Connection, dsn: str, kind: Kind, given: Mapping[str, str]) -> None:
    """Pin what the options could not, and look whether all of it holds, in one round trip; `given` is the caller's own."""
    first = pins.pinned(kind)
    after = {**{name: first[name] for name in FROM_ENVIRONMENT}, **pins.later(connection.info.server_version, kind)}
    expected = {name: value for name, value in {**first, **after}.items() if name not in given}
    after = {name: value for name, value in after.items() if name not in given}
    query = sql.SQL("{}; {}").format(pins.statements(after), pins.deviations(expected))
    with speaking_to(dsn, "pinning a session's settings"):
        result = connection.pgconn.exec_(query.as_bytes(connection))
        if result.status != pq.ExecStatus.TUPLES_OK:
            raise psycopg.errors.error_from_result(result)
    if result.ntuples:
        name, value = ((result.get_value(0, column) or b"").decode() for column in (0, 1))
        raise ServerUnavailable(server_name(dsn), f"the session has {name} = {value} whatever we set: {NO_POOLER}")


NO_POOLER = "name the server itself in the DSN, and no pooler that keeps settings back or changes sessions between transactions"


@contextmanager
def speaking_to(dsn: str, doing: str) -> Iterator[None]:
    """Turn psycopg's errors into ours: a broken connection is not a refused statement.

    Args:
        dsn: The server's DSN.
        doing: What the block does, for the message.

    Raises:
        ServerUnavailable: The connection broke.
        LockNotGranted: A bounded wait for a lock ended.
        RowsHidden: A policy would hide rows from our role.
        TextRefused: The encoding has no place for a text.
        DatabaseFailed: The server refused a statement.
    """
    try:
        yield
    except psycopg.Error as error:
        raise failure(dsn, doing, error) from error


def failure(dsn: str, doing: str, error: psycopg.Error) -> ChangeoverError:
    """Return an error of psycopg as ours."""
    server, message = server_name(dsn), _first_line(error)
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return LockNotGranted(server, f"lock for {doing}", message)
    if isinstance(error, psycopg.errors.AdminShutdown | psycopg.errors.CrashShutdown | psycopg.errors.CannotConnectNow):
        return ServerUnavailable(server, message)
    if error.sqlstate is None:  # no answer of a server: the connection itself failed
        return ServerUnavailable(server, message)
    if hides_rows(error):
        return RowsHidden(server, role_of(dsn), message)
    if isinstance(error, psycopg.errors.CharacterNotInRepertoire | psycopg.errors.UntranslatableCharacter):
        return TextRefused(server, doing, "; ".join([message, *WHERE.findall(error.diag.context or "")]))
    return DatabaseFailed(server, doing, message)


WHERE = re.compile(r"column \S+(?=:)|associated LSN \S+")
"""What a server tells of the place of a value, without the value."""


def hides_rows(error: psycopg.Error) -> bool:
    """Return whether the server refused a statement because a policy would have hidden rows, whatever language it speaks.

    Args:
        error: The server's error.

    Returns:
        True for that refusal alone.
    """
    return error.sqlstate == "42501" and error.diag.source_function == "check_enable_rls"


def role_of(dsn: str) -> str:
    """Return the role that a DSN names as a statement has it, for messages."""
    name = conninfo_to_dict(dsn).get("user")
    return sql.Identifier(str(name)).as_string() if name else "ROLE"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].removeprefix("connection failed: ") if text else type(error).__name__


def encoding_of(connection: Connection) -> str:
    """Return a server's encoding.

    Args:
        connection: A session with the server.

    Returns:
        The encoding as PostgreSQL names it, or `unknown`.
    """
    return connection.info.parameter_status("server_encoding") or "unknown"


def has_no_encoding(connection: Connection) -> bool:
    """Return whether a server takes any bytes as text.

    Args:
        connection: A session with the server.

    Returns:
        True for SQL_ASCII.
    """
    return encoding_of(connection) == NO_ENCODING


def one_row(cursor: psycopg.Cursor[Row]) -> Row:
    """Return the row of a statement that always has one (driver, task or application).

    Args:
        cursor: What `execute` returned.

    Returns:
        The next row, as a tuple of the statement's columns.

    Raises:
        DatabaseFailed: The statement returned no row.
    """
    row = cursor.fetchone()
    if row is None:
        raise DatabaseFailed(
            server_name(cursor.connection.info.dsn), "answering a query that has one row", f"there is none ({cursor.statusmessage})"
        )
    return row


def wal_position(connection: Connection) -> int:
    """Return where a server's log is now.

    Args:
        connection: An open session with the server; it must not be a standby.

    Returns:
        The insert LSN in bytes. What is visible now lies below it; what commits later lies at it or above.

    Raises:
        DatabaseFailed: The server gave no position.
    """
    return parse_lsn(one_row(connection.execute("SELECT pg_current_wal_insert_lsn()::text"))[0])
