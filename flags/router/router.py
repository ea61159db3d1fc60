"""The router: an application's reads and writes go to the store with authority, and beside it what the stage asks for.

    client = flagfile.client("flags.json")
    router = Router.connect(load("follows.toml"), client=client)
    with router.write() as store:                                     # one transaction, any statements and tables
        store.execute(store.of(INSERT_OLD, INSERT_NEW), values)
    router.run(lambda store: store.execute(store.of(OLD, NEW), values).rowcount)      # waits where a fence refuses
    row = router.compare(old=find_in_old, new=find_in_new)            # each: cursor -> a row, rows, or any value

The authority's transaction runs on the caller's thread and its outcome is the caller's outcome. What
was written reaches the other store by the change stream, which needs nothing of the application.
Where the spec says `flag.mirror = "application"` the process mirrors its rows as well. The mirror,
comparisons and the ledger are on threads of their own, so that no other store can slow or fail a
caller. The flag holds the desired stage, the ledger's epoch is what is observed. A write that a
fence refuses raises `AuthorityMoving`; `run` waits, no longer than `max_pause`, and runs all of it
anew where authority then is. Where the spec names a column of tenants (`flag.context`), each call
says whose row it is by `tenant=`, and goes by that tenant's stage and authority. Threads and
sessions are made on first use in each process, a forked child's too. Nothing is read from the
environment or opened at import.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

from ldclient import Context, LDClient
from ldclient.migrations.types import Operation, Origin, Stage

from changeover.errors import AuthorityMoving, LockNotGranted, SpecError
from changeover.flags import flagfile
from changeover.flags.mirror.change import Change, MirroredTable, TableMapping, returned
from changeover.flags.retry import RETRIED, TRIES, before_retry
from changeover.flags.router.desired import FlagStage, StageSource
from changeover.flags.router.endpoint import Cursor, PgEndpoint, failed, transaction
from changeover.flags.router.follower import AuthoritySource, LedgerAuthority
from changeover.flags.router.runtime import Limits, Parts, Pin, Runtime
from changeover.flags.router.unit import Place, RoutedStore, sqlstate
from changeover.flags.shadow.experiment import Answer, Experiment, Observation, Result
from changeover.flags.shadow.judge import Comparison
from changeover.flags.stages import FENCED, other
from changeover.jobs.ledger.epochs import EVERYTHING
from changeover.jobs.source.triggerlog import Log
from changeover.jobs.transform.tenancy import new_column
from changeover.position import DUAL_WRITE_ORDINAL, Version
from changeover.secret import in_environment
from changeover.session import application_name
from changeover.spec import APPLICATION, STREAM, TRIGGER, Spec
from changeover.stores.postgres.refusal import TENANT_SETTING
from changeover.tenants import Tenant, as_text

__all__ = [
    "Change", "Experiment", "Limits", "MirroredTable", "PgEndpoint", "Place", "RoutedStore", "Router", "TableMapping", "returned",
]  # fmt: skip

log = logging.getLogger("changeover.flags")

Value = TypeVar("Value")
Who = Tenant | Context
"""For whom a call is: a key of the kind "user", or a context of LaunchDarkly's."""

FENCE_POLL_SECONDS = 0.05


