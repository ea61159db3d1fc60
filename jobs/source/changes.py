"""The change source: what the old store's slot and its trigger log have in common, whoever asks.

Both bring the changes of all tables in commit order, from a position on. They differ in how a
position is had, how a snapshot is found that fits one, and how their state is told. Everything
runs on the driver, and nothing here starts a JVM.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from changeover.errors import SourceChanged
from changeover.jobs.ledger.records import Stream
from changeover.jobs.source import replication, snapshot, ticks, triggerlog
from changeover.session import Connection, application_name, wal_position
from changeover.spec import SLOT, TRIGGER, Spec
from changeover.stores.postgres.store import importing


@dataclass(frozen=True)
class SourceState:
    """How a source stands: `position` is the server's own, and `reading` says whether capture reads.

    `kept_bytes` of WAL are kept for a slot, `log_bytes` has a log; `alarm` is what is to be done, as a sentence.
    """

    position: str
    reading: str
    kept_bytes: int | None
    log_bytes: int | None
    alarm: str | None


class ChangeSource(Protocol):
    """Where the old store's changes come from."""

    def require_whole(self, step: str, stream: Stream, durable: int) -> None:
        """Raise unless this is still the prepared stream, whole from a position on.

        Args:
            step: The step that asks, for the session's name.
            stream: The stream on record.
            durable: The LSN up to which all is spooled.

        Raises:
            SourceChanged: It is another server, or slot or log are gone or others.
            SpoolGap: The stream does not go back to what is durable.
        """
        ...

    def gap(self, old: Connection, stream: Stream) -> SourceChanged | None:
        """Return what came in place of the prepared slot or log.

        Args:
            old: A session with the old store.
            stream: The stream on record.

        Returns:
            The change, as the error that may be raised; None where it is as it was.
        """
        ...

    def state(self, old: Connection) -> SourceState:
        """Return how it stands.

        Args:
            old: A session with the old store.

        Returns:
            The state.
        """
        ...

    def position(self, step: str, old: Connection) -> int:
        """Return where the log is now: below it stands what is visible, at it or above what commits later.

        Args:
            step: The step that asks, for the session's name.
            old: A session with the old store.

        Returns:
            The position, an LSN.
        """
        ...

    def aligned(self, step: str, held: ExitStack) -> ticks.Aligned:
        """Return a position with a snapshot that shows exactly what the stream has below it.

        Args:
            step: The step that asks, for the session's name.
            held: What holds the snapshot's session.

        Returns:
            The position as an LSN, the session, and the snapshot for others to import.

        Raises:
            SlotBlocked: A transaction of the source stays open; it names the oldest.
        """
        ...


@dataclass(frozen=True)
class SlotSource:
    """A logical slot, which streams what commits."""

    dsn: str
    migration: str
    slot: str

    def require_whole(self, step: str, stream: Stream, durable: int) -> None:
        """Ask server, slot and the position that it keeps."""
        replication.require_stream(self.dsn, application_name(self.migration, step), stream, durable)

    def gap(self, old: Connection, stream: Stream) -> SourceChanged | None:
        """Compare the slot."""
        return replication.slot_change(old, stream)

    def state(self, old: Connection) -> SourceState:
        """Return the slot's state."""
        position, reading, kept = replication.slot_state(old, self.migration, self.slot)
        return SourceState(position, reading, kept, None, replication.slot_alarm(old, self.slot))

    def position(self, step: str, old: Connection) -> int:
        """Return the server's own position."""
        return wal_position(old)

    def aligned(self, step: str, held: ExitStack) -> ticks.Aligned:
        """Make a temporary slot, whose creation gives both."""
        application = application_name(self.migration, step)
        made = snapshot.create_slot(self.dsn, application, f"{self.slot}_{step}", temporary=True)
        held.enter_context(made.session)
        return ticks.Aligned(made.l0, *held.enter_context(importing(self.dsn, application, made.snapshot)))


@dataclass(frozen=True)
class LogSource:
    """A log that triggers write, read tick by tick."""

    dsn: str
    migration: str
    slot: str

    @property
    def log(self) -> triggerlog.Log:
        """Return the log's names."""
        return triggerlog.Log(self.migration)

    def require_whole(self, step: str, stream: Stream, durable: int) -> None:
        """Ask server, log and the tick that ends there."""
        ticks.require_log(self.dsn, application_name(self.migration, step), stream, self.migration, durable)

    def gap(self, old: Connection, stream: Stream) -> SourceChanged | None:
        """Look whether the log is there."""
        return None if triggerlog.exists(old, self.log) else SourceChanged("trigger log", str(self.log), "missing")

    def state(self, old: Connection) -> SourceState:
        """Return the log's state; no WAL is kept for it."""
        reading, size, alarm = triggerlog.state(old, self.migration)
        return SourceState(replication.slot_state(old, self.migration, self.slot)[0], reading, None, size, alarm)

    def position(self, step: str, old: Connection) -> int:
        """Record a tick, and return its end."""
        with ticks.log_session(self.dsn, application_name(self.migration, step)) as session:
            return ticks.cut(session, self.log)

    def aligned(self, step: str, held: ExitStack) -> ticks.Aligned:
        """Record a tick whose snapshot is held."""
        return held.enter_context(ticks.aligned(self.dsn, application_name(self.migration, step), self.log))


SOURCES: dict[str, type[SlotSource] | type[LogSource]] = {SLOT: SlotSource, TRIGGER: LogSource}


def change_source(spec: Spec) -> ChangeSource:
    """Return where the old store's changes come from, as the spec says.

    Args:
        spec: The migration's spec.

    Returns:
        The source.

    Raises:
        SecretMissing: The environment variable of the DSN is not set.
    """
    return SOURCES[spec.source.capture](spec.source.dsn.resolve(), spec.name, spec.slot)
