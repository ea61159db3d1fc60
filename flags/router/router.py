"""The router: an application's reads and writes go to the store with authority, and beside it what the stage asks for.

    client = flagfile.client("flags.json")
    router = Router.connect(load("follows.toml"), "follows", to_new=..., to_old=..., client=client)
    written = router.write(old=follow_in_old, new=follow_in_new)      # each: cursor -> list of Change
    row = router.read(old=find_in_old, new=find_in_new)               # each: cursor -> a row, rows, or any value

The authority's transaction runs on the caller's thread and its outcome is the caller's outcome. The
mirror, comparisons and the ledger are on threads of their own, so that no other store can slow or
fail a caller. The flag holds the desired stage, the ledger's epoch is what is observed. A write
that a fence refuses waits, no longer than `max_pause`, and runs anew where authority then is. Where
the spec names a column of tenants (`flag.context`), each call says whose row it is by `tenant=`,
and goes by that tenant's stage and authority. Threads and sessions are made on first use in each
process, a forked child's too. Nothing is read from the environment or opened at import.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import psycopg
from ldclient import LDClient
from ldclient.migrations.types import Origin, Stage

from changeover.errors import LockNotGranted, Refused, SpecError
from changeover.flags import flagfile
from changeover.flags.router.desired import FlagStage, StageSource
from changeover.flags.router.endpoint import (
    EXACT_FLOATS,
    Change,
    Cursor,
    PgEndpoint,
    Row,
    RowMapping,
    Tenant,
    as_text,
    position,
    returned,
    transaction,
)
from changeover.flags.router.follower import AuthoritySource, LedgerAuthority
from changeover.flags.router.mirror import RETRIED, TRIES, before_retry
from changeover.flags.router.runtime import Limits, Parts, Pin, Runtime
from changeover.flags.router.shadow import Comparison, Experiment, Observation, Result
from changeover.flags.stages import FENCED, other
from changeover.jobs.ledger.epochs import EVERYTHING
from changeover.jobs.source.triggerlog import Log
from changeover.jobs.transform.tenancy import new_column
from changeover.position import DUAL_WRITE_ORDINAL, Version
from changeover.session import application_name
from changeover.spec import TRIGGER, Spec

__all__ = ["Change", "Experiment", "Limits", "PgEndpoint", "Router", "Written", "returned"]

log = logging.getLogger("changeover.flags")

Value = TypeVar("Value")
FENCE_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Written:
    """What the authority committed. `mirrored` says that the rows were queued for the other store, not that they are there."""

    origin: Origin
    stage: Stage
    changes: Sequence[Change]
    version: Version | None
    mirrored: bool

    @property
    def row(self) -> Row | None:
        """Return the first row written, None when the statement met no row."""
        return self.changes[0].row if self.changes else None


class Router:
    """Routes one table's reads and writes; thread-safe, one for a process and its forked children."""

    def __init__(
        self, *, old: PgEndpoint, new: PgEndpoint, to_new: RowMapping, to_old: RowMapping, stage: StageSource,
        authority: AuthoritySource | None = None, name: str = "router", process: str | None = None,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self._parts = Parts(
            {Origin.OLD: old, Origin.NEW: new}, {Origin.OLD: to_old, Origin.NEW: to_new}, stage, authority,
            application_name(name, "router"), process, limits or Limits(),
        )  # fmt: skip
        if (old.tenant is None) is not (new.tenant is None):
            raise TypeError("a router of tenants needs their column in both stores: PgEndpoint(..., tenant=...)")
        self._owned_client: LDClient | None = None
        self._pinned: ContextVar[dict[str, Pin] | None] = ContextVar("changeover_pins", default=None)
        self._runtime: Runtime | None = None
        self._starting = threading.Lock()
        self._closed = False
        if authority is None:
            log.warning("the router of %s has no ledger: it follows the flag, and nothing is fenced", new.table)
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_parent(this()))

    @classmethod
    def connect(
        cls, spec: Spec, table: str, *, to_new: RowMapping, to_old: RowMapping, client: LDClient | None = None,
        process: str | None = None, limits: Limits | None = None,
    ) -> Self:  # fmt: skip
        """Return the router of one table of a spec; without an SDK client it follows the spec's flag file.

        Args:
            spec: The migration's spec.
            table: The table, by its source's or its target's name.
            to_new: What makes the new store's row of an old one.
            to_old: What makes the old store's row of a new one.
            client: An SDK client that follows the flag; None follows the spec's file.
            process: This process's name in its heartbeats; None is the host's.
            limits: Bounds of queues, pauses and waits; None takes the defaults.

        Returns:
            The router, which connects at its first call (application).

        Raises:
            SpecError: The spec has no flag, no flag file without a client, or a context that is no
                key column.
            SecretMissing: The environment variable of a DSN is not set.
        """
        if spec.flag is None:
            raise SpecError(spec.path, "flag", "is missing: the router follows a flag, so name its key and target")
        planned = spec.table(table)
        if client is None and spec.flag.file is None:
            raise SpecError(spec.path, "flag.file", "is missing: name the flag's data file, or hand the router an SDK client")
        kind = spec.flag.context
        new_tenant = new_column(spec, planned) if kind is not None else None
        if kind is not None and new_tenant is None:
            raise SpecError(spec.path, "flag.context", f"{kind} is no key column of {planned.target}: `changeover check` says more")
        log_of = Log(spec.name) if spec.source.capture == TRIGGER else None
        used = client if client is not None else flagfile.client(str(spec.flag.file))
        router = cls(
            old=PgEndpoint(spec.source.dsn.resolve(), planned.source, log=log_of, tenant=kind),
            new=PgEndpoint(spec.targets[spec.flag.target].dsn_value, planned.target, planned.key, tenant=new_tenant),
            to_new=to_new, to_old=to_old, stage=FlagStage(used, spec.flag.key, kind=kind),
            authority=LedgerAuthority(spec.ledger.resolve(), spec.name), name=spec.name, process=process, limits=limits,
        )  # fmt: skip
        router._owned_client = None if client is not None else used
        return router

    # -- the caller's thread

    def write(
        self, *, old: Callable[[Cursor], Sequence[Change]], new: Callable[[Cursor], Sequence[Change]], tenant: Tenant | None = None
    ) -> Written:
        """Run one of two functions in a transaction on the store that has authority, and mirror what it returns.

        A function gets a cursor, runs the application's SQL and returns every row that it wrote,
        whole: `returned(cursor)` after `RETURNING *`. For a key change that is the old row as
        deleted, and the new one. It must have no other effect, because it runs again after a fence,
        a deadlock or a serialization failure. Whatever it raises rolls back and goes to the caller;
        so does a COMMIT of unknown outcome, after which nothing is mirrored: the change stream
        tells.

        `tenant` is the rows' own, all of one: a returned row of another one rolls back and raises
        Refused, because it would be written under another's authority. A key change from one tenant
        to another is a delete and an insert, each a write of its own tenant.

        Args:
            old: What writes to the old store.
            new: What writes to the new store.
            tenant: The tenant of the rows; None where the spec names no tenants.

        Returns:
            What was written, and where.

        Raises:
            Refused: A returned row is of another tenant.
            LockNotGranted: A fence did not end within the limits' pause.
            ServerUnavailable: The store that has authority can't be reached.
        """
        tenant_name = self._tenant(tenant)
        runtime = self._running()
        functions = {Origin.OLD: old, Origin.NEW: new}
        pin = self._pin(runtime, tenant_name)
        paused: float | None = None
        tries = 1
        while True:
            try:
                written = self._attempt(runtime, pin, functions[pin.rule.writes], tenant_name)
            except psycopg.Error as error:
                if error.sqlstate == FENCED:
                    paused = paused if paused is not None else time.monotonic()
                    pin = self._after_fence(runtime, tenant_name, pin, paused, error)
                elif error.sqlstate in RETRIED and tries < TRIES:
                    runtime.count("retries")
                    time.sleep(before_retry(tries))
                    tries += 1
                else:
                    raise
                continue
            if paused is not None:
                runtime.waited(time.monotonic() - paused)
            return written

    def read(
        self, *, old: Callable[[Cursor], Value], new: Callable[[Cursor], Value], experiment: Experiment | None = None,
        tenant: Tenant | None = None,
    ) -> Value:  # fmt: skip
        """Return what the store that has authority answers; at shadow and live the other one is asked beside it.

        A function gets a cursor and only reads. For comparison it returns a row as a mapping, a
        list of them, or anything else that the experiment's `clean` and `compare` understand.
        `to_new` maps the old store's rows. `tenant` is that of the rows asked for; a read over
        several tenants is one read of each.

        Both functions may be called again later, for the comparison, off the caller's thread. So
        they must not depend on a variable that changes meanwhile, such as a loop's variable in a
        lambda. A default argument binds its value: `lambda cursor, user=user: …`.

        Args:
            old: What reads the old store.
            new: What reads the new store.
            experiment: How two answers are compared; None compares them as they are.
            tenant: The tenant of the rows; None where the spec names no tenants.

        Returns:
            The answer of the store that has authority.

        Raises:
            ServerUnavailable: That store can't be reached.
        """
        tenant_name = self._tenant(tenant)
        runtime = self._running()
        pin = self._pin(runtime, tenant_name)
        origin = pin.rule.reads
        reads = {Origin.OLD: old, Origin.NEW: new}
        started = time.monotonic()
        with runtime.session(origin) as connection, connection.cursor() as cursor:
            value = reads[origin](cursor)
        if pin.rule.compares:
            control = Observation(origin, value, None, time.monotonic() - started)
            runtime.comparisons.offer(Comparison(experiment or _PLAIN, pin.stage, control, reads, apart=runtime.apart(pin)))
        return value

    @contextmanager
    def pinned(self, tenant: Tenant | None = None) -> Iterator[Stage]:
        """Keep one stage for all calls of a request (thread or task); only a fence's refusal moves it on.

        Each tenant has a stage of its own, kept from its first call on; the one given, or
        everybody's, is kept at once.

        Args:
            tenant: The tenant whose stage is kept at once; None is everybody's.

        Yields:
            The stage that is kept.
        """
        tenant_name = EVERYTHING if tenant is None else self._tenant(tenant)
        token = self._pinned.set(dict(self._pinned.get() or {}))
        try:
            yield self._pin(self._running(), tenant_name).stage
        finally:
            self._pinned.reset(token)

    @property
    def stage(self) -> Stage:
        """Return the stage at which this process acts now, but for tenants that stand apart."""
        return self._pin(self._running(), EVERYTHING).stage

    def stage_of(self, tenant: Tenant) -> Stage:
        """Return the stage at which this process acts now for a tenant.

        Args:
            tenant: The tenant.

        Returns:
            The stage, which follows the flag and authority.
        """
        return self._pin(self._running(), self._tenant(tenant)).stage

    def counters(self) -> dict[str, Any]:
        """Return the counts of this process, as its heartbeat has them; values of rows are never in it.

        Returns:
            The counters by name, as JSON takes them.
        """
        return dict(self._running().counters())

    @property
    def mismatches(self) -> list[Result]:
        """Return the last 100 mismatched reads of this process, with their values."""
        return list(self._running().comparisons.mismatches)

    def drain(self, seconds: float) -> bool:
        """Wait until this process's mirrored writes and comparisons are dealt with; False when time is up first.

        Args:
            seconds: How many seconds to wait at most.

        Returns:
            Whether all was dealt with in time.
        """
        return self._running().drain(seconds)

    def close(self) -> None:
        """Deal with what is queued, within `close_wait`, and end the threads and sessions of this process."""
        self._closed = True
        runtime, self._runtime = self._runtime, None
        if runtime is not None and runtime.pid == os.getpid():
            runtime.close()
        if self._owned_client is not None:
            self._owned_client.close()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside

    def _running(self) -> Runtime:
        runtime = self._runtime
        if runtime is None or runtime.pid != os.getpid():
            runtime = self._start()
        return runtime

    def _start(self) -> Runtime:
        with self._starting:
            if self._closed:
                raise RuntimeError("the router is closed: make another one")
            if self._runtime is None or self._runtime.pid != os.getpid():
                self._parts.stage.after_fork()
                self._runtime = Runtime(self._parts)
            return self._runtime

    def _tenant(self, given: Tenant | None) -> str:
        """Return the tenant of a call as text, `EVERYTHING` where all rows move at once."""
        column = self._parts.endpoints[Origin.OLD].tenant
        if column is None:
            if given is not None:
                raise TypeError("tenant= is given, but all rows move at once: name their column as flag.context, or leave it out")
            return EVERYTHING
        name = as_text(given)
        if name is None:
            raise TypeError(f"tenant= is {type(given).__name__}: give the row's own {column}, a str, an int or a UUID")
        return name

    def _pin(self, runtime: Runtime, tenant: str) -> Pin:
        pinned = self._pinned.get()
        if pinned is None:
            return runtime.decide(runtime.desired(tenant), tenant)
        if (pin := pinned.get(tenant)) is None:
            pin = pinned[tenant] = runtime.decide(runtime.desired(tenant), tenant)
        return pin

    def _attempt(self, runtime: Runtime, pin: Pin, function: Callable[[Cursor], Sequence[Change]], tenant: str) -> Written:
        origin, lsn = pin.rule.writes, None
        endpoint = self._parts.endpoints[origin]
        with runtime.session(origin) as connection, transaction(connection) as cursor:
            if pin.rule.mirrors and endpoint.pool is not None:
                cursor.execute(EXACT_FLOATS)
            changes = function(cursor)
            if not isinstance(changes, (list, tuple)) or not all(isinstance(change, Change) for change in changes):
                raise TypeError("a write's function returns a list of Change: `returned(cursor)` after RETURNING *")
            if endpoint.tenant is not None:
                _require_tenant(changes, endpoint.tenant, tenant)
            if pin.rule.mirrors and changes:
                lsn = position(cursor, endpoint.log)
        # From here on the COMMIT is acknowledged; any exception above means that it is not, and nothing is mirrored.
        if lsn is None:
            return Written(origin, pin.stage, changes, None, mirrored=False)
        version = Version(pin.observation.epoch, lsn, DUAL_WRITE_ORDINAL)
        return Written(origin, pin.stage, changes, version, runtime.mirror(other(origin)).offer(version, changes))

    def _after_fence(self, runtime: Runtime, tenant: str, pin: Pin, since: float, error: psycopg.Error) -> Pin:
        """Wait for the ledger's next word and return what holds then; the same store, if the fence was called off."""
        if time.monotonic() - since >= self._parts.limits.max_pause:
            runtime.waited(time.monotonic() - since)
            endpoint = self._parts.endpoints[pin.rule.writes].name
            raise LockNotGranted(endpoint, "write authority", "a fence that did not end") from error
        if runtime.follower is not None:
            runtime.follower.wait(tenant, pin.observation, FENCE_POLL_SECONDS)
        else:
            time.sleep(FENCE_POLL_SECONDS)
        pinned = self._pinned.get()
        decided = runtime.decide(runtime.desired(tenant) if pinned is None else pin.desired, tenant)
        if pinned is not None:
            pinned[tenant] = decided
        return decided


def _require_tenant(changes: Sequence[Change], column: str, tenant: str) -> None:
    """Refuse rows of another tenant than the write's, before they are committed; the message has no value of a row."""
    for change in changes:
        if column not in change.row:
            raise TypeError(f"a write's function returned a row without {column}, its tenant: return whole rows by RETURNING *")
        if as_text(change.row[column]) != tenant:
            raise Refused(
                f"a write returned a row whose {column} is not the tenant that it was called for, and was rolled back: write the"
                " rows of each tenant by a call of their own, a key change from one to another as a delete and an insert"
            )


_PLAIN = Experiment()
_INHERITED: list[Runtime] = []
"""The parent's threads and sessions in a forked child: never used, never collected, so that its sessions stay open."""


def _forget_parent(router: Router | None) -> None:
    if router is not None:
        router._starting = threading.Lock()
        if router._runtime is not None:
            _INHERITED.append(router._runtime)
            router._runtime = None
