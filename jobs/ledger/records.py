"""The ledger's tables and the records in them, as frozen rows: what a migration can know for certain.

An entry is what a query of the ledger answers, with LSNs as integers and keys in PostgreSQL's text form. It holds no session, so it
pickles and may be read anywhere. The statements that write and read entries are in `ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from changeover.position import Version, image_version

FORMAT = 7
"""Version of the ledger's tables; another version found is refused, never guessed at."""

SCHEMA = """
CREATE SCHEMA IF NOT EXISTS changeover;
CREATE TABLE IF NOT EXISTS changeover.migration (
    name text PRIMARY KEY, format integer NOT NULL, spec_digest text NOT NULL, spec jsonb NOT NULL,
    prepared timestamptz NOT NULL DEFAULT now(), finalized timestamptz, epoch integer NOT NULL DEFAULT 0, begun integer);
CREATE TABLE IF NOT EXISTS changeover.stream (
    migration text NOT NULL REFERENCES changeover.migration ON DELETE CASCADE, store text NOT NULL CHECK (store IN ('old', 'new')),
    l0 pg_lsn NOT NULL, system_id text NOT NULL, timeline integer NOT NULL, slot text NOT NULL, publication text NOT NULL,
    snapshot text NOT NULL, visible text NOT NULL, definition jsonb NOT NULL DEFAULT '[]',
    opened timestamptz NOT NULL DEFAULT now(), broken text, PRIMARY KEY (migration, store));
CREATE TABLE IF NOT EXISTS changeover.source_table (
    migration text NOT NULL REFERENCES changeover.migration ON DELETE CASCADE, store text NOT NULL, source text NOT NULL,
    filenode bigint NOT NULL, columns jsonb NOT NULL, partitioned boolean NOT NULL DEFAULT false,
    PRIMARY KEY (migration, store, source));
CREATE TABLE IF NOT EXISTS changeover.source_partition (
    migration text NOT NULL, store text NOT NULL, source text NOT NULL, oid bigint NOT NULL, name text NOT NULL,
    filenode bigint NOT NULL, attached text NOT NULL, PRIMARY KEY (migration, store, source, oid),
    FOREIGN KEY (migration, store, source) REFERENCES changeover.source_table ON DELETE CASCADE);
CREATE TABLE IF NOT EXISTS changeover.load (
    migration text NOT NULL REFERENCES changeover.migration ON DELETE CASCADE, store text NOT NULL, source text NOT NULL,
    target text NOT NULL, state text NOT NULL, applied pg_lsn NOT NULL, created boolean NOT NULL DEFAULT false,
    types jsonb NOT NULL DEFAULT '{}', refused bigint NOT NULL DEFAULT 0, swept bigint NOT NULL DEFAULT 0,
    events bigint NOT NULL DEFAULT 0, told pg_lsn NOT NULL DEFAULT '0/0', stopped text, changed timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, store, source, target));
CREATE TABLE IF NOT EXISTS changeover.chunk (
    migration text NOT NULL, store text NOT NULL DEFAULT 'old', source text NOT NULL, target text NOT NULL,
    chunk integer NOT NULL, lower jsonb, upper jsonb, token bigint NOT NULL DEFAULT 0, loaded timestamptz, rows bigint,
    refused bigint, seconds double precision, PRIMARY KEY (migration, source, target, chunk),
    FOREIGN KEY (migration, store, source, target) REFERENCES changeover.load ON DELETE CASCADE);
CREATE TABLE IF NOT EXISTS changeover.authority (
    migration text NOT NULL, epoch integer NOT NULL, store text NOT NULL CHECK (store IN ('old', 'new')),
    from_lsn pg_lsn NOT NULL, at timestamptz NOT NULL DEFAULT now(), pause_seconds double precision, new_lsn pg_lsn,
    tenants text[], PRIMARY KEY (migration, epoch));
CREATE TABLE IF NOT EXISTS changeover.verdict (
    migration text NOT NULL, run bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT now(), source text NOT NULL,
    target text NOT NULL, verdict text NOT NULL, stage text, detail jsonb NOT NULL, PRIMARY KEY (migration, run));
CREATE TABLE IF NOT EXISTS changeover.heartbeat (
    migration text NOT NULL, process text NOT NULL, at timestamptz NOT NULL, stage text NOT NULL, epoch integer NOT NULL,
    counters jsonb NOT NULL, PRIMARY KEY (migration, process));
CREATE TABLE IF NOT EXISTS changeover.flag (
    migration text PRIMARY KEY, stage text, reads integer NOT NULL DEFAULT 0, switches bigint NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS changeover.read_difference (
    migration text NOT NULL, entry bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    experiment text NOT NULL, stage text NOT NULL, authority text NOT NULL, looks integer NOT NULL, position pg_lsn,
    description text, PRIMARY KEY (migration, entry));
CREATE TABLE IF NOT EXISTS changeover.audit (
    migration text NOT NULL, entry bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT now(),
    step text NOT NULL, outcome text NOT NULL, detail jsonb NOT NULL, PRIMARY KEY (migration, entry));
"""

