"""Fixtures for shadow reads: comparisons over two real databases, and experiments that keep what they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.router.endpoint import Cursor
from changeover.flags.shadow.comparisons import Comparisons
from changeover.flags.shadow.experiment import Answer, Experiment, Observation, Result
from changeover.flags.shadow.judge import Comparison
from changeover.flags.shadow.positions import LedgerPositions
from tests.support.fix_flags import PATIENCE, Stores

MakeComparisons = Callable[..., Comparisons]


@pytest.fixture
def make_comparisons(stores: Stores) -> Iterator[MakeComparisons]:
    """Make comparisons of the two stores; all of them are closed."""
    made: list[Comparisons] = []

    def make(
        limit: int = 100, deadline: float = PATIENCE, waits: tuple[float, ...] = (0.02, 0.04, 0.08), **more: Any
    ) -> Comparisons:
        endpoints = {origin: stores.endpoint(origin) for origin in Origin}
        comparisons = Comparisons(endpoints, "test", limit=limit, deadline=deadline, waits=waits, **more)
        made.append(comparisons)
        return comparisons

    yield make
    for comparisons in made:
        comparisons.close()


class Recorded(Experiment):
    """Keeps what is published and raised."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.results: list[Result] = []
        self.failures: list[str] = []

    def publish(self, result: Result) -> None:
        """Keep a result."""
        self.results.append(result)

    def raised(self, operation: str, error: Exception) -> None:
        """Keep the hook's name."""
        self.failures.append(operation)


def rows_of(origin: Origin) -> Callable[[Cursor], list[dict[str, Any]]]:
    """Return what reads a store's rows, under names that both have."""
    statement, names = {
        Origin.OLD: ("SELECT from_user, note FROM public.follows ORDER BY 1", ("subject", "note")),
        Origin.NEW: ("SELECT subject, attributes->>'note' FROM public.associations ORDER BY 1", ("subject", "note")),
    }[origin]
    return lambda cursor: [dict(zip(names, row, strict=True)) for row in cursor.execute(statement).fetchall()]


def offer(
    comparisons: Comparisons, experiment: Experiment, control: Any, origin: Origin = Origin.OLD,
    reads: dict[Origin, Callable[[Cursor], Any]] | None = None, beside: dict[str, Answer] | None = None,
    tell: Callable[[Result | None], None] = lambda result: None,
) -> bool:  # fmt: skip
    """Offer a read of which the authority's answer is known."""
    stage = Stage.SHADOW if origin is Origin.OLD else Stage.LIVE
    seen = Observation(origin, control, None, 0.0)
    reads = reads or {o: rows_of(o) for o in Origin}
    return comparisons.offer(Comparison(experiment, stage, origin, seen, reads, beside or {}, tell=tell))


def put(stores: Stores, origin: Origin, user: int, note: str) -> None:
    """Put a row into one store."""
    if origin is Origin.OLD:
        stores.old.execute("INSERT INTO public.follows (from_user, to_channel, note) VALUES (%s, 1, %s)", [user, note])
    else:
        stores.new.execute(
            "INSERT INTO public.associations VALUES (%s, 1, jsonb_build_object('note', %s::text), NULL, now())",
            [user, note],
        )


EVERYTHING = "FFFFFFFF/FFFFFFFF"
"""A position that every other one lies below."""


@pytest.fixture
def by_position(stores: Stores, make_comparisons: MakeComparisons) -> Comparisons:
    """Return comparisons that go by the ledger, in which the test plays replay."""
    stores.ledger.connection.execute(
        "INSERT INTO changeover.migration (name, format, spec_digest, spec) VALUES ('follows', 1, '', '{}')"
    )
    stores.ledger.connection.execute(
        "INSERT INTO changeover.load (migration, store, source, target, state, applied)"
        " VALUES ('follows', 'old', 'public.follows', 'new', 'closed', '0/0')"
    )
    endpoints = {origin: stores.endpoint(origin) for origin in Origin}
    return make_comparisons(positions=LedgerPositions(endpoints, stores.new_dsn, "follows", "new", "test"))


def offered(stores: Stores, applied: str, told: str) -> None:
    """Play replay: say how far the new store's load has come."""
    stores.ledger.connection.execute("UPDATE changeover.load SET applied = %s, told = %s", [applied, told])
