"""Masking: values of sensitive columns, and of what is computed from them, are shown nowhere; a key shows as a hash.

The spec names source columns (`[[table]] sensitive`). Samples, reports, JSON, the ledger's verdicts, log files, sentences and
notebooks show a mask; the table of differences, which nobody but its owner reads, holds the values. A hash tells one row from
another one and finds it again, no more: who can guess a value can tell whether it is that one. Pure; runs anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from changeover.jobs.transform.derivation import Derivation, mentioned
from changeover.spec import Table
from changeover.stores.base.interface import HASHED

MASK = "***"
DIGITS = 12
"""Hexadecimal digits of a hash that are shown: enough to tell a sample's keys apart."""


@dataclass(frozen=True)
class Mask:
    """The columns of one side of a table whose values are hidden, and those of its key.

    `bounds` says that bounds of ranges, which are keys of rows, are hidden too.
    """

    columns: frozenset[str] = frozenset()
    key: tuple[str, ...] = ()
    bounds: bool = False

    def shown(self, name: str, value: Any) -> Any:
        """Return a value as it may be shown; NULL stays visible, it is no value (pure).

        Args:
            name: The column.
            value: Its value.

        Returns:
            The value, or what stands for a hidden one.
        """
        if name not in self.columns or value is None:
            return value
        return hashed(value) if name in self.key else MASK

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row, or the columns of it that are there, as they may be shown (pure).

        Args:
            values: Column and value.

        Returns:
            Column, and the value or what stands for it.
        """
        return {name: self.shown(name, value) for name, value in values.items()}


def hashed(value: object) -> str:
    """Return what stands for a value of a key: the begin of the SHA-256 of its text."""
    return HASHED + hashlib.sha256(str(value).encode()).hexdigest()[:DIGITS]


def of_source(table: Table, identity: Iterable[str] = ()) -> Mask:
    """Return what of a source row is hidden (pure).

    Args:
        table: The table of the spec.
        identity: The columns of the replica identity.

    Returns:
        The mask of its columns.
    """
    return Mask(frozenset(table.sensitive), tuple(identity))


def of_target(table: Table, derivations: Mapping[str, Derivation]) -> Mask:
    """Return what of a target row is hidden: each column whose expression names a sensitive source column.

    Args:
        table: The table of the spec.
        derivations: What fills each target column.

    In doubt a column is hidden: where a function of the spec's makes the rows, all are.

    Returns:
        The mask of its columns.
    """
    if not table.sensitive:
        return Mask()
    every = table.function is not None
    hidden = {name for name, one in derivations.items() if every or mentioned(table.sensitive, [one.expression])}
    return Mask(frozenset(hidden | set(table.sensitive)), table.key, bounds=True)
