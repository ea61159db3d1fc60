"""The ledger: what this migration knows for certain, in the schema `changeover` beside the tables that it guards.

One row per chunk and target, written in the same transaction as the chunk's rows where the target is PostgreSQL and after an
idempotent append where it is Delta. Positions, authority, verdicts, routers' heartbeats and the record of every run stand
here too. All of it runs on the driver or in the application; tasks touch the ledger only through `mark_loaded`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import Any, LiteralString, Self

import psycopg
from psycopg import sql
from psycopg.rows import class_row

from changeover.errors import ChangeoverError, CouldNotFinish, SourceChanged, StepOrder
from changeover.jobs.ledger.chunks import first_token
from changeover.jobs.ledger.lease import hold
from changeover.jobs.ledger.records import (
    FORMAT,
    OLD,
    SCHEMA,
    Authority,
    ChunkRow,
    Heartbeat,
    Load,
    SourceColumn,
    Stream,
    VerdictRow,
)
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, application_name, connect, one_row
from changeover.spec import STREAM, Spec

LOOKS = frozenset({"status", "history", "explain"})
"""Steps that change nothing, and have an answer while a new epoch is begun too."""


class Ledger:
    """A session with the ledger of one migration (driver or application); autocommit, one statement at a time."""

    def __init__(self, connection: Connection, migration: str, dsn: str) -> None:
        self.connection = connection
        self.migration = migration
        self.dsn = dsn
        self._leases: dict[str, Connection] = {}

    @classmethod
    def open(cls, spec: Spec, step: str) -> Self:
        """Connect to the ledger for a step (driver, capture, application).

        Args:
            spec: The migration's spec.
            step: The step, which names the session and the record.

        Returns:
            A context manager: the ledger, whose session ends with the block.

        Raises:
            ServerUnavailable: The ledger's server can't be reached.
            SecretMissing: The environment variable of the DSN is not set.
        """
        dsn = spec.ledger.resolve()
        return cls(connect(dsn, application_name(spec.name, step)), spec.name, dsn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for session in (*self._leases.values(), self.connection):
            session.close()

    def create(self) -> None:
        """Create the ledger's tables where they are missing."""
        self.connection.execute(SCHEMA)

    def exists(self) -> bool:
        """Return whether this migration was prepared here.

        Returns:
            Whether its record is there.

        Raises:
            SourceChanged: The ledger has another format than this version.
        """
        found = self.connection.execute("SELECT to_regclass('changeover.migration') IS NOT NULL").fetchone()
        if found is None or not found[0]:
            return False
        rows = self.connection.execute("SELECT format FROM changeover.migration WHERE name = %s", [self.migration]).fetchall()
        if rows and rows[0][0] != FORMAT:
            raise SourceChanged("ledger format", str(FORMAT), str(rows[0][0]))
        return bool(rows)

    def now(self) -> datetime:
        """Return the ledger's own time, by which heartbeats and verdicts are dated.

        Returns:
            The clock of the ledger's server.
        """
        row = one_row(self.connection.execute("SELECT clock_timestamp()"))
        found: datetime = row[0]
        return found

    # -- the migration and its stream

    def record_migration(self, spec: Spec, stream: Stream) -> None:
        """Record what prepare made; from here on the migration exists.

        Args:
            spec: The migration's spec.
            stream: What prepare made: slot or log, positions as LSNs, and the kept snapshots.
        """
        self.connection.execute(
            "INSERT INTO changeover.migration (name, format, spec_digest, spec) VALUES (%s, %s, %s, %s)",
            [spec.name, FORMAT, spec.digest, json.dumps(spec.document)],
        )
        self.record_stream(OLD, stream)

    def record_stream(self, store: str, stream: Stream) -> None:
        """Record a store's stream in place of the one before it.

        Args:
            store: `OLD` or `NEW`, whose log it is.
            stream: Slot or log, positions as LSNs of that store, and the kept snapshots.
        """
        self.connection.execute(
            "INSERT INTO changeover.stream (migration, store, l0, system_id, timeline, slot, publication, snapshot, visible)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (migration, store) DO UPDATE SET (l0, system_id, timeline,"
            " slot, publication, snapshot, visible, opened, broken) = (excluded.l0, excluded.system_id, excluded.timeline,"
            " excluded.slot, excluded.publication, excluded.snapshot, excluded.visible, now(), NULL)",
            [self.migration, store, format_lsn(stream.l0), stream.system_id, stream.timeline, stream.slot, stream.publication,
             stream.snapshot, stream.visible],
        )  # fmt: skip

    def recorded_stream(self, store: str) -> Stream | None:
        """Return a store's stream on record.

        Args:
            store: `OLD` or `NEW`.

        Returns:
            The stream, its positions as LSNs of that store; None where there is none.
        """
        row = self.connection.execute(
            "SELECT l0::text, system_id, timeline, slot, publication, snapshot, visible, epoch, opened, broken"
            " FROM changeover.stream JOIN changeover.migration ON name = migration WHERE migration = %s AND store = %s",
            [self.migration, store],
        ).fetchone()
        return Stream(parse_lsn(row[0]), *row[1:]) if row else None

    def forget_stream(self, store: str) -> None:
        """Take a store's stream off the record, with its tables and loads.

        Args:
            store: `OLD` or `NEW`.
        """
        for table in ("stream", "source_table", "load"):
            query = sql.SQL("DELETE FROM changeover.{} WHERE migration = %s AND store = %s").format(sql.Identifier(table))
            self.connection.execute(query, [self.migration, store])

    def stream(self, step: str) -> Stream:
        """Return the prepared stream.

        Args:
            step: The step, which names the session and the record.

        Returns:
            The stream, its positions as LSNs of the source.

        Raises:
            StepOrder: Prepare did not run, or `prepare --anew` did not come to its end.
        """
        stream = self.recorded_stream(OLD) if self.exists() else None
        if stream is None or (step not in LOOKS and self.begun() is not None):
            raise StepOrder(step, "prepare")
        return stream

    def begun(self) -> int | None:
        """Return the epoch that a `prepare --anew` has begun and not brought to its record.

        Returns:
            The epoch, None where there is none.
        """
        row = self.connection.execute("SELECT begun FROM changeover.migration WHERE name = %s", [self.migration]).fetchone()
        return row[0] if row else None

    def record_snapshot(self, names: str, visible: str) -> None:
        """Record the snapshot in which pending chunks are read from now on.

        Args:
            names: The exported snapshots' names, separated by spaces; empty where none is kept.
            visible: What they see, as `pg_current_snapshot()` prints it.
        """
        self.connection.execute(
            "UPDATE changeover.stream SET snapshot = %s, visible = %s WHERE migration = %s AND store = 'old'",
            [names, visible, self.migration],
        )

    def milestones(self) -> tuple[datetime, datetime | None]:
        """Return when the migration was prepared, and when it was finalized.

        Returns:
            (prepared, finalized), the second None while it is not; times of the ledger's server.

        Raises:
            StepOrder: Prepare did not run.
        """
        row = self.connection.execute(
            "SELECT prepared, finalized FROM changeover.migration WHERE name = %s", [self.migration]
        ).fetchone()
        if row is None:
            raise StepOrder("status", "prepare")
        return row[0], row[1]

    def spec_digest(self) -> str:
        """Return the hash of the spec that was prepared.

        Returns:
            The hash, as `Spec.digest` makes it.
        """
        row = self.connection.execute("SELECT spec_digest FROM changeover.migration WHERE name = %s", [self.migration]).fetchone()
        return str(row[0]) if row else ""

    def is_connected(self, step: str) -> bool:
        """Return whether a step of this migration has a session with the ledger now.

        Args:
            step: The step, by which its sessions are named.

        Returns:
            Whether there is one.
        """
        row = self.connection.execute(
            "SELECT FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"
            " AND pid <> pg_backend_pid() LIMIT 1",
            [application_name(self.migration, step)],
        ).fetchone()
        return row is not None

    def mirror(self) -> str:
        """Return what brings a write to the other store, as it is on record.

        Returns:
            `STREAM` or `APPLICATION`.
        """
        row = self.connection.execute(
            "SELECT spec #>> '{flag,mirror}' FROM changeover.migration WHERE name = %s", [self.migration]
        ).fetchone()
        return row[0] if row and row[0] else STREAM

    def record_mirror(self, mirror: str) -> None:
        """Record what brings a write to the other store from now on.

        Args:
            mirror: `STREAM` or `APPLICATION`.
        """
        self.connection.execute(
            "UPDATE changeover.migration SET spec = jsonb_set(spec, '{flag,mirror}', to_jsonb(%s::text)) WHERE name = %s",
            [mirror, self.migration],
        )

    def record_table(
        self, source: str, filenode: int, columns: Sequence[SourceColumn], partitioned: bool = False, store: str = OLD
    ) -> None:
        """Record a table of a stream as it was before the slot was made, in place of what was on record.

        Args:
            source: The table, as the spec names it in that store.
            filenode: The table's file (`pg_class.relfilenode`).
            columns: Its columns, in order.
            partitioned: Whether it is partitioned.
            store: The store whose stream it is.
        """
        key = [self.migration, store, source]
        self.connection.execute("DELETE FROM changeover.source_table WHERE (migration, store, source) = (%s, %s, %s)", key)
        self.connection.execute(
            "INSERT INTO changeover.source_table (migration, store, source, filenode, columns, partitioned)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            [*key, filenode, json.dumps([column.__dict__ for column in columns]), partitioned],
        )

    def source_table(self, source: str, store: str = OLD) -> tuple[int, tuple[SourceColumn, ...]]:
        """Return what is on record of a table of a stream.

        Args:
            source: The table, as the spec names it in that store.
            store: The store whose stream it is.

        Returns:
            (filenode, columns).

        Raises:
            StepOrder: The table is not on record.
        """
        row = self.connection.execute(
            "SELECT filenode, columns FROM changeover.source_table WHERE (migration, store, source) = (%s, %s, %s)",
            [self.migration, store, source],
        ).fetchone()
        if row is None:
            raise StepOrder(f"table {source}", "prepare")
        return row[0], tuple(SourceColumn(**column) for column in row[1])

    def record_file(self, source: str, filenode: int) -> None:
        """Record the file that a table has since a TRUNCATE.

        Args:
            source: The source table, as the spec names it.
            filenode: The table's present file (`pg_class.relfilenode`).
        """
        self.connection.execute(
            "UPDATE changeover.source_table SET filenode = %s WHERE (migration, store, source) = (%s, 'old', %s)",
            [filenode, self.migration, source],
        )

    # -- loads and chunks

    def stop(self, reason: str, source: str | None = None, target: str | None = None, store: str = OLD) -> None:
        """Record why changes of a stream go no further.

        In the old store's stream the first reason stays, for ever. In the new store's the next batch
        that is taken removes it.

        Args:
            reason: Why, as a sentence for people.
            source: The source table, as the spec names it; all unless given.
            target: The target's name; all unless given.
            store: The store whose stream it is.
        """
        self.connection.execute(
            "UPDATE changeover.load SET stopped = CASE WHEN store = 'old' THEN coalesce(stopped, %s) ELSE %s END"
            " WHERE migration = %s AND store = %s AND source = coalesce(%s, source) AND target = coalesce(%s, target)",
            [reason, reason, self.migration, store, source, target],
        )

    def stopped(self) -> dict[str, str]:
        """Return why each source table is stopped that is.

        Returns:
            Source table and reason; only tables that are stopped.
        """
        rows = self.connection.execute(
            "SELECT source, min(stopped) FROM changeover.load WHERE migration = %s AND store = 'old' AND stopped IS NOT NULL"
            " GROUP BY source ORDER BY source",
            [self.migration],
        )
        return dict(rows.fetchall())

    def record_load(self, source: str, target: str, l0: int, created: bool) -> None:
        """Record a table's load into a target as pending.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            l0: The LSN at which the stream begins, below which nothing is to be offered.
            created: Whether prepare made the target table.
        """
        self.connection.execute(
            "INSERT INTO changeover.load (migration, store, source, target, state, applied, created)"
            " VALUES (%s, 'old', %s, %s, 'pending', %s, %s)",
            [self.migration, source, target, format_lsn(l0), created],
        )

    def record_types(self, source: str, target: str, types: Mapping[str, str]) -> None:
        """Record the type that each column of a target is planned to have.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            types: Column name and type, in the store's own words.
        """
        self.connection.execute(
            "UPDATE changeover.load SET types = %s WHERE migration = %s AND store = 'old' AND source = %s AND target = %s",
            [json.dumps(types), self.migration, source, target],
        )

    def loads(self, store: str = OLD) -> list[Load]:
        """Return all loads by a store's stream, by source and target.

        Args:
            store: The store whose stream it is.

        Returns:
            The loads, with their positions as LSNs of that store.
        """
        with self.connection.cursor(row_factory=class_row(Load)) as cursor:
            return cursor.execute(
                "SELECT source, target, state, (applied - '0/0')::bigint AS applied, created, refused, swept, events, types,"
                " stopped FROM changeover.load WHERE migration = %s AND store = %s ORDER BY source, target",
                [self.migration, store],
            ).fetchall()

    def load(self, source: str, target: str, store: str = OLD) -> Load:
        """Return one load.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            store: The store whose stream it is.

        Returns:
            The load, its position as an LSN of that store.

        Raises:
            StepOrder: It is not on record.
        """
        for load in self.loads(store):
            if (load.source, load.target) == (source, target):
                return load
        raise StepOrder(f"{source} to {target}", "prepare")

    def set_state(self, source: str, target: str, state: str, epoch: int, swept: int = 0) -> None:
        """Move a load of an epoch to a state, adding the rows that its sweep removed.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            state: `PENDING`, `LOADED` or `CLOSED`.
            epoch: The epoch in which this run began.
            swept: How many rows the sweep removed.

        Raises:
            CouldNotFinish: The migration was begun anew since this run began.
        """
        self._of_epoch(epoch, "state = %s, swept = swept + %s", [state, swept], source, target)

    def advance(self, source: str, target: str, applied: int, events: int, epoch: int, store: str = OLD) -> None:
        """Record that every event of a stream below `applied` was offered; the position never goes back.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            applied: The LSN below which every event was offered, of the store's own log.
            events: How many more events were offered.
            epoch: The epoch in which this run began.
            store: The store whose stream it is.

        Raises:
            CouldNotFinish: The migration was begun anew since this run began.
        """
        change = (
            "applied = greatest(applied, %s), events = events + %s, told = CASE WHEN %s THEN greatest(told, %s) ELSE told END,"
            " stopped = CASE WHEN store = 'old' THEN stopped END"
        )
        upto = format_lsn(applied)
        self._of_epoch(epoch, change, [upto, events, events > 0, upto], source, target, store)

    def _of_epoch(
        self, epoch: int, change: LiteralString, values: Sequence[Any], source: str, target: str, store: str = OLD
    ) -> None:
        """Change a load; raises CouldNotFinish for a run that is left from before `prepare --anew`."""
        changed = self.connection.execute(
            sql.SQL("UPDATE changeover.load SET {}, changed = now() WHERE migration = %s AND store = %s AND source = %s"
                    " AND target = %s AND EXISTS (SELECT FROM changeover.migration WHERE name = %s AND epoch = %s)"
                    ).format(sql.SQL(change)),
            [*values, self.migration, store, source, target, self.migration, epoch],
        ).rowcount  # fmt: skip
        if not changed:
            raise CouldNotFinish(f"{source} in {target} was begun anew since this run began (it is of epoch {epoch}): run again")

    def record_chunks(
        self, source: str, target: str, ranges: Sequence[tuple[tuple[str, ...] | None, tuple[str, ...] | None]], epoch: int = 0
    ) -> None:
        """Record the plan of a load once, in one transaction.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            ranges: Key ranges in key order: (lower bound or None, upper bound or None), as texts.
            epoch: The epoch in which this run began.
        """
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO changeover.chunk (migration, source, target, token, chunk, lower, upper)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s)",
                [
                    [self.migration, source, target, first_token(epoch), number,
                     *(None if b is None else json.dumps(b) for b in bounds)]
                    for number, bounds in enumerate(ranges)
                ],
            )  # fmt: skip

    def chunks(self, source: str, target: str) -> list[ChunkRow]:
        """Return the chunks of a load in key order.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.

        Returns:
            The chunks, numbered from 0.
        """
        rows = self.connection.execute(
            "SELECT chunk, lower, upper, loaded, rows FROM changeover.chunk"
            " WHERE migration = %s AND source = %s AND target = %s ORDER BY chunk",
            [self.migration, source, target],
        ).fetchall()
        return [ChunkRow(r[0], *(None if b is None else tuple(b) for b in r[1:3]), *r[3:]) for r in rows]  # type: ignore[arg-type]

    def claim(self, source: str, target: str) -> int:
        """Fence off every earlier attempt at the open chunks of a load (`gate.claimed`).

        Args:
            source: The source table, as the spec names it.
            target: The target's name.

        Returns:
            This attempt's fencing token.
        """
        row = one_row(
            self.connection.execute(
                "WITH next AS (SELECT coalesce(max(token), 0) + 1 AS token FROM changeover.chunk"
                " WHERE migration = %(m)s AND source = %(s)s AND target = %(t)s), claimed AS (UPDATE changeover.chunk"
                " SET token = next.token FROM next WHERE migration = %(m)s AND source = %(s)s AND target = %(t)s"
                " AND loaded IS NULL) SELECT token FROM next",
                {"m": self.migration, "s": source, "t": target},
            )
        )
        return int(row[0])

    # -- authority, heartbeats, verdicts, audit

    def authority(self) -> Authority:
        """Return who has authority now over the rows that have no move of their own.

        Returns:
            The last such move; before any fence the old store's authority, in epoch 0.
        """
        moves = [change for change in self.authorities() if change.tenants is None]
        return moves[-1] if moves else Authority(0, "old", 0, datetime.min, None)

    def authorities(self, since: int = 0) -> list[Authority]:
        """Return every change of authority from an epoch on, first to last.

        Args:
            since: The epoch from which on they are asked for.

        Returns:
            The moves, first to last.
        """
        rows = self.connection.execute(
            "SELECT epoch, store, from_lsn::text, at, pause_seconds, coalesce(new_lsn, '0/0')::text, tenants"
            " FROM changeover.authority WHERE migration = %s AND epoch >= %s ORDER BY epoch",
            [self.migration, since],
        ).fetchall()
        return [
            Authority(r[0], r[1], parse_lsn(r[2]), r[3], r[4], parse_lsn(r[5]), None if r[6] is None else frozenset(r[6]))
            for r in rows
        ]

    def beat(self, process: str, stage: str, epoch: int, counters: Mapping[str, Any]) -> None:
        """Record a router process's heartbeat (application).

        Args:
            process: The name under which the process is known.
            stage: The observed stage.
            epoch: The epoch that the process works under.
            counters: Its counts since it began, as JSON holds them.
        """
        self.connection.execute(
            "INSERT INTO changeover.heartbeat VALUES (%s, %s, now(), %s, %s, %s) ON CONFLICT (migration, process) DO UPDATE"
            " SET at = now(), stage = excluded.stage, epoch = excluded.epoch, counters = excluded.counters",
            [self.migration, process, stage, epoch, json.dumps(counters)],
        )

    def heartbeats(self) -> list[Heartbeat]:
        """Return the last heartbeat of every router process.

        Returns:
            One a process, whether it still runs or not.
        """
        with self.connection.cursor(row_factory=class_row(Heartbeat)) as cursor:
            return cursor.execute(
                "SELECT process, at, stage, epoch, counters FROM changeover.heartbeat WHERE migration = %s ORDER BY process",
                [self.migration],
            ).fetchall()

    def record_verdict(self, source: str, target: str, verdict: str, stage: str | None, detail: Mapping[str, Any]) -> int:
        """Record a verdict.

        Args:
            source: The source table, as the spec names it.
            target: The target's name.
            verdict: The verdict's word.
            stage: The flag's stage at that time, None without a flag.
            detail: What was compared, as JSON holds it.

        Returns:
            The run's number.
        """
        row = one_row(
            self.connection.execute(
                "INSERT INTO changeover.verdict (migration, source, target, verdict, stage, detail)"
                " VALUES (%s, %s, %s, %s, %s, %s) RETURNING run",
                [self.migration, source, target, verdict, stage, json.dumps(detail, default=str)],
            )
        )
        return int(row[0])

    def verdicts(self) -> list[VerdictRow]:
        """Return all verdicts on the tables as they were last prepared.

        Verdicts from before an epoch of the tables say nothing of them.

        Returns:
            The verdicts, newest first.
        """
        with self.connection.cursor(row_factory=class_row(VerdictRow)) as cursor:
            return cursor.execute(
                "SELECT run, at, source, target, verdict, stage, detail FROM changeover.verdict AS v WHERE migration = %s"
                " AND at >= (SELECT prepared FROM changeover.migration WHERE name = v.migration) ORDER BY run DESC",
                [self.migration],
            ).fetchall()

    def audit(self, step: str, outcome: str, detail: Mapping[str, Any]) -> None:
        """Record what a run did; who and where come with it.

        Args:
            step: The step, which names the session and the record.
            outcome: What came of it, such as `done` or `refused`.
            detail: More of it, as JSON holds it.
        """
        whole = {**detail, "host": socket.gethostname(), "pid": os.getpid()}
        self.connection.execute(
            "INSERT INTO changeover.audit (migration, step, outcome, detail) VALUES (%s, %s, %s, %s)",
            [self.migration, step, outcome, json.dumps(whole, default=str)],
        )

    def audits(self, step: str | None = None) -> list[tuple[datetime, str, str, Mapping[str, Any]]]:
        """Return the record of runs, newest first.

        Args:
            step: The step, all unless given.

        Returns:
            (when, step, outcome, detail), newest first.
        """
        rows = self.connection.execute(
            "SELECT at, step, outcome, detail FROM changeover.audit WHERE migration = %s AND (%s::text IS NULL OR step = %s)"
            " ORDER BY entry DESC",
            [self.migration, step, step],
        ).fetchall()
        return [(r[0], r[1], r[2], r[3]) for r in rows]

    @contextmanager
    def recorded(self, step: str) -> Iterator[dict[str, Any]]:
        """Put a run on record when the block ends: `done`, or what the block puts under "outcome", or why it failed.

        What the block puts into the dict goes with it. The record is made over a session of its
        own, because a run may outlive this one. A run that failed raises its own error even where
        the ledger can't be reached any more.

        Args:
            step: The step, which names the session and the record.

        Yields:
            The report: a dict that the block fills.
        """
        report: dict[str, Any] = {}
        try:
            yield report
        except BaseException as error:
            why = str(error) if isinstance(error, ChangeoverError) else type(error).__name__
            outcome = "failed" if isinstance(error, Exception) else "interrupted"
            with suppress(ChangeoverError, psycopg.Error):
                self._record_run(step, {**report, "outcome": outcome, "error": why})
            raise
        self._record_run(step, report)

    def _record_run(self, step: str, report: Mapping[str, Any]) -> None:
        with connect(self.dsn, application_name(self.migration, step)) as session:
            ledger = Ledger(session, self.migration, self.dsn)
            if ledger.exists():  # a step before prepare has no record to go to
                detail = {name: value for name, value in report.items() if name != "outcome"}
                ledger.audit(step, str(report.get("outcome", "done")), detail)

    def stage(self) -> str | None:
        """Return the flag's stage as it was last put on record.

        Returns:
            The stage, None before its first switch.
        """
        row = self.connection.execute("SELECT stage FROM changeover.flag WHERE migration = %s", [self.migration]).fetchone()
        return row[0] if row else None

    def reads(self) -> int:
        """Return the percentage of contexts whose reads may move before the writes.

        Returns:
            The percentage, 0 where none may.
        """
        row = self.connection.execute("SELECT reads FROM changeover.flag WHERE migration = %s", [self.migration]).fetchone()
        return row[0] if row else 0

    def record_flag(self, stage: str | None, reads: int) -> None:
        """Put on record where the flag stands, which routers act on.

        Args:
            stage: The stage; None leaves it.
            reads: The percentage of contexts whose reads may move before the writes.
        """
        self.connection.execute(
            "INSERT INTO changeover.flag AS f (migration, stage, reads) VALUES (%s, %s, %s) ON CONFLICT (migration) DO UPDATE"
            " SET stage = coalesce(excluded.stage, f.stage), reads = excluded.reads, switches = f.switches + 1",
            [self.migration, stage, reads],
        )

    def creating(self) -> dict[tuple[str, str], bool]:
        """Return the loads that a prepare had begun to make.

        Returns:
            (source, target), and whether prepare makes the target table.
        """
        present = self.connection.execute("SELECT to_regclass('changeover.audit') IS NOT NULL").fetchone()
        if present is None or not present[0]:
            return {}
        rows = self.connection.execute(
            "SELECT detail->>'source', detail->>'target', (detail->>'created')::boolean FROM changeover.audit"
            " WHERE migration = %s AND step = 'prepare' AND outcome = 'creating'",
            [self.migration],
        ).fetchall()
        return {(row[0], row[1]): row[2] for row in rows}

    def lease(
        self, step: str, wait_seconds: float = 0, stop: threading.Event | None = None, *, again: bool = False
    ) -> AbstractContextManager[None]:  # fmt: skip
        """Hold the lease of a step (driver, capture).

        Args:
            step: The step, or `lease_of` a target.
            wait_seconds: How long to wait for another run to let go, in seconds.
            stop: Calls the wait off when it is set.
            again: Whether it is taken again and again: then its session is kept as long as this one.

        Returns:
            A context manager that holds it.

        Raises:
            LeaseHeld: Another run has it.
        """
        return hold(self.dsn, self.migration, step, wait_seconds, stop, self._leases if again else None)