class Router:
    """Routes a migration's reads and writes; thread-safe, one for a process and its forked children."""

    def __init__(
        self, *, old: PgEndpoint, new: PgEndpoint, stage: StageSource, mirrored: Sequence[MirroredTable] = (),
        authority: AuthoritySource | None = None, name: str = "router", process: str | None = None, limits: Limits | None = None,
    ) -> None:  # fmt: skip
        tables = [
            replace(one, old_tenant=one.old_tenant or old.tenant, new_tenant=one.new_tenant or new.tenant) for one in mirrored
        ]
        self._parts = Parts(
            {Origin.OLD: old, Origin.NEW: new}, tables, stage, authority, application_name(name, "router"), process,
            limits or Limits(),
        )  # fmt: skip
        if (old.tenant is None) is not (new.tenant is None):
            raise TypeError("a router of tenants needs their column in both stores: PgEndpoint(..., tenant=...)")
        self._owned_client: LDClient | None = None
        self._pinned: ContextVar[dict[str, Pin] | None] = ContextVar("changeover_pins", default=None)
        self._runtime: Runtime | None = None
        self._starting = threading.Lock()
        self._closed = False
        if authority is None:
            log.warning("the router of %s has no ledger: it follows the flag, and nothing is fenced", name)
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_parent(this()))

    @classmethod
    def connect(
        cls, spec: Spec, *, mappings: Mapping[str, TableMapping] | None = None, client: LDClient | None = None,
        process: str | None = None, limits: Limits | None = None,
    ) -> Self:  # fmt: skip
        """Return the router of a spec; without an SDK client it follows the spec's flag file.

        Where `flag.mirror` is "application", it mirrors the rows of all tables of the spec.

        Args:
            spec: The migration's spec.
            mappings: What makes the rows of the other store, for each table of the spec, by its source's or its target's
                name; None where nothing is mirrored.
            client: An SDK client that follows the flag, and is told of each operation; None follows the
                spec's file.
            process: This process's name in its heartbeats; None is the host's.
            limits: Bounds of queues, pauses and waits; None takes the defaults.

        Returns:
            The router, which connects at its first call (application).

        Raises:
            SpecError: The spec has no flag, no flag file without a client, a context that is no
                key column, or mirrors otherwise than the arguments say.
            SecretMissing: The environment variable of a DSN, or of `flag.private`, is not set.
        """
        if spec.flag is None:
            raise SpecError(spec.path, "flag", "is missing: the router follows a flag, so name its key and target")
        mirrored = _mirrored(spec, mappings)
        if client is None and spec.flag.file is None:
            raise SpecError(spec.path, "flag.file", "is missing: name the flag's data file, or hand the router an SDK client")
        kind = spec.flag.context
        new_tenants = [new_column(spec, table) for table in (spec.tables if mirrored else spec.tables[:1])]
        if kind is not None and None in new_tenants:
            target = spec.tables[new_tenants.index(None)].target
            raise SpecError(spec.path, "flag.context", f"{kind} is no key column of {target}: `changeover check` says more")
        log_of = Log(spec.name) if spec.source.capture == TRIGGER else None
        authority = LedgerAuthority(spec.ledger.resolve(), spec.name, spec.flag.target)
        # the file's client sends nothing, and the file's targets name tenants as they are
        private = spec.flag.private if client is not None else None
        secret = in_environment("flag.private", private).encode() if private is not None else None
        used = client if client is not None else flagfile.client(str(spec.flag.file))
        router = cls(
            old=PgEndpoint(spec.source.dsn.resolve(), log=log_of, tenant=kind),
            new=PgEndpoint(spec.targets[spec.flag.target].dsn_value, tenant=new_tenants[0]),
            mirrored=mirrored, stage=FlagStage(used, spec.flag.key, kind=kind, tracks=client is not None, secret=secret),
            authority=authority, name=spec.name, process=process, limits=limits,
        )  # fmt: skip
        router._owned_client = None if client is not None else used
        return router

    # -- the caller's thread

    @contextmanager
    def write(self, tenant: Tenant | None = None, *, context: Who | None = None) -> Iterator[RoutedStore]:
        """Lend the store that has authority for one transaction, in which any statements of any tables may run.

        The block commits where it ends without an error. It can't be run again by itself: where a
        fence refuses one of its statements it is rolled back and raises `AuthorityMoving`. `run`
        takes a function instead, waits, and runs it anew. `tenant` is that of all rows written.

        Args:
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Yields:
            The store: its cursor, and which one it is.

        Raises:
            AuthorityMoving: A fence refuses writes; nothing was written.
            ServerUnavailable: The store that has authority can't be reached.
        """
        runtime, pin, tenant_name = self._called(tenant)
        with self._refusals(runtime, pin), self._unit(runtime, pin, tenant_name, self._who(context)) as store:
            yield store

    @contextmanager
    def route(self, tenant: Tenant | None = None, *, context: Who | None = None) -> Iterator[Place]:
        """Say which store has authority, for a block that writes or reads by sessions of your own: a pool's, an ORM's, async ones.

        The block's transaction is its own to begin and to end, inside of the block. Where a fence
        refuses a statement of it, whatever a framework makes of that, it raises `AuthorityMoving`.

        Args:
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Yields:
            Which store it is.

        Raises:
            AuthorityMoving: A fence refuses writes.
        """
        runtime, pin, tenant_name = self._placed(tenant)
        who = self._who(context)
        with self._refusals(runtime, pin), _measured(runtime, pin, tenant_name, who):
            yield _place(pin, tenant_name)
        runtime.wrote_for(who, pin.rule.writes)

    def rerun(self, work: Callable[[Place], Value], *, tenant: Tenant | None = None, context: Who | None = None) -> Value:
        """Run a function that writes by sessions of your own, and again where a fence refused it, as `run` does.

        Args:
            work: What runs; it begins and ends its transaction itself.
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Returns:
            What `work` returns.

        Raises:
            AuthorityMoving: Authority moved within `pinned`.
            LockNotGranted: A fence did not end within the limits' pause.
        """
        runtime, pin, tenant_name = self._placed(tenant)
        who = self._who(context)

        def attempt(pin: Pin) -> Value:
            with _measured(runtime, pin, tenant_name, who):
                value = work(_place(pin, tenant_name))
            runtime.wrote_for(who, pin.rule.writes)
            return value

        return self._until_done(runtime, pin, tenant_name, attempt)

    async def rerun_async(
        self, work: Callable[[Place], Awaitable[Value]], *, tenant: Tenant | None = None, context: Who | None = None
    ) -> Value:
        """Run a coroutine function that writes by sessions of your own, and again where a fence refused it (asyncio).

        The event loop goes on while it waits for a fence.

        Args:
            work: What is awaited; it begins and ends its transaction itself.
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Returns:
            What `work` returns.

        Raises:
            AuthorityMoving: Authority moved within `pinned`.
            LockNotGranted: A fence did not end within the limits' pause.
        """
        if self._runtime is None:  # the first look at the ledger may take a while
            await asyncio.to_thread(self._running)
        runtime, pin, tenant_name = self._placed(tenant)
        who, tries = self._who(context), Tries()
        while True:
            try:
                with _measured(runtime, pin, tenant_name, who):
                    value = await work(_place(pin, tenant_name))
            except Exception as error:
                await asyncio.sleep(self._pause(runtime, pin, tries, error))
                pin = self._decided(runtime, tenant_name, pin, error)
                continue
            tries.end(runtime)
            if runtime.reads.open:
                await asyncio.to_thread(runtime.wrote_for, who, pin.rule.writes)
            else:
                runtime.wrote_for(who, pin.rule.writes)
            return value

    def run(self, work: Callable[[RoutedStore], Value], *, tenant: Tenant | None = None, context: Who | None = None) -> Value:
        """Run a function in a transaction on the store that has authority, and again where a fence refused it.

        The function gets the store, as `write` lends it. It reads in there whatever its writes
        depend on, and has no other effect. After a fence, a deadlock or a serialization failure it
        runs again as a whole, perhaps on the other store. Whatever else it raises rolls back and
        goes to the caller; so does a COMMIT of unknown outcome.

        Within `pinned` earlier reads of the request may have come from the store that lost
        authority. So there a move raises `AuthorityMoving`, and the request is to be run anew.

        Args:
            work: What runs.
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Returns:
            What `work` returns.

        Raises:
            AuthorityMoving: Authority moved within `pinned`.
            LockNotGranted: A fence did not end within the limits' pause.
            Refused: A mirrored row is of another tenant.
            ServerUnavailable: The store that has authority can't be reached.
        """
        runtime, pin, tenant_name = self._called(tenant)

        def attempt(pin: Pin) -> Value:
            with self._unit(runtime, pin, tenant_name, self._who(context)) as store:
                value = work(store)
            return value

        return self._until_done(runtime, pin, tenant_name, attempt)

    @contextmanager
    def read(self, tenant: Tenant | None = None, *, context: Who | None = None) -> Iterator[RoutedStore]:
        """Lend the store that has authority for reads, or the new one to a context whose reads have moved before the writes.

        Args:
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Yields:
            The store: its cursor, and which one it is.

        Raises:
            ServerUnavailable: The store can't be reached.
        """
        runtime, pin, tenant_name = self._called(tenant)
        origin, started = runtime.reading(pin, self._who(context)), time.monotonic()
        try:
            with runtime.session(origin) as connection, connection.cursor() as cursor:
                yield RoutedStore(origin, pin.stage, pin.observation.epoch, _named(tenant_name), cursor)
        except Exception as error:
            runtime.done(Operation.READ, tenant_name, origin, started, error)
            raise
        runtime.done(Operation.READ, tenant_name, origin, started)

    def compare(
        self, *, old: Callable[[Cursor], Value], new: Callable[[Cursor], Value], experiment: Experiment | None = None,
        tenant: Tenant | None = None, context: Who | None = None, beside: Mapping[str, Answer] | None = None,
    ) -> Value:  # fmt: skip
        """Return what the store that has authority answers; at shadow and live the other one is asked beside it.

        A context whose reads have moved gets the new store's answer, which is compared with nothing.

        A function gets a cursor and only reads. Both return what can be compared: plain values, or
        rows under the same names, or what the experiment's `clean` and `compare` understand.
        `tenant` is that of the rows asked for; a read over several tenants is one read of each.

        Both functions may be called again later, for the comparison, off the caller's thread. So
        they must not depend on a variable that changes meanwhile, such as a loop's variable in a
        lambda. A default argument binds its value: `lambda cursor, user=user: …`.

        Args:
            old: What reads the old store.
            new: What reads the new store.
            experiment: How two answers are compared; None compares them as they are.
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.
            beside: What else answers this read, a function without arguments by its name. It is asked once,
                and counted by that name.

        Returns:
            The answer of the store that has authority.

        Raises:
            ServerUnavailable: That store can't be reached.
        """
        runtime, pin, tenant_name = self._called(tenant)
        origin = runtime.reading(pin, self._who(context))
        reads = {Origin.OLD: old, Origin.NEW: new}
        started = time.monotonic()
        try:
            with runtime.session(origin) as connection, connection.cursor() as cursor:
                value = reads[origin](cursor)
        except Exception as error:
            runtime.done(Operation.READ, tenant_name, origin, started, error)
            raise
        compares = pin.rule.compares and origin is pin.rule.reads and runtime.comparisons.sampling.takes()
        if compares and (epoch := runtime.comparable(pin, tenant_name)) is not None:
            seconds = time.monotonic() - started
            comparison = Comparison(
                experiment or _PLAIN, pin.stage, origin, Observation(origin, value, None, seconds), reads, beside or {},
                apart=runtime.apart(pin), epoch=epoch, tell=partial(runtime.compared, tenant_name, origin, seconds),
            )  # fmt: skip
            if runtime.comparisons.offer(comparison):
                return value
        runtime.done(Operation.READ, tenant_name, origin, started)
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

    def reading(self, tenant: Tenant | None = None, *, context: Who | None = None) -> Place:
        """Say which store serves a read, for sessions of your own.

        Args:
            tenant: The tenant of the rows; None where the spec names no tenants.
            context: For whom it is, where reads move before writes: a key of the kind "user", or a context of LaunchDarkly's.

        Returns:
            Which store it is.

        Raises:
            ServerUnavailable: Only the ledger could tell, and it can't be reached.
        """
        runtime, pin, tenant_name = self._called(tenant)
        origin = runtime.reading(pin, self._who(context))
        return Place(origin, pin.stage, pin.observation.epoch, _named(tenant_name))

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
        """Return the last mismatched reads of this process, 100 at most, with their values."""
        return self._running().comparisons.tally.mismatches

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

    def _who(self, given: Who | None) -> Context | None:
        """Return the context of a call; raises TypeError for none that the SDK takes."""
        if given is None:
            return None
        if self._parts.endpoints[Origin.OLD].tenant is not None:
            raise TypeError("context= is given, but rows move by tenants, and their reads with them: leave it out")
        name = None if isinstance(given, Context) else as_text(given)
        context = given if isinstance(given, Context) else Context.create(name or "")
        if not context.valid:
            raise TypeError(f"context= is {type(given).__name__}: give a key (str, int, UUID) or LaunchDarkly's own context")
        return context

    def _pin(self, runtime: Runtime, tenant: str) -> Pin:
        pinned = self._pinned.get()
        if pinned is None:
            return runtime.decide(runtime.desired(tenant), tenant)
        if (pin := pinned.get(tenant)) is None:
            pin = pinned[tenant] = runtime.decide(runtime.desired(tenant), tenant)
        return pin

    @contextmanager
    def _unit(self, runtime: Runtime, pin: Pin, tenant: str, context: Context | None) -> Iterator[RoutedStore]:
        """Lend a store for one transaction, and mirror after its COMMIT what the block said that it wrote."""
        origin, written, started = pin.rule.writes, None, time.monotonic()
        endpoint, mapped = self._parts.endpoints[origin], bool(self._parts.mirrored)
        try:
            with runtime.session(origin) as connection:
                try:
                    with transaction(connection, mirrored=mapped) as cursor:
                        counts = runtime.tables[origin].begin(cursor) if mapped and pin.rule.mirrors else None
                        if endpoint.tenant is not None:
                            cursor.execute("SELECT pg_catalog.set_config(%s, %s, true)", [TENANT_SETTING, tenant])
                        store = RoutedStore(origin, pin.stage, pin.observation.epoch, _named(tenant), cursor)
                        yield store
                        if counts is not None and not failed(connection):
                            written = counts.end(cursor, store.changes, endpoint.log, _named(tenant))
                finally:  # a session that was lost at the COMMIT says nothing, and the write may be done
                    runtime.wrote_for(context, origin, connection)
        except Exception as error:
            runtime.done(Operation.WRITE, tenant, origin, started, error)
            raise
        # From here on the COMMIT is acknowledged; any exception above means that it is not, and nothing is mirrored.
        runtime.wrote()
        if written is None or not written.told:
            runtime.done(Operation.WRITE, tenant, origin, started)
            return
        store.version = Version(pin.observation.epoch, written.lsn, DUAL_WRITE_ORDINAL)
        ended = runtime.mirrored(tenant, origin, started)
        store.mirrored = runtime.mirror(other(origin)).offer(store.version, written.told, written.share, ended)

    def _placed(self, tenant: Tenant | None) -> tuple[Runtime, Pin, str]:
        """Return by which pin a unit goes whose sessions are the application's; a router that mirrors has to see each row."""
        if self._parts.mirrored:
            raise TypeError("a router that mirrors sees what `write` and `run` did, and nothing else")
        return self._called(tenant)

    def _called(self, tenant: Tenant | None) -> tuple[Runtime, Pin, str]:
        """Return by which pin a call goes."""
        tenant_name = self._tenant(tenant)
        runtime = self._running()
        return runtime, self._pin(runtime, tenant_name), tenant_name

    def _until_done(self, runtime: Runtime, pin: Pin, tenant: str, attempt: Callable[[Pin], Value]) -> Value:
        """Try a unit until it is done, each time by the pin that holds then."""
        tries = Tries()
        while True:
            try:
                value = attempt(pin)
            except Exception as error:
                pin = self._again(runtime, tenant, pin, tries, error)
                continue
            tries.end(runtime)
            return value

    @staticmethod
    def _moving(runtime: Runtime, pin: Pin) -> AuthorityMoving:
        """Return the error for a caller that has to run its request anew."""
        return AuthorityMoving(runtime.parts.endpoints[pin.rule.writes].name)

    @contextmanager
    def _refusals(self, runtime: Runtime, pin: Pin) -> Iterator[None]:
        """Raise AuthorityMoving for what a fence refused: a block can't be run again by itself."""
        try:
            yield
        except Exception as error:
            if sqlstate(error) == FENCED:
                raise self._moving(runtime, pin) from error
            raise

    def _again(self, runtime: Runtime, tenant: str, pin: Pin, tries: Tries, error: Exception) -> Pin:
        """Wait for what refused a unit, and return by which pin it runs again; raises the error where it does not."""
        seconds = self._pause(runtime, pin, tries, error)
        if sqlstate(error) == FENCED and runtime.follower is not None:
            runtime.follower.wait(tenant, pin.observation, seconds)
        else:
            time.sleep(seconds)
        return self._decided(runtime, tenant, pin, error)

    def _pause(self, runtime: Runtime, pin: Pin, tries: Tries, error: Exception) -> float:
        """Return for how long a unit waits before it runs again; raises the error where it does not."""
        state = sqlstate(error)
        if state == FENCED:
            since = tries.paused()
            if time.monotonic() - since >= self._parts.limits.max_pause:
                runtime.waited(time.monotonic() - since)
                endpoint = self._parts.endpoints[pin.rule.writes].name
                raise LockNotGranted(endpoint, "write authority", "a fence that did not end") from error
            if runtime.follower is not None:
                runtime.follower.hurry()
            return FENCE_POLL_SECONDS
        if state not in RETRIED or tries.count >= TRIES:
            raise error
        runtime.count("retries")
        tries.count += 1
        return before_retry(tries.count - 1)

    def _decided(self, runtime: Runtime, tenant: str, pin: Pin, error: Exception) -> Pin:
        """Return by which pin a refused unit runs anew: the ledger's next word, or the same store, if the fence was called off."""
        if sqlstate(error) != FENCED:
            return pin
        pinned = self._pinned.get()
        decided = runtime.decide(runtime.desired(tenant) if pinned is None else pin.desired, tenant)
        if pinned is not None and decided.rule.writes is not pin.rule.writes:
            # what the request read before came from the store that others go on from (attacks, rule 17)
            raise self._moving(runtime, pin) from error
        if pinned is not None:
            pinned[tenant] = decided
        return decided


