"""The snapshot: one command makes the slot and the exported snapshot, and keepers hold the snapshot for as long as it is read.

`CREATE_REPLICATION_SLOT … EXPORT_SNAPSHOT` gives an exact pair: every transaction is either visible
in the snapshot or in the slot's stream with a commit LSN at or above L0. The export itself dies at
that session's next command. So a process of its own, the keeper, imports it in two sessions and
exports it again. A killed backfill finds it there. The keeper's sessions are ended from anywhere by
`release`, since a snapshot that is held keeps the old store's vacuum back.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from changeover.errors import CouldNotFinish, DatabaseFailed, LockNotGranted, SlotBlocked, SnapshotLost
from changeover.jobs.ledger.records import Stream
from changeover.position import parse_lsn
from changeover.session import Connection, application_name, connect, one_row, server_name
from changeover.spec import Spec
from changeover.stores.base.reader import ExportedSnapshot
from changeover.stores.postgres.store import exporting, importing

log = logging.getLogger(__name__)

SLOT_SECONDS = 30.0
"""How long slot creation may wait for open transactions; the server itself would wait without end."""

KEEPERS = 2


@dataclass(frozen=True)
class CreatedSlot:
    """What slot creation returned: L0, and the snapshot that lives until the session's next command."""

    l0: int
    snapshot: str
    session: Connection


def identify(dsn: str, application: str) -> tuple[str, int]:
    """Return which server it is, over a session with its walsender (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.

    Returns:
        (system identifier, timeline).
    """
    with connect(dsn, application, replication=True) as connection:
        row = one_row(connection.execute("IDENTIFY_SYSTEM"))
    return str(row[0]), int(row[1])


def create_slot(dsn: str, application: str, slot: str, *, temporary: bool = False, seconds: float = SLOT_SECONDS) -> CreatedSlot:
    """Create a logical slot with an exported snapshot (driver).

    It is bounded in time, and nothing is left behind when it fails.

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        slot: The slot's name.
        temporary: Whether the slot ends with its session.
        seconds: How long to wait for open transactions, in seconds.

    Returns:
        L0, the snapshot's name, and the session that keeps both, which the caller closes.

    Raises:
        SlotBlocked: The wait is over; it names the oldest open transaction.
    """
    session = connect(dsn, application, replication=True)
    timer = threading.Timer(seconds, session.cancel_safe)
    timer.start()
    try:
        kind = sql.SQL("TEMPORARY " if temporary else "")
        row = one_row(
            session.execute(
                # the older of two forms, which every release from 14 on takes
                sql.SQL("CREATE_REPLICATION_SLOT {} {}LOGICAL pgoutput EXPORT_SNAPSHOT").format(sql.Identifier(slot), kind)
            )
        )
    except psycopg.errors.QueryCanceled as error:
        session.close()
        raise SlotBlocked(server_name(dsn), seconds, _oldest(dsn, application)) from error
    except psycopg.Error as error:
        session.close()
        raise DatabaseFailed(server_name(dsn), f"creating the slot {slot}", str(error).splitlines()[0]) from error
    finally:
        timer.cancel()
    return CreatedSlot(parse_lsn(row[1]), row[2], session)


def _oldest(dsn: str, application: str) -> str:
    """Name the oldest open or prepared transaction, which a person can then end."""
    with connect(dsn, application) as connection:
        row = connection.execute(
            "SELECT * FROM (SELECT format('process %s of %s, open since %s', pid, usename, xact_start::timestamptz(0)), xact_start"
            " FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()"
            " UNION ALL SELECT format('prepared transaction %s of %s, since %s', gid, owner, prepared::timestamptz(0)), prepared"
            " FROM pg_prepared_xacts) AS open ORDER BY 2 LIMIT 1"
        ).fetchone()
    return str(row[0]) if row else "it has ended since"


