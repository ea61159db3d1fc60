"""Spark's failures as ours: one sentence with the table and the place, out of the layers of a distributed stack trace.

A task of ours does not raise its own errors through Spark, it returns them as data (`failure_of`, `raise_failures`), so that they
arrive whole. What remains is Spark's: a value that does not fit under ANSI rules, or the JDBC reader's lost connection.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from changeover.fileerrors import trouble_in

UNREACHABLE = re.compile(
    r"PSQLException: (.*(?:refused|terminating connection|I/O error|connection attempt failed|has been closed|EOF|shutting down"
    r"|starting up).*)"
)
NOT_CONNECTED = "FAILED_JDBC.CONNECTION"
"""Spark's class of a connection that Java could not have."""

HIDDEN = re.compile(r"PSQLException: ERROR: (.*row-level security policy.*)")
NOT_TEXT = re.compile(r"PSQLException: ERROR: (invalid byte sequence for encoding .*|.* has no equivalent in encoding .*)")
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


@contextmanager
def from_spark(table: str, place: str) -> Iterator[None]:
    """Turn errors of Spark actions into ours (driver)."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise translated("\n".join((str(error), *_causes(error))), table, place) from error


def _causes(error: Any) -> Iterator[str]:
    """Return what lies below an error in the JVM: Spark's own words leave it out where a connection was not had."""
    cause = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    while cause is not None:
        yield str(cause.toString())
        cause = cause.getCause()


def translated(text: str, table: str, place: str) -> ChangeoverError:
    """Return the error of ours that a stack trace tells of."""
    said, written = trouble_in(text), WRITING.search(text)
    if said or written:
        folder = written[1] if written else f"table {table}, {place}: Spark's scratch folder (spark.local.dir)"
        return FolderFailed(folder, said or "Spark's task failed while it wrote there")
    if match := UNREACHABLE.search(text):
        return ServerUnavailable("the source or target server", match[1].strip())
    if NOT_CONNECTED in text:
        match = DATABASE.search(text)
        return ServerUnavailable(f"the server of table {table}", f"from Java: {match[1].strip() if match else 'no reason given'}")
    if match := HIDDEN.search(text):
        return RowsHidden(f"the server of table {table}", "ROLE", match[1].strip())
    if match := NOT_TEXT.search(text):
        return TextRefused(f"the server of table {table}", f"reading {place}", match[1].strip())
    if match := SNAPSHOT.search(text):
        return SnapshotLost("of this migration", match[1].strip())
    if OURS not in text and (match := ROW.search(text)):
        return RowRefused(table, place, match[1].strip())
    if OURS not in text and (match := DATABASE.search(text)):
        return CouldNotFinish(f"table {table}, {place}: the server refused: {match[1].strip()}")
    if match := VALUE.search(text):
        said = GIVEN.sub("A value of the type", match[2].split(" SQLSTATE")[0])
        return RowRefused(table, place, f"{match[1]}: {said.strip()}")
    lines = [line for line in text.splitlines() if line.strip()]
    return CouldNotFinish(f"table {table}, {place}: Spark failed: {lines[0] if lines else 'no reason given'}")


def failure_of(error: ChangeoverError) -> bytes:
    """Return an error as bytes that a task can yield (task)."""
    return pickle.dumps(error)


def raise_failures(failures: Iterable[bytes | bytearray | None]) -> None:
    """Raise the first error that a task yielded (driver)."""
    for failure in failures:
        if failure is not None:
            error = pickle.loads(bytes(failure))
            if not isinstance(error, ChangeoverError):
                raise TypeError(f"a task yielded {type(error).__name__} as its failure")
            raise error
