"""Target tables: each as prepare makes it, with its gate, and with the rights by which the application uses both.

In PostgreSQL the columns that are moved or carried do by themselves what they did before. Table, defaults and rights come in one
transaction, so a prepare that was killed leaves none of them alone. Runs on the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from changeover.jobs.access import privileges
from changeover.jobs.ledger.records import Stream
from changeover.session import application_name, connect, speaking_to
from changeover.spec import Spec
from changeover.stores.base.interface import Store
from changeover.stores.postgres.store import PostgresStore
from changeover.stores.tables import defaults

if TYPE_CHECKING:
    from changeover.jobs.transform.transform import Transform

log = logging.getLogger(__name__)


def create_target(spec: Spec, store: Store, planned: Transform) -> None:
    """Create a target table; in PostgreSQL its columns do by themselves what the old ones do, and the application may use it.

    Args:
        spec: The migration's spec.
        store: The target's store, open.
        planned: The transform of the table.

    Raises:
        ServerUnavailable: A store can't be reached.
        DatabaseFailed: A store refuses a statement.
    """
    if not isinstance(store, PostgresStore):
        store.create(planned.target)
        return
    old_dsn, source, target = spec.source.dsn.resolve(), planned.table.source_name, planned.table.target_name
    carried = {name: one.origin for name, one in planned.derivations.items() if one.origin is not None}
    with connect(old_dsn, application_name(spec.name, "prepare")) as old, store.connection.transaction():
        store.create(planned.target)
        with speaking_to(store.dsn, f"giving {planned.target} its defaults"):
            column_defaults = defaults.of_table(old, *source)
            own = {name: column_defaults[origin] for name, origin in carried.items()}
            defaults.make(store.connection, planned.target, own)
            _name_what_is_not_made(store, planned, own)
            privileges.allow_table(spec, old, store.connection, source, target, carried)


def _name_what_is_not_made(store: PostgresStore, planned: Transform, own: Mapping[str, defaults.Own]) -> None:
    for name, one in own.items():
        if (why := defaults.why_not(store.connection, one)) is not None:
            log.warning("%s.%s has no default, as %s.%s has: %s", planned.target, name, planned.table.source, one.name, why)


def install_gate(spec: Spec, store: Store, planned: Transform, stream: Stream) -> None:
    """Install a target's gate, and let the application's mirrored writes pass it.

    Args:
        spec: The migration's spec.
        store: The target's store, open.
        planned: The transform of the table.
        stream: The prepared stream, whose position the images bear.
    """
    store.install(planned.target, stream.image)
    if isinstance(store, PostgresStore) and spec.flag is not None and spec.flag.target == store.name:
        privileges.allow_gate(spec, store.connection, store.gated(planned.target))
