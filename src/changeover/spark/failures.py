"""Spark's failures as ours: one sentence with the table and the place, out of the layers of a distributed stack trace.

A task of ours does not raise its own errors through Spark, it returns them as data (`failure_of`, `raise_failures`), so that they
arrive whole. What remains is Spark's: a value that does not fit under ANSI rules, or the JDBC reader's lost connection. What a
server answered is told by its SQLSTATE, since its words are of whatever language it speaks.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from changeover.errors import (
    ChangeoverError,
    CouldNotFinish,
    FolderFailed,
    RowRefused,
    RowsHidden,
    ServerUnavailable,
    SnapshotLost,
    TextRefused,
)
from changeover.files.trouble import trouble_in
from changeover.spark.jars import NATIVE, SOCKETS, JarsMissing

UNREACHABLE = re.compile(
    r"PSQLException: (.*(?:refused|terminating connection|I/O error|connection attempt failed|has been closed|EOF|shutting down"
    r"|starting up).*)"
)
NOT_CONNECTED = "FAILED_JDBC.CONNECTION"
"""Spark's class of a connection that Java could not have."""

HIDDEN = re.compile(r"PSQLException: ERROR: (.*row-level security policy.*)")
NOT_TEXT = re.compile(r"PSQLException: ERROR: (invalid byte sequence for encoding .*|.* has no equivalent in encoding .*)")
SNAPSHOT_LOOK = "and not the exported snapshot"
"""What the reader itself raises in a session that sees something else."""

SNAPSHOT = re.compile(r"PSQLException: ERROR: (.*(?:snapshot).*)")
DATABASE = re.compile(r"PSQLException: (?:ERROR: )?(.*)")
OURS = "[NOT_CARRIED]"
"""What our own expressions raise begins so, in Spark and in the server's message alike."""
VALUE = re.compile(r"\[([A-Z_.]+)\] (.*)")
WRITING = re.compile(r"\[TASK_WRITE_FAILED\] Task failed while writing rows to (?:file:)?(\S+?)\.?(?:\s|$)")
"""What Spark says of files that it could not write, whatever the system said of them."""

GIVEN = re.compile(r"The value '.*?' of the type")
"""Where Spark repeats a value."""

ROW = re.compile(
    r"PSQLException: (?:ERROR: )?"
    r"((?:invalid byte sequence|character with byte sequence|invalid input syntax|Bad value for type)[^:\n]*)"
)
"""What the server or its driver says against a value of the source, up to where it repeats it."""

EXCEPTION = "org.postgresql.util.PSQLException"

GONE = re.compile("08...|57P0[123]|53300")
"""SQLSTATEs of a server that is out of reach, goes down or comes up, or has no session left."""

NO_TEXT = ("22021", "22P05")
SOCKETS_MISSING = "ClassNotFoundException: org.newsclub.net.unix"
IMPORTING = ("ImportSnapshot", "SetTransactionSnapshot")
"""Functions of the server that refuse a snapshot; their SQLSTATEs are those of other refusals, too."""


@dataclass(frozen=True)
class Answer:
    """What a server, or its driver in Java, answered: the SQLSTATE, the server's own function that said so, and its words."""

    state: str
    routine: str
    words: str


@contextmanager
def from_spark(table: str, location: str) -> Iterator[None]:
    """Turn errors of Spark actions into ours (driver).

    Args:
        table: The table, for the message.
        location: Where it is read or written, for the message.

    Raises:
        ChangeoverError: An action failed, as `as_ours` tells it.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise as_ours(error, table, location) from error


def as_ours(error: Any, table: str, location: str) -> ChangeoverError:
    """Return an error of Spark's, or of the bridge to it, as ours (driver).

    Args:
        error: What pyspark or py4j raised.
        table: The table, for the message.
        location: Where it is read or written, for the message.

    Returns:
        Our error, not yet raised.
    """
    below = list(_causes(error))
    answer = next((_answer(cause) for cause in below if cause.getClass().getName() == EXCEPTION), None)
    return translated("\n".join((str(error), *(str(cause.toString()) for cause in below))), table, location, answer)


def _causes(error: Any) -> Iterator[Any]:
    """Return what lies below an error in the JVM: Spark's own words leave it out where a connection was not had."""
    cause = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    while cause is not None:
        yield cause
        cause = cause.getCause()


