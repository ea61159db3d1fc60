"""The record of a run: a log file of its own for every run.

Only changeover's own loggers go to the file, at debug level on request; secrets never do, because no message is made of a DSN.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from changeover import folders
from changeover.spec import Spec


@contextmanager
def log_file(spec: Spec, step: str, debug: bool = False) -> Iterator[Path]:
    """Log this run into a file of its own under the work folder."""
    path = folders.work(spec, "logs") / f"{step}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("changeover")
    before = (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    logger.info("%s of %s, spec %s", step, spec.name, spec.digest)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        handler.close()
