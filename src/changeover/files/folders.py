"""Folders of ours: who may look into them, and the one place where they are made.

They hold rows of the migrated tables, so by default nobody but their owner reads them (`[work] mode`). A command sets its process's
umask too, which its children and Spark's JVM inherit, so that files in a folder that was there before are as private. A folder
that is there already keeps its rights. Runs wherever a step runs.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from changeover.spec import Spec


def made(path: Path, mode: int) -> Path:
    """Make a folder, and those above it, unless it is there.

    Args:
        path: The folder.
        mode: Its rights, whatever the umask is.

    Returns:
        The same path.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    return path


def work(spec: Spec, *parts: str) -> Path:
    """Return a folder inside the work folder, both made where they are not there yet.

    Args:
        spec: The migration's spec.
        *parts: The folder's path inside the work folder, a name each.

    Returns:
        The folder.

    Raises:
        OSError: The folder can't be made.
    """
    return made(made(spec.work, spec.mode).joinpath(*parts), spec.mode)


def umask() -> int:
    """Return this process's umask, which can only be read by setting it.

    Returns:
        The mask, as `os.umask` takes it.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def keep_private(spec: Spec) -> None:
    """Have every file that this process or a child of it makes from now on be as private as the spec says (a command).

    Args:
        spec: The migration's spec.
    """
    os.umask(0o777 & ~spec.mode)


def sync(path: Path) -> None:
    """Bring a file, or a folder's entries, to stable storage.

    Args:
        path: The file or folder.

    Raises:
        OSError: The system can't.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
