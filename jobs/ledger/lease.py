"""The lease of a step: at most one run of it is alive, wherever it runs.

It is an advisory lock of a session of its own in the ledger's database, so it ends with its holder, however that dies. Taken and
held on the driver.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count

import psycopg

from changeover.errors import LeaseHeld
from changeover.session import Connection, application_name, connect

LEASE_SECONDS = math.inf
"""How long a batch waits for the lease of its target: as long as another one has it, however slow the machine is.

The lease ends with its holder's session, so nothing waits for a dead one; who is waited for is logged.
"""

LOOK_SECONDS = 1.0
"""How often a wait looks whether it is called off, in seconds; short, since Ctrl-C waits for it."""

NAMED_EVERY = 30
"""After how many looks the holder is named, and again each time."""

log = logging.getLogger(__name__)


@contextmanager
def hold(
    dsn: str, migration: str, step: str, wait_seconds: float = 0, stop: threading.Event | None = None,
    kept: dict[str, Connection] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Hold the lease of a step of a migration (driver).

    Args:
        dsn: The ledger's database.
        migration: The migration's name.
        step: The step, or `lease_of` a target.
        wait_seconds: How long to wait for another run to let go, in seconds.
        stop: Calls the wait off when it is set.
        kept: Sessions by lease, for who takes them again and again and ends them itself; else each ends with its block.

    Raises:
        LeaseHeld: Another run has it, has not let go in time, or had it when the wait was called off.
    """
    application, name = application_name(migration, f"{step}-lease"), f"{migration}/{step}"
    with _session(dsn, application, kept) as holder:
        waited = 0.0
        for look in count(1):
            seconds = min(LOOK_SECONDS, wait_seconds - waited)
            if _taken(holder, name, seconds):
                break
            waited += seconds
            if waited >= wait_seconds or (stop is not None and stop.is_set()):
                raise LeaseHeld(step, _holder(holder, name))
            if look % NAMED_EVERY == 0:
                log.info("waiting for the lease of %s, which is held: %s", step, _holder(holder, name))
        try:
            yield
        finally:
            # the server ends a session a little after its client, and the next command may come in between
            with suppress(psycopg.Error):
                holder.execute("SELECT pg_advisory_unlock_all()")


@contextmanager
def _session(dsn: str, application: str, kept: dict[str, Connection] | None) -> Iterator[Connection]:
    """Yield a session that holds a lease: a new one, or the one that is kept, where the server has it still."""
    settings = {"idle_session_timeout": "0"}
    if kept is None:
        with connect(dsn, application, settings=settings) as session:
            yield session
        return
    try:
        kept[application].execute("SELECT 1")
    except (KeyError, psycopg.OperationalError):  # there is none yet, or the server was restarted
        kept[application] = connect(dsn, application, settings=settings)
    yield kept[application]


def _taken(session: Connection, name: str, seconds: float) -> bool:
    """Take a lease, or wait for it; False where it is still held after so many seconds."""
    if not seconds:
        row = session.execute("SELECT pg_try_advisory_lock(hashtext('changeover'), hashtext(%s))", [name]).fetchone()
        return bool(row and row[0])
    session.execute("SELECT set_config('lock_timeout', %s, false)", [f"{int(seconds * 1000)}ms"])
    try:
        session.execute("SELECT pg_advisory_lock(hashtext('changeover'), hashtext(%s))", [name])
    except psycopg.errors.LockNotAvailable:
        return False
    return True


def is_held(session: Connection, migration: str, step: str) -> bool:
    """Return whether a run of a step is alive.

    Args:
        session: A session with the ledger's server.
        migration: The migration's name.
        step: The step, as the lease is named.

    Returns:
        Whether anybody holds the step's lease.
    """
    return _held_by(session, f"{migration}/{step}") is not None


def _holder(session: Connection, name: str) -> str:
    """Return whose session has a lease, as a person wants it told."""
    row = _held_by(session, name)
    if row is None:
        return "unknown"
    return f"server process {row[0]}" + (f", since {row[1]:%H:%M:%S}" if row[1] is not None else "")


def _held_by(session: Connection, name: str) -> tuple[int, datetime | None] | None:
    """Return the process that holds a lease, and since when its session is there, which not every role may know; else None."""
    return session.execute(
        "SELECT pid, backend_start FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND granted"
        " AND objsubid = 2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND classid::bigint = hashtext('changeover')::bigint & 4294967295 AND objid::bigint = hashtext(%s)::bigint & 4294967295",
        [name],
    ).fetchone()


def lease_of(target: str) -> str:
    """Return the name of the lease that lets one batch of a target run at a time.

    Args:
        target: The target's name.

    Returns:
        The lease's name, which `Ledger.lease` takes.
    """
    return f"replay-{target}"
