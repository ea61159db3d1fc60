"""The order of what runs against a gated table, as data: which parts share a statement, which statements a transaction.

The order is part of the rule (`gate` says why). `stores.postgres.gate` runs and composes its SQL from these sequences, and the
model checker interprets the same ones statement by statement, so what is proved is what runs. Every statement of a transaction
takes a snapshot of its own (READ COMMITTED); parts that shared a statement would share its snapshot, which is why none do.
"""

from __future__ import annotations

from enum import Enum


class Part(Enum):
    """One piece of work on a gated table; rows are always locked in key order, so that two batches can't deadlock."""

    LOCK_SHARED = "takes the table's lock, shared"
    """Advisory, to the end of the transaction, and alone: the next statement's snapshot is then taken under it."""
    LOCK_EXCLUSIVE = "takes the table's lock, exclusive"
    """In a transaction of its own this is the barrier: every earlier gated statement has ended."""
    TOUCH = "touches"
    """Record the versions of changes that win, by `applies`: the floor from the snapshot, the cell under its row's lock."""
    DELETE = "deletes"
    """Delete the rows of winners that are deletes, as far as the snapshot shows them."""
    UPSERT = "upserts"
    """Write the rows of winners that are puts, always ON CONFLICT."""
    REFUSE = "refuses images of"
    """Drop the images of keys that have a row version, to count those that a tombstone refused."""
    INSERT = "inserts the image of"
    """Insert images by `image_applies`, floor and cell from the snapshot, ON CONFLICT DO NOTHING."""
    MARK = "marks the chunk"
    """Mark the chunk in the ledger by `markable`; the transaction rolls back where that fails."""
    SWEEP = "sweeps"
    """Lock the tombstones in key order, then delete their keys' rows as far as the snapshot shows them."""
    RAISE_FLOOR = "raises the floor"
    """Raise the table's floor; never lowered."""
    PURGE = "purges"
    """Delete row versions up to the floor, by `collected`, each looked at again under its lock.

    In whatever portions and order; a row that a writer holds may be passed over. A row that stays is never wrong.
    """
    LIST = "lists"
    """Make a batch of deletes at a TRUNCATE's version, one for each row that the snapshot shows and
    that has no newer row version."""
    APPEND = "appends the chunk"
    """Commit a chunk's file to a Delta table under its application id, unless `appends.appended` says that it was."""
    DROP_OLDER = "compares"
    """Drop from a batch what `applies` refuses; under the exclusive lock nothing changes beneath it."""


Statement = tuple[Part, ...]
Transaction = tuple[Statement, ...]
Procedure = tuple[Transaction, ...]

GATE: Transaction = ((Part.LOCK_SHARED,), (Part.TOUCH,), (Part.DELETE,), (Part.UPSERT,))
"""Changes, one a key, offered by replay or by a dual write."""

LOAD: Transaction = ((Part.LOCK_SHARED,), (Part.REFUSE,), (Part.INSERT,), (Part.MARK,))
"""A chunk's images and its mark."""

BARRIER: Transaction = ((Part.LOCK_EXCLUSIVE,),)

CLOSE: Procedure = (BARRIER, ((Part.SWEEP,),))
"""After the last chunk's commit; until its end a ghost may be seen, so nothing is verified, read or collected before it."""

COLLECT: Procedure = (((Part.RAISE_FLOOR,),), BARRIER, ((Part.PURGE,),))
"""Collection of row versions up to the new floor, where `floors.collectable` allows it."""

TRUNCATE: Procedure = (((Part.RAISE_FLOOR,),), BARRIER, ((Part.LIST,), *GATE))
"""A TRUNCATE of the source: the floor to `truncated_floor`, then gated deletes at the TRUNCATE's own version."""

APPEND_LOAD: Procedure = (((Part.APPEND,),), ((Part.MARK,),))
"""A chunk of a Delta table: idempotent append first, ledger second; what dies between them is appended again, without effect."""

CATCH_UP: Procedure = (
    ((Part.LOCK_EXCLUSIVE,), (Part.DROP_OLDER,), (Part.DELETE,), (Part.UPSERT,), (Part.RAISE_FLOOR,)),
)  # fmt: skip
"""A batch of replay on a closed table whose position, as `floors.caught_up_floor`, is the gate: no version is written per key.

The lock is taken where it is free, so replay waits for nobody. A direct write that appears
meanwhile waits for the batch, and then finds the floor above what it must not overwrite. TRUNCATE
and collection exclude each other by the target's lease; a sweep that is repeated finds no tombstone
of a key that the batch wrote.
"""


class Move(Enum):
    """A step by which authority over some rows moves from one store to the other."""

    FREEZE = "takes authority from the old store"
    """Commit that the losing store refuses: a trigger with the tenants in its function, or all rows; its lock is the drain."""
    POSITION = "reads the position"
    """Read the losing store's position and emit a marker there: no later write of the old authority can be above it."""
    COMPARE = "compares what the stream is with its record"
    """Under the refusal, where nobody writes any more: a change that was taken back before this moment is still seen."""
    AWAIT = "sees everything below it applied"
    RECORD = "records the new epoch"
    """The one commit by which authority moves; before it a handover can be called off, or killed, and nothing has changed."""
    RAISE_FLOOR = "raises the floor to the new epoch"


HAND_OVER: tuple[Move, ...] = (Move.FREEZE, Move.POSITION, Move.COMPARE, Move.AWAIT, Move.RECORD, Move.RAISE_FLOOR)
"""The order is the proof (`flags.fence`). A position read before the freeze may be overtaken by a
write that nobody carries. A stream that is compared before the freeze may lose one afterwards. A
floor may be raised for a hand-over which is then called off: it silently refuses whatever the old
authority goes on to write."""

AUTHORITY_READ = "catalogue"
"""Where the refusing trigger has its list of tenants from: its own function; a plain read of a table sees that of its snapshot."""

TRIGGER_LOG_TIMING = "AFTER"
"""When a trigger log draws a row's version: a BEFORE trigger draws it before the insert waits for an earlier row of its key."""