LEDGER_TABLES = (
    "chunk",
    "load",
    "source_partition",
    "source_table",
    "stream",
    "authority",
    "verdict",
    "heartbeat",
    "flag",
    "read_difference",
    "audit",
    "migration",
)
"""All of the ledger's tables, in an order in which they can be dropped."""

PENDING, LOADED, CLOSED = "pending", "loaded", "closed"
"""States of a load: chunks open; all chunks committed; swept, so that it may be verified and read.

One of the new store's stream has no chunks, and is closed from the beginning.
"""

OLD, NEW = "old", "new"
"""The stores between which authority moves, each with a stream of its own."""

OLD_STORE = "old store"
"""The old store as a target of reverse replication; no target of a spec can bear a name with a space."""


@dataclass(frozen=True)
class Stream:
    """A store's change stream on record: what must still be true at every connect."""

    l0: int
    system_id: str
    timeline: int
    slot: str
    publication: str
    snapshot: str
    visible: str
    epoch: int = 0
    """The epoch in which the tables were begun: 0, or that of the last `prepare --anew`."""
    opened: datetime | None = None
    """When it was recorded, by the ledger's clock; None before."""
    broken: str | None = None
    """Why it is of no use any more, as the new store's may be; the next fence opens another one."""

    @property
    def image(self) -> Version:
        """Return v0, the version of every backfill image."""
        return image_version(self.l0, self.epoch)


@dataclass(frozen=True)
class SourceColumn:
    """A column of a source table as it was at prepare: PostgreSQL's type by name and oid, in the table's order."""

    name: str
    type: str
    oid: int
    array: bool
    key: bool
    not_null: bool
    typmod: int | None = None
    """The type's modifier, None where nobody looked."""
    number: int | None = None
    """Its number in the table, which a column of the same name that is added anew has not; None where nobody looked."""


@dataclass(frozen=True)
class Partition:
    """A part of a partitioned source table: its file, 0 where it is partitioned itself, and the transaction that attached it."""

    name: str
    oid: int
    filenode: int
    attached: str


@dataclass(frozen=True)
class Load:
    """How far one table has come in one target, by one store's stream.

    `applied` says that every event with a smaller commit LSN of that store's log was offered, and `stopped` why it goes no further.
    """

    source: str
    target: str
    state: str
    applied: int
    created: bool
    refused: int
    swept: int
    events: int
    types: Mapping[str, str] = field(default_factory=dict)
    """The type that each column of the target was planned to have, by the name that its store has for it."""
    stopped: str | None = None


@dataclass(frozen=True)
class ChunkRow:
    """One key range of one load: lower <= key < upper, None being infinite; key values in PostgreSQL's text form."""

    chunk: int
    lower: tuple[str, ...] | None
    upper: tuple[str, ...] | None
    loaded: datetime | None
    rows: int | None


@dataclass(frozen=True)
class Authority:
    """Which store has authority, since which epoch; `from_lsn`, `new_lsn` are where the stores' logs were then.

    In the old store's log `from_lsn` parts what was written under one authority from what came under the next, and in the new
    store's log `new_lsn` does. It is over all rows, unless tenants are named.
    """

    epoch: int
    store: str
    from_lsn: int
    at: datetime
    pause_seconds: float | None
    new_lsn: int = 0
    tenants: frozenset[str] | None = None

    @property
    def anew(self) -> bool:
        """Return whether this is no move but a new epoch of the tables (`prepare --anew`), for which nobody paused."""
        return self.store == "old" and self.pause_seconds is None


HEARTBEAT_SECONDS = 10.0
"""For how long a process counts as alive without a word: it says one twice a second."""


@dataclass(frozen=True)
class Heartbeat:
    """What a router process last said of itself."""

    process: str
    at: datetime
    stage: str
    epoch: int
    counters: Mapping[str, Any]

    def alive(self, now: datetime) -> bool:
        """Return whether the process was heard lately (pure).

        Args:
            now: The ledger's own time.

        Returns:
            True for one of the last HEARTBEAT_SECONDS.
        """
        return (now - self.at).total_seconds() <= HEARTBEAT_SECONDS


@dataclass(frozen=True)
class VerdictRow:
    """A verdict on record; `detail` is the whole verdict as JSON."""

    run: int
    at: datetime
    source: str
    target: str
    verdict: str
    stage: str | None
    detail: Mapping[str, Any]
