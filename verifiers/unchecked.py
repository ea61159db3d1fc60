"""What could not be checked: reasons gathered table by table, so that one table keeps no other from its verdict.

A reason is raised when the others have their verdicts, and nothing that is in here is ever "equal". Lives on the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import psycopg

from changeover.errors import ChangeoverError, sentence, together

log = logging.getLogger(__name__)

T = TypeVar("T")
Names = tuple[str, str]
"""A source table and a target."""


class Unchecked:
    """Why some tables can't be compared with some targets, filled as that comes to light."""

    def __init__(self) -> None:
        self.reasons: dict[Names, Exception] = {}

    def left(self, chosen: Mapping[Names, T]) -> dict[Names, T]:
        """Return what can still be compared."""
        return {names: load for names, load in chosen.items() if names not in self.reasons}

    @contextmanager
    def at(self, names: Collection[Names]) -> Iterator[None]:
        """Let an error of the block be the reason for some tables, and the block's caller go on with the others."""
        try:
            yield
        except (ChangeoverError, psycopg.Error) as error:
            self.add(names, error)

    def add(self, names: Collection[Names], reason: Exception) -> None:
        """Take down why some tables can't be compared; the first reason stays."""
        for source, target in [load for load in names if load not in self.reasons]:
            log.error("no verdict on %s in %s: %s", source, target, sentence(reason))
            self.reasons[source, target] = reason

    def require_none(self) -> None:
        """Raise the reason, or where there are several CouldNotFinish with all of them."""
        if self.reasons:
            raise together(list(self.reasons.values()))