def _place(pin: Pin, tenant: str) -> Place:
    return Place(pin.rule.writes, pin.stage, pin.observation.epoch, _named(tenant))


def _named(tenant: str) -> str | None:
    return None if tenant == EVERYTHING else tenant


@contextmanager
def _measured(runtime: Runtime, pin: Pin, tenant: str, who: Context | None) -> Iterator[None]:
    """Count a write by the application's own sessions, and put it down for the SDK; one that failed may have committed before."""
    started = time.monotonic()
    try:
        yield
    except BaseException as error:
        runtime.may_have_written(who, pin.rule.writes)
        if isinstance(error, Exception):
            runtime.done(Operation.WRITE, tenant, pin.rule.writes, started, error)
        raise
    runtime.wrote()
    runtime.done(Operation.WRITE, tenant, pin.rule.writes, started)


def _mirrored(spec: Spec, mappings: Mapping[str, TableMapping] | None) -> list[MirroredTable]:
    """Return the tables whose rows the application mirrors; raises SpecError for mappings that do not fit."""
    if not spec.mirrors:
        if mappings:
            problem = f"is {STREAM!r}, so nothing needs mappings: leave them out, or set {APPLICATION!r}"
            raise SpecError(spec.path, "flag.mirror", problem)
        return []
    given = {spec.table(name).source: mapping for name, mapping in (mappings or {}).items()}
    if lacking := [table.source for table in spec.tables if table.source not in given]:
        problem = f"is {APPLICATION!r}: the router needs a TableMapping for each table, and has none for {', '.join(lacking)}"
        raise SpecError(spec.path, "flag.mirror", problem)
    return [
        MirroredTable(
            table.source, table.target, given[table.source].to_new, given[table.source].to_old, new_tenant=new_column(spec, table)
        )
        for table in spec.tables
    ]


@dataclass
class Tries:
    """How often a unit of work met another transaction, and since when a fence refuses it (seconds on the monotonic clock)."""

    count: int = 1
    since: float | None = None

    def paused(self) -> float:
        """Return since when a fence refuses it."""
        self.since = time.monotonic() if self.since is None else self.since
        return self.since

    def end(self, runtime: Runtime) -> None:
        """Record what a fence cost it."""
        if self.since is not None:
            runtime.waited(time.monotonic() - self.since)


_PLAIN = Experiment()
_INHERITED: list[Runtime] = []
"""The parent's threads and sessions in a forked child: never used, never collected, so that its sessions stay open."""


def _forget_parent(router: Router | None) -> None:
    if router is not None:
        router._starting = threading.Lock()
        if router._runtime is not None:
            _INHERITED.append(router._runtime)
            router._runtime = None
