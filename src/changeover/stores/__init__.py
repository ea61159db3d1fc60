"""The stores that a table can move to.

`base` has the interface and what all stores share. `postgres` and `delta` implement it. `tables` reads what a PostgreSQL table
has by itself. A third kind of store implements `Store` and is entered in `open_store`; nothing else asks what kind a store is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from changeover.spec import Spec, Target
from changeover.stores.base.interface import Store


def open_store(spec: Spec, target: Target, step: str) -> AbstractContextManager[Store]:
    """Open a target store for a step (driver).

    Args:
        spec: The migration's spec.
        target: The target.
        step: The step, which names the session.

    Returns:
        A context manager: the store, whose session ends with the block.

    Raises:
        ServerUnavailable: The store's server can't be reached.
    """
    if target.kind == "postgres":
        from changeover.stores.postgres.store import PostgresStore

        return PostgresStore.open(target, spec.name, step)
    from changeover.stores.delta.store import DeltaStore

    return _unclosed(DeltaStore(target.name, target.folder, spec.name, spec.mode))


@contextmanager
def _unclosed(store: Store) -> Iterator[Store]:
    """A store without a session needs no closing."""
    yield store
