"""Damage: what can go wrong behind a new store's back, done on purpose, each as one plain statement.

Every kind touches reserved rows alone, which the application never writes, and goes round gate, router and stream, as a
script of somebody else's would. `verify` has to name what was done by class, key and column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from changeover.session import Connection
from changeover.verifiers.compare.verdict import EXTRA, MISMATCHED, Difference

Wait = Callable[[Callable[[], str | None]], None]
"""Waits until a function returns nothing that is waited for."""

GHOST = (3, 1)
LOST_UPDATE = (4, 2)
TIMEZONE_USER = 5
TRUNCATED = (6, 3)
LONG_NOTE = "a note that is long enough for somebody to cut it short"


@dataclass(frozen=True)
class Damaged:
    """What verify has to find: class, reserved user and column (None for a whole row), and what was done, in words."""

    done: str
    kind: str
    user: int
    column: str | None

    def is_told(self, difference: Difference) -> bool:
        """Return whether a difference is what was done."""
        same = difference.kind == self.kind and difference.key["entity_a"] == str(self.user)
        return same and (self.column is None or list(difference.columns) == [self.column])


def ghost(old: Connection, new: Connection, wait: Wait) -> Damaged:
    """Bring a row back that was deleted in the old store."""
    key = list(GHOST)
    new.execute("CREATE TEMPORARY TABLE image AS SELECT * FROM associations WHERE (entity_a, entity_b) = (%s, %s)", key)
    old.execute("DELETE FROM follows WHERE (from_user, to_channel) = (%s, %s)", key)
    _arrived(wait, new, "SELECT count(*) = 0 FROM associations WHERE (entity_a, entity_b) = (%s, %s)", key)
    new.execute("INSERT INTO associations SELECT * FROM image")
    new.execute("DROP TABLE image")
    return Damaged("a row that was deleted in the old store is back in the new one", EXTRA, GHOST[0], None)


def lost_update(old: Connection, new: Connection, wait: Wait) -> Damaged:
    """Put the value from before an update back."""
    key = list(LOST_UPDATE)
    before = new.execute("SELECT note FROM associations WHERE (entity_a, entity_b) = (%s, %s)", key).fetchone()
    note = before[0] if before is not None else None
    old.execute("UPDATE follows SET note = 'the newer note' WHERE (from_user, to_channel) = (%s, %s)", key)
    _arrived(wait, new, "SELECT note = 'the newer note' FROM associations WHERE (entity_a, entity_b) = (%s, %s)", key)
    new.execute("UPDATE associations SET note = %s WHERE (entity_a, entity_b) = (%s, %s)", [note, *key])
    return Damaged("an older value is over a newer one", MISMATCHED, LOST_UPDATE[0], "note")


def timezone(old: Connection, new: Connection, wait: Wait) -> Damaged:
    """Read a user's first timestamp as if it were of another zone."""
    new.execute(
        "UPDATE associations SET blocked_on = blocked_on AT TIME ZONE 'UTC' AT TIME ZONE 'America/Los_Angeles'"
        " WHERE entity_a = %(user)s AND entity_b = (SELECT min(entity_b) FROM associations WHERE entity_a = %(user)s"
        " AND blocked_on IS NOT NULL)",
        {"user": TIMEZONE_USER},
    )
    return Damaged("a user's timestamp was read in the wrong time zone", MISMATCHED, TIMEZONE_USER, "blocked_on")


def truncate(old: Connection, new: Connection, wait: Wait) -> Damaged:
    """Cut a text short."""
    key = list(TRUNCATED)
    old.execute("UPDATE follows SET note = %s WHERE (from_user, to_channel) = (%s, %s)", [LONG_NOTE, *key])
    _arrived(wait, new, "SELECT note = %s FROM associations WHERE (entity_a, entity_b) = (%s, %s)", [LONG_NOTE, *key])
    new.execute("UPDATE associations SET note = left(note, 20) WHERE (entity_a, entity_b) = (%s, %s)", key)
    return Damaged("a text was cut short", MISMATCHED, TRUNCATED[0], "note")


def _arrived(wait: Wait, new: Connection, question: str, values: Sequence[object]) -> None:
    """Wait until replay has brought a change of the old store."""

    def waiting() -> str | None:
        row = new.execute(question.encode(), values).fetchone()
        return None if row is not None and row[0] else "a change of the old store did not reach the new one"

    wait(waiting)


KINDS: Mapping[str, Callable[[Connection, Connection, Wait], Damaged]] = {
    "ghost": ghost,
    "lost-update": lost_update,
    "timezone": timezone,
    "truncate": truncate,
}
"""Name on the command line -> what is done, given sessions with the old and the new store, and how to wait."""
