"""Refuses to start a server or Java, in a quick run of the tests and in every Python process that it starts.

Python imports a module of this name by itself where it finds one on its path, so the tests' own processes have it too. Each
refusal is written to the file that the environment names, because a program may take the exception for an error of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

VARIABLE = "CHANGEOVER_TESTS_REFUSED"
"""The environment variable that names the file. Without it nothing is refused."""

PROGRAMS = frozenset({"initdb", "java", "pg_ctl", "postgres"})
"""Programs that are refused. A script of such a name is a test's own and may run."""

SCRIPTS = frozenset({"spark-class", "spark-submit"})
"""What starts Java although it is a script."""

EVENTS = frozenset({"os.exec", "os.posix_spawn", "subprocess.Popen"})
"""The audit events of a program's start: https://docs.python.org/3/library/audit_events.html"""


class Refused(RuntimeError):
    """A quick test was about to start a server or Java."""


def heard(event: str, arguments: tuple[object, ...]) -> None:
    """Raise where a program is started that has to wait for `make test`; a question for its version is let through."""
    if event not in EVENTS or (record := os.environ.get(VARIABLE)) is None:
        return
    program, words = os.fsdecode(arguments[0]), arguments[1]  # type: ignore[arg-type]
    if starts_much(program) and not (isinstance(words, list | tuple) and "--version" in words):
        with open(record, "a", encoding="utf-8") as file:
            print(program, file=file)
        raise Refused(f"a quick test starts {program}: mark the test `heavy`, or let it do without")


def starts_much(program: str) -> bool:
    """Return whether a program is a server's or starts Java."""
    name, path = os.path.basename(program), shutil.which(program)
    if path is None or name not in PROGRAMS:
        return name in SCRIPTS
    with Path(path).open("rb") as file:
        return file.read(5) in (b"\x7fELF\x01", b"\x7fELF\x02")


sys.addaudithook(heard)
