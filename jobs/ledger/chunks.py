"""Chunks: who may mark one, when a table may be closed, and when changes may be merged, as pure functions.

A chunk is a key range that is loaded once. Each attempt at it has a fencing token; claiming the open chunks for a new attempt
fences off every earlier one, whatever it still does. The ledger states these rules in SQL (`ledger.mark_loaded`, `claim`);
tests hold it against them, and the model checker runs them. Nothing here touches a store.
"""

from __future__ import annotations

from changeover.position import Version


def first_token(epoch: int) -> int:
    """Return the token of an epoch's chunks before the first attempt: above that of every attempt of an earlier epoch.

    Args:
        epoch: The epoch in which the tables were begun, 0 first.

    Returns:
        The fencing token, a number without unit.
    """
    return epoch << 32


def same_file(prepared: int, file: int | None) -> bool:
    """Return whether a source table has the file that was prepared; None says that the table is gone.

    A table rewritten under the snapshot reads as empty, without any event.

    Args:
        prepared: The `pg_class.relfilenode` that prepare recorded.
        file: The present one, None where the table is gone.

    Returns:
        Whether both are one file.
    """
    return file == prepared


def mergeable(merges_while_loading: bool, closed: bool) -> bool:
    """Return whether replay may offer changes to a target now.

    Where an append is blind to the rows that are there (Delta), replay begins only after the last
    chunk.

    Args:
        merges_while_loading: Whether the store takes changes beside images
            (`Store.merges_while_loading`).
        closed: Whether the load is closed: every chunk is in, and swept.

    Returns:
        Whether changes may be offered.
    """
    return merges_while_loading or closed


def acknowledged(durable: int, received: int) -> int:
    """Return the position that the slot may forget: what is durably in the spool, however much more was received.

    Args:
        durable: The spool's end, a commit END LSN in bytes.
        received: Up to where the server has sent, an LSN in bytes.

    Returns:
        The LSN to confirm to the server.
    """
    return durable


def append_name(migration: str, image: Version, source: str, target: str, chunk: int) -> str:
    """Return the name under which a chunk is appended once; a table that outlives an abort remembers the names that it took.

    Args:
        migration: The migration's name.
        image: v0, the version of all images of the epoch.
        source: The source table, as the spec names it.
        target: The target's name.
        chunk: The chunk's number, from 0.

    Returns:
        The application id of Delta's `txn` action.
    """
    return f"changeover/{migration}/{image}/{source}/{target}/{chunk}"
