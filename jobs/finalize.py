"""Finalize and abort: the two ends of a migration.

`finalize` keeps the new store's tables and the ledger's record, and takes everything else away. `abort` leaves the old store as it
was. Each is refused while a store has authority that would lose rows by it.
"""

from __future__ import annotations

from changeover.errors import Refused
from changeover.jobs.install.removal import abort_targets, drop_empty_schema, remove_from_source, remove_unfinished
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.ledger import Ledger, drop_ledger
from changeover.jobs.ledger.records import CLOSED
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.spool.table import remove_spools
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base.interface import TargetTable
from changeover.tenants import EVERY, describe


def abort(spec: Spec) -> list[str]:
    """Undo all that prepare made; the old store is as it was (driver; starts no JVM).

    Args:
        spec: The migration's spec.

    Returns:
        What was removed, each as a phrase.

    Raises:
        Refused: The new store has authority over some row, and the old store lacks what is written
            there.
    """
    with Ledger.open(spec, "abort") as ledger:
        prepared = ledger.exists()
        if prepared and (gone := epochs.at(ledger.authorities(), NEW)) is not None:
            scope = "" if gone == EVERY else f" over {describe(gone)}"
            raise Refused(f"abort: authority{scope} has moved to the new store: `changeover flags rollback` first")
        if prepared:
            if ledger.reads():  # nobody is to read from a table that goes
                ledger.record_flag(None, 0)
            removed = reverse_setup.remove(spec, ledger) + remove_from_source(spec)
            removed += abort_targets(spec, {(load.source, load.target): load.created for load in ledger.loads()})
            drop_ledger(ledger.connection, spec.name)
            drop_empty_schema(ledger.connection)
        else:
            removed = remove_unfinished(spec, ledger)
    if remove_spools(spec.work):
        removed.append("spool")
    return removed


def finalize(spec: Spec) -> list[str]:
    """End the migration, and keep its tables and the ledger's record (driver; starts no JVM).

    What is ours in the old store is dropped, and so are the gates, tombstones and the spool.

    Args:
        spec: The migration's spec.

    Returns:
        What was removed, each as a phrase.

    Raises:
        Refused: A load is open, or the old store has authority over some row.
    """
    with Ledger.open(spec, "finalize") as ledger:
        ledger.stream("finalize")
        open_loads = [f"{load.source} in {load.target}" for load in ledger.loads() if load.state != CLOSED]
        if open_loads:
            raise Refused(f"finalize: not loaded yet: {', '.join(open_loads)}")
        left = epochs.at(ledger.authorities(), OLD) if spec.flag is not None else None
        if left is not None:
            scope = "" if left == EVERY else f" over {describe(left)}"
            raise Refused(f"finalize: the old store still has authority{scope}: `changeover flags advance` up to complete first")
        removed = reverse_setup.remove(spec, ledger) + remove_from_source(spec)
        for table in spec.tables:
            for target in spec.targets.values():
                with open_store(spec, target, "finalize") as store:
                    # a table that its owner dropped has left our own beside it
                    columns = store.columns(*table.target_name) or ()
                    store.finalize(TargetTable(*table.target_name, columns, table.key))
        ledger.connection.execute("UPDATE changeover.migration SET finalized = now() WHERE name = %s", [spec.name])
        ledger.audit("finalize", "done", {"removed": removed})
    remove_spools(spec.work)
    return removed