def _answer(refusal: Any) -> Answer:
    message = refusal.getServerErrorMessage()  # None where the driver refused by itself
    words = message.getMessage() if message is not None else refusal.getMessage()
    return Answer(
        refusal.getSQLState() or "", (message.getRoutine() or "") if message is not None else "", words or "no reason given"
    )


def translated(text: str, table: str, location: str, answer: Answer | None = None) -> ChangeoverError:
    """Return the error of ours that a stack trace, and what the server answered where that is known, tell of."""
    trouble, written = trouble_in(text), WRITING.search(text)
    if trouble or written:
        folder = written[1] if written else f"table {table}, {location}: Spark's scratch folder (spark.local.dir)"
        return FolderFailed(folder, trouble or "Spark's task failed while it wrote there")
    if SOCKETS_MISSING in text:
        return JarsMissing(
            "junixsocket, by which Java reaches a server at a socket, is not there: run"
            " `python -m changeover.spark.jars`, or give Spark"
            f" the packages {','.join(package.coordinates for package in (SOCKETS, NATIVE))}; then run the same command again"
        )
    failure = _answered(answer, table, location) if answer and NOT_CONNECTED not in text else _told(text, table, location)
    if failure is not None:
        return failure
    if match := VALUE.search(text):
        problem = GIVEN.sub("A value of the type", match[2].split(" SQLSTATE")[0])
        return RowRefused(table, location, f"{match[1]}: {problem.strip()}")
    lines = [line for line in text.splitlines() if line.strip()]
    return CouldNotFinish(f"table {table}, {location}: Spark failed: {lines[0] if lines else 'no reason given'}")


def _answered(answer: Answer, table: str, location: str) -> ChangeoverError | None:
    """Return what an answer means, None for what an expression of ours raised; it does not go by the words."""
    server, words = f"the server of table {table}", answer.words.strip().partition("\n")[0]
    if GONE.fullmatch(answer.state):
        return ServerUnavailable("the source or target server", words)
    if answer.routine == "check_enable_rls":
        return RowsHidden(server, "ROLE", words)
    if answer.state in NO_TEXT:
        return TextRefused(server, f"reading {location}", words)
    if answer.routine in IMPORTING or SNAPSHOT_LOOK in words:
        return SnapshotLost("of this migration", words)
    if OURS in words:
        return None
    if answer.state.startswith("22"):
        known = ROW.match(f"PSQLException: {words}")  # in another language a value may stand anywhere
        return RowRefused(table, location, known[1].strip() if known else f"a value can't be read (SQLSTATE {answer.state})")
    return CouldNotFinish(f"table {table}, {location}: the server refused: {words}")


def _told(text: str, table: str, location: str) -> ChangeoverError | None:
    """Return what a text alone tells of a server's answer."""
    if match := UNREACHABLE.search(text):
        return ServerUnavailable("the source or target server", match[1].strip())
    if NOT_CONNECTED in text:
        match = DATABASE.search(text)
        return ServerUnavailable(f"the server of table {table}", f"from Java: {match[1].strip() if match else 'no reason given'}")
    if match := HIDDEN.search(text):
        return RowsHidden(f"the server of table {table}", "ROLE", match[1].strip())
    if match := NOT_TEXT.search(text):
        return TextRefused(f"the server of table {table}", f"reading {location}", match[1].strip())
    if match := SNAPSHOT.search(text):
        return SnapshotLost("of this migration", match[1].strip())
    if OURS not in text and (match := ROW.search(text)):
        return RowRefused(table, location, match[1].strip())
    if OURS not in text and (match := DATABASE.search(text)):
        return CouldNotFinish(f"table {table}, {location}: the server refused: {match[1].strip()}")
    return None


def failure_of(error: ChangeoverError) -> bytes:
    """Return an error as bytes that a task can yield (task).

    Args:
        error: The error.

    Returns:
        The bytes, which `raise_failures` reads.
    """
    return pickle.dumps(error)


def raise_failures(failures: Iterable[bytes | bytearray | None]) -> None:
    """Raise the first error that a task yielded (driver).

    Args:
        failures: What each task yielded, None where it went well.

    Raises:
        ChangeoverError: The error of the first task that failed.
    """
    for failure in failures:
        if failure is not None:
            error = pickle.loads(bytes(failure))
            if not isinstance(error, ChangeoverError):
                raise TypeError(f"a task yielded {type(error).__name__} as its failure")
            raise error
