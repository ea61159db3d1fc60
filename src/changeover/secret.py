"""A secret as the spec has it: a name of an environment variable, or a DSN that holds none.

The variable is read when the DSN is used, and its value is never kept, printed or hashed. What is
no DSN is refused in a sentence that repeats none of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from psycopg import Error as PsycopgError
from psycopg.conninfo import conninfo_to_dict

from changeover.errors import SecretMissing, SpecError, UsageError

ENV = "env:"


@dataclass(frozen=True)
class Secret:
    """A DSN as the spec has it: an environment reference, or a DSN without a password."""

    key: str
    reference: str

    def resolve(self) -> str:
        """Look the DSN up.

        Returns:
            The DSN, which may hold a password.

        Raises:
            SecretMissing: The environment variable is not set.
            UsageError: Its value is no DSN.
        """
        if not self.reference.startswith(ENV):
            return self.reference
        value = in_environment(self.key, self.reference)
        if problem := dsn_problem(value):
            raise UsageError(f"{self.key}: the environment variable {self.reference.removeprefix(ENV)} {problem}")
        return value


def in_environment(key: str, reference: str) -> str:
    """Return what an environment variable holds.

    Args:
        key: The key in the spec, for messages.
        reference: `env:NAME`.

    Returns:
        The secret.

    Raises:
        SecretMissing: The variable is not set.
    """
    variable = reference.removeprefix(ENV)
    value = os.environ.get(variable)
    if not value:
        raise SecretMissing(key, variable)
    return value


def dsn_problem(value: str) -> str | None:
    """Return why a text is no DSN; the text itself, and what libpq says of it, may hold a password and are never repeated."""
    shape = "write postgresql://USER@HOST:PORT/DATABASE or host=… port=… dbname=… user=…"
    try:
        parts = conninfo_to_dict(value)
    except PsycopgError:
        return f"is not a PostgreSQL DSN: {shape}"
    if "@" in str(parts.get("host") or "").lstrip("@"):
        return "is not a PostgreSQL DSN: its host holds an @, so write the @ of a password or user as %40"
    return None


def secret(path: str, key: str, value: str) -> Secret:
    """Return a DSN as a reference.

    Args:
        path: The spec's path, for messages.
        key: The key in the spec, for messages.
        value: A DSN, or `env:NAME`.

    Returns:
        The reference, which is resolved when it is used.

    Raises:
        SpecError: The value is no DSN, or holds a password.
    """
    if not value.startswith(ENV):
        if problem := dsn_problem(value):
            raise SpecError(path, key, problem)
        if "password" in conninfo_to_dict(value):
            problem = 'has a password in the file: put the DSN into an environment variable, "env:NAME"'
            raise SpecError(path, key, problem)
    return Secret(key, value)
