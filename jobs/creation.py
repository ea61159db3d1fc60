"""Creation: a target table as prepare makes it, with its gate, and with the rights by which the application uses both.

In PostgreSQL the columns that are moved or carried do by themselves what they did before. Table, defaults and rights come in one
transaction, so a prepare that was killed leaves none of them alone. Runs on the driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from changeover.jobs import privileges
from changeover.jobs.entries import Stream
from changeover.session import application_name, connect, speaking_to
from changeover.spec import Spec
from changeover.stores import Store, defaults
from changeover.stores.postgres import PostgresStore

if TYPE_CHECKING:
    from changeover.jobs.transform import Transform


def create_target(spec: Spec, store: Store, planned: Transform) -> None:
    """Create a target table; in PostgreSQL its columns do by themselves what the old ones do, and the application may use it."""
    if not isinstance(store, PostgresStore):
        store.create(planned.target)
        return
    old_dsn, source, target = spec.source.dsn.resolve(), planned.table.source_name, planned.table.target_name
    carried = {name: one.origin for name, one in planned.derivations.items() if one.origin is not None}
    with connect(old_dsn, application_name(spec.name, "prepare")) as old, store.connection.transaction():
        store.create(planned.target)
        with speaking_to(store.dsn, f"giving {planned.target} its defaults"):
            own = defaults.of_table(old, *source)
            defaults.make(store.connection, planned.target, {name: own[origin] for name, origin in carried.items()})
            privileges.allow_table(spec, old, store.connection, source, target, carried)


def install_gate(spec: Spec, store: Store, planned: Transform, stream: Stream) -> None:
    """Install a target's gate, and let the application's mirrored writes pass it."""
    store.install(planned.target, stream.image)
    if isinstance(store, PostgresStore) and spec.flag is not None and spec.flag.target == store.name:
        privileges.allow_gate(spec, store.connection, store.gated(planned.target))