def drop_slot(connection: Connection, slot: str) -> bool:
    """Drop a slot, ending the capture that still reads it (driver).

    Args:
        connection: A session with the store.
        slot: The slot's name.

    Returns:
        Whether there was one.

    Raises:
        LockNotGranted: The slot stays in use.
    """
    for _ in range(50):
        row = connection.execute("SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone()
        if row is None:
            return False
        if row[0] is None:
            connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
            return True
        connection.execute("SELECT pg_terminate_backend(%s)", [row[0]])
        time.sleep(0.1)
    raise LockNotGranted(server_name(connection.info.dsn), f"replication slot {slot}", "a capture that comes back: stop it first")


# -- keepers


def start_keeper(spec: Spec, snapshot: str) -> tuple[ExportedSnapshot, ...]:
    """Start the keeper as a process of its own and wait until it holds the snapshot (driver, once, in prepare).

    Args:
        spec: The migration's spec.
        snapshot: The exported snapshot's name.

    Returns:
        The snapshots that the keeper exports; all of them see the same.

    Raises:
        CouldNotFinish: The keeper did not start, or did not hold the snapshot.
    """
    keeper = subprocess.Popen(
        [sys.executable, "-m", "changeover.jobs.source.snapshot", spec.path, snapshot],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True,
    )  # fmt: skip
    if keeper.stdout is None or keeper.stderr is None:  # never with the pipes above
        raise CouldNotFinish("the snapshot's keeper was started without its pipes")
    line = keeper.stdout.readline()
    keeper.stdout.close()
    if not line:
        problem = keeper.stderr.read().strip().splitlines()
        keeper.wait()
        raise CouldNotFinish(f"the snapshot's keeper did not start: {problem[-1] if problem else 'no reason given'}")
    keeper.stderr.close()
    threading.Thread(target=keeper.wait, daemon=True, name="keeper-reaper").start()
    return tuple(ExportedSnapshot(*pair) for pair in json.loads(line))


def keep(dsn: str, application: str, snapshot: str) -> None:
    """Hold a snapshot in two sessions until both are ended; prints the exported names once (the keeper's own process)."""
    sessions = []
    exported = []
    for _ in range(KEEPERS):
        session = connect(dsn, application, autocommit=False)
        session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        session.read_only = True
        session.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        row = one_row(session.execute("SELECT pg_export_snapshot(), pg_current_snapshot()::text"))
        sessions.append(session)
        exported.append(tuple(row))
    print(json.dumps(exported), flush=True)
    # the starter may die: nothing is written to its pipes from here on
    with open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    while sessions:
        ready, _, _ = select.select([s.fileno() for s in sessions], [], [])
        for session in [s for s in sessions if s.fileno() in ready]:
            try:
                session.pgconn.consume_input()
            except psycopg.OperationalError:
                sessions.remove(session)


def release(dsn: str, migration: str, connection: Connection | None = None) -> int:
    """End the keeper's sessions, wherever its process is, so that vacuum goes on (driver).

    Args:
        dsn: The store's DSN.
        migration: The migration's name.
        connection: A session with the source; a new one unless given.

    Returns:
        How many sessions there were.
    """
    statement = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = %s AND usename = current_user AND pid <> pg_backend_pid()"
    )
    name = application_name(migration, "keeper")
    if connection is not None:
        row = connection.execute(statement, [name]).fetchone()
    else:
        with connect(dsn, application_name(migration, "release")) as session:
            row = session.execute(statement, [name]).fetchone()
    return int(row[0]) if row else 0


def kept(dsn: str, application: str, exported: Sequence[ExportedSnapshot]) -> ExportedSnapshot:
    """Return the first kept snapshot that can still be imported (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        exported: The snapshots on record.

    Returns:
        The snapshot.

    Raises:
        SnapshotLost: None can be imported any more.
    """
    lost = SnapshotLost("?", "none was kept")
    for snapshot in exported:
        try:
            with importing(dsn, application, snapshot.name):
                return snapshot
        except SnapshotLost as error:
            lost = error
    raise lost


def renew(spec: Spec, lost: str) -> tuple[ExportedSnapshot, ...]:
    """Keep a snapshot of now in place of a lost one (driver).

    A pending chunk that is read in it bears v0 all the same: every event since the lost snapshot is
    in the stream and above v0. It must see all that the lost one saw, which is in no stream.

    Args:
        spec: The migration's spec.
        lost: What the lost one saw, as `pg_current_snapshot()` prints it.

    Returns:
        The snapshots that a new keeper exports.

    Raises:
        CouldNotFinish: No new snapshot shows all that the lost one did.
        ServerUnavailable: The source can't be reached.
    """
    dsn, application = spec.source.dsn.resolve(), application_name(spec.name, "backfill")
    deadline = time.monotonic() + SLOT_SECONDS
    while time.monotonic() < deadline:
        with exporting(dsn, application) as (_, fresh):
            if contains(fresh.visible, lost):
                return start_keeper(spec, fresh.name)
        time.sleep(0.1)
    raise CouldNotFinish(
        f"no new snapshot shows all that {lost} showed after {SLOT_SECONDS:g} s: does a commit wait for a synchronous standby?"
    )


def contains(later: str, earlier: str) -> bool:
    """Return whether a snapshot, as `pg_current_snapshot()` prints it, shows every transaction that another one showed (pure)."""
    _, following, running = earlier.split(":")
    _, later_following, still_running = later.split(":")
    hidden = {int(xid) for xid in running.split(",") if xid}
    return int(later_following) >= int(following) and all(
        int(xid) >= int(following) or int(xid) in hidden for xid in still_running.split(",") if xid
    )


def main() -> None:
    """Run the keeper: SPEC and the snapshot's name on the command line, the DSN from the environment."""
    from changeover.spec import load

    spec = load(sys.argv[1])
    keep(spec.source.dsn.resolve(), application_name(spec.name, "keeper"), sys.argv[2])


def exported(stream: Stream) -> tuple[ExportedSnapshot, ...]:
    """Return the kept snapshots by name (pure); all of them see the same.

    Args:
        stream: What prepare made.

    Returns:
        The snapshots.
    """
    return tuple(ExportedSnapshot(name, stream.visible) for name in stream.snapshot.split())


if __name__ == "__main__":
    main()
