"""The log of a run: a file of its own for every run, and for services the same lines on standard error.

Only changeover's own loggers go there, at debug level on request; secrets never do, because no message is made of a DSN. A log that
can't be written ends no run.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from changeover.errors import FolderFailed
from changeover.files import folders
from changeover.files.trouble import working
from changeover.spec import Spec

TEXT, JSON = "text", "json"
LINE = "%(asctime)s %(levelname)s %(name)s %(message)s"
TOLD = "told"
"""Attribute of a log record whose sentence the command prints anyway."""


class RunLog(logging.FileHandler):
    """A log file; where it can't be written that is said once, on standard error."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say it once, and go on without the file."""
        if not self.failed:
            self.failed = True
            error = sys.exc_info()[1]
            print(f"changeover: the log file {self.baseFilename} can't be written ({error}); the run goes on", file=sys.stderr)


class Line(logging.Formatter):
    """One line for a person: the message, and no traceback, which the log file has."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {record.levelname} {record.getMessage()}".replace("\n", " ")


class JsonLine(Line):
    """One JSON object a line, for a collector of logs."""

    def __init__(self, migration: str, step: str) -> None:
        super().__init__()
        self.fixed = {"migration": migration, "step": step}

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "logger": record.name, **self.fixed, "message": record.getMessage()}
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def log_file(spec: Spec, step: str, debug: bool = False, stream: str | None = None) -> Iterator[Path | None]:
    """Log this run into a file of its own under the work folder, and with `stream` to standard error, as text or as JSON.

    Args:
        spec: The migration's spec.
        step: The step, which names the file.
        debug: Whether messages at debug level are logged too.
        stream: `text` or `json` for standard error besides; None leaves it alone.

    Yields:
        The file; None where there can be none and there is a stream.

    Raises:
        FolderFailed: There can be no file, and there is no stream.
    """
    handlers: list[logging.Handler] = []
    path = None
    if stream is not None:
        handlers.append(_stream(spec, step, stream))
    try:
        file = _file(spec, step)
        handlers.append(file)
        path = Path(file.baseFilename)
    except FolderFailed as error:
        if stream is None:
            raise
        handlers[0].emit(logging.LogRecord(__name__, logging.WARNING, __file__, 0, "no log file: %s", (error,), None))
    logger = logging.getLogger("changeover")
    before = (logger.level, logger.propagate)
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logger.info("%s of %s, spec %s", step, spec.name, spec.digest)
    try:
        yield path
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _file(spec: Spec, step: str) -> logging.FileHandler:
    with working(spec.work / "logs"):
        file = RunLog(folders.work(spec, "logs") / f"{step}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter(LINE))
    return file


def _stream(spec: Spec, step: str, kind: str) -> logging.Handler:
    # the process's own, where a collector of logs reads; whoever puts another in its place asks for the command's answer
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLine(spec.name, step) if kind == JSON else Line())
    if kind == TEXT:
        handler.addFilter(lambda record: not getattr(record, TOLD, False))
    return handler
