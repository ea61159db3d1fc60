"""Trouble with a folder: full, read-only, removed, not ours, over its quota, or broken, said in one sentence that names it.

Python, Arrow and Delta's writer each say it in their own way, some of them in text alone; here it becomes one error. Nothing that
was promised to be durable is lost by it, so whoever writes there may wait until the folder takes what comes again.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltalake.exceptions import DeltaError

from changeover.errors import FolderFailed

TROUBLES = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EIO,
    errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ELOOP, errno.ENAMETOOLONG, errno.ETXTBSY,
})  # fmt: skip
TOLD = re.compile(r"\(os error (\d+)\)")
"""How Delta's writer, which is written in Rust, ends its text."""

ABSENT = re.compile(r"File not found: |Object at location .* not found")
"""What it says of a file of its own that has gone."""

IN_JAVA = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)}
"""What the JVM repeats of the system's words."""


def trouble(error: BaseException) -> str | None:
    """Return what the system said of a folder, None for an error of another kind (pure).

    Args:
        error: The error.

    Returns:
        The system's message, or None.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, OSError | DeltaError):
        match = TOLD.search(str(error))
        number = int(match[1]) if match else errno.ENOENT if ABSENT.search(str(error)) else None
    return os.strerror(number) if number in TROUBLES else None


def trouble_in(text: str) -> str | None:
    """Return what the system said of a folder in a text of the JVM's (pure).

    Args:
        text: What the JVM said.

    Returns:
        The system's message, or None.
    """
    return next((message for message in IN_JAVA if message in text), None)


@contextmanager
def working(folder: Path | str) -> Iterator[None]:
    """Turn what goes wrong with a folder while the block works there into FolderFailed.

    Args:
        folder: The folder that the block works in.

    Raises:
        FolderFailed: The folder is full, read-only, gone or not ours.
    """
    try:
        yield
    except (OSError, DeltaError) as error:
        message = trouble(error)
        if message is None and isinstance(error, DeltaError) and not Path(folder).exists():
            message = os.strerror(errno.ENOENT)  # its writer may speak of a version that is none
        if message is None:
            raise
        raise FolderFailed(str(folder), message) from error