def mark_loaded(
    cursor: psycopg.Cursor[Any], migration: str, source: str, target: str, chunk: int, token: int, counts: tuple[int, int],
    seconds: float,
) -> bool:  # fmt: skip
    """Mark a chunk as loaded in the caller's transaction (task or driver).

    Args:
        cursor: A cursor of the transaction that holds the chunk's rows, or of one of its own.
        migration: The migration's name.
        source: The source table, as the spec names it.
        target: The target's name.
        chunk: The chunk's number, from 0.
        token: The attempt's fencing token, of `Ledger.claim`.
        counts: (rows offered, images refused because of a tombstone).
        seconds: How long the chunk took, in seconds.

    Returns:
        False where the attempt was fenced off: then the caller must roll back.
    """
    with_chunk = [migration, source, target, chunk, token]
    marked = cursor.execute(
        "UPDATE changeover.chunk SET loaded = clock_timestamp(), rows = %s, refused = %s, seconds = %s WHERE migration = %s"
        " AND source = %s AND target = %s AND chunk = %s AND token = %s AND loaded IS NULL",
        [*counts, seconds, *with_chunk],
    ).rowcount
    return marked == 1


def drop_ledger(connection: Connection, migration: str) -> None:
    """Remove one migration from the ledger.

    Args:
        connection: A session with the ledger's server.
        migration: The migration's name.
    """
    for table in ("migration", "authority", "verdict", "heartbeat", "read_difference", "flag", "audit"):
        column = "name" if table == "migration" else "migration"
        connection.execute(
            sql.SQL("DELETE FROM changeover.{} WHERE {} = %s").format(sql.Identifier(table), sql.Identifier(column)),
            [migration],
        )
