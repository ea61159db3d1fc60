"""The desired stage: which one the flag asks for, with the last acknowledged one kept when there is no usable answer.

A missing flag, a misspelt variation, a value of another type, a bad file or a service that can't be
reached never moves a process. The process stays where it was and says so, by a warning in the log
and a counter. In particular it does not fall back to `off` after `complete`, which would be the
dead store. A forked child starts the SDK anew before its first evaluation. Tenants are asked for
one by one where the spec names their column; what is kept of them is bounded.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol
from weakref import WeakKeyDictionary

from ldclient import Context, LDClient
from ldclient.interfaces import DataSourceState, DataSourceStatus
from ldclient.migrations.types import Stage

from changeover.flags.alarm import Alarm
from changeover.flags.router.operations import Operations
from changeover.jobs.ledger.epochs import EVERYTHING

EVERYONE = Context.builder("everyone").kind("changeover").build()
"""One context for all rows that are not asked for by tenant, whatever a rule in the flag says of other contexts."""

FRESH_SECONDS = 0.005
"""For how long what the flag asks of everybody is taken for that of now: an evaluation is half of what a call costs."""

KEPT = 10_000
"""Tenants of which the last stage is kept, because it is not everybody's; beyond so many the longest kept are forgotten."""

_STAGES = {stage.value: stage for stage in Stage}

_RESTARTED: WeakKeyDictionary[LDClient, int] = WeakKeyDictionary()
"""In which process each client was started anew: however many routers share one, it has one stream a process."""

_RESTARTING = threading.Lock()


def _restart(client: LDClient) -> None:
    """Start a client's threads in a forked child, once."""
    with _RESTARTING:
        if _RESTARTED.get(client) != os.getpid():
            client.postfork()
            _RESTARTED[client] = os.getpid()


class StageSource(Protocol):
    """What the router asks for the desired stage."""

    alarm: Alarm

    def stage(self, tenant: str = EVERYTHING) -> Stage | None:
        """Return the stage desired for a tenant, or of everybody; the last known one, or None when there never was one.

        It runs on the caller's thread.
        """
        ...

    def after_fork(self) -> None:
        """Make the source usable in a forked child (first use in the child)."""
        ...

    def operations(self) -> Operations | None:
        """Start what is told of each operation in this process; None where nobody is told."""
        ...


class FlagStage:
    """The stage of one flag of an SDK client, migration flag or string flag alike; thread-safe.

    A tenant is a context of a `kind` of its own, with the tenant as key: individual targets, rules and percentage rollouts for that
    kind act on it. Without a usable answer it goes by the last one that it had, if that is among those that are `KEPT`, and else by
    the last one for everybody. `complete`, which is final, is of everybody alone: a tenant waits at rampdown. With `tracks` the
    client is told of each operation, as a migration flag's dashboards show them.
    """

    def __init__(
        self, client: LDClient, key: str, context: Context = EVERYONE, *, kind: str | None = None, tracks: bool = False
    ) -> None:  # fmt: skip
        self.client = client
        self.tracks = tracks
        self.key = key
        self.context = context
        self.kind = kind
        self._known: Stage | None = None
        self._fresh_until = 0.0
        self._apart: dict[str, Stage] = {}
        self._keeping = threading.Lock()
        self._pid = os.getpid()
        self._listen()

    def stage(self, tenant: str = EVERYTHING) -> Stage | None:
        """Evaluate the flag, which takes some 15 microseconds.

        `variation` with None as default, not `migration_variation`: the latter gives its default
        stage both when the flag says so and when there is no answer. It takes more than twice as
        long, too.
        """
        alone = tenant != EVERYTHING and self.kind is not None
        if not alone and time.monotonic() < self._fresh_until:
            return self._known
        value = self.client.variation(self.key, self._context(tenant), None)
        stage = _STAGES.get(value) if isinstance(value, str) else None
        if stage is None:
            self.alarm.raise_for("no answer" if value is None else f"{value!r} is no stage")
            return self._apart.get(tenant, self._known)
        if not alone:
            if stage is not self._known:
                self._everybody(stage)
            self._fresh_until = time.monotonic() + FRESH_SECONDS
            return stage
        if stage is Stage.COMPLETE and self._known is not stage and self.stage() is not stage:
            stage = Stage.RAMPDOWN
        if stage is not self._apart.get(tenant, self._known):
            self._keep(tenant, stage)
        return stage

    def _context(self, tenant: str) -> Context:
        return Context.create(tenant, self.kind) if tenant != EVERYTHING and self.kind is not None else self.context

    def operations(self) -> Operations | None:
        """Start the thread that tells the client."""
        return Operations(self.client, self.key, self._context) if self.tracks else None

    def _everybody(self, stage: Stage) -> None:
        with self._keeping:
            self._known = stage
            self._apart = {tenant: kept for tenant, kept in self._apart.items() if kept is not stage}

    def _keep(self, tenant: str, stage: Stage) -> None:
        with self._keeping:
            self._apart.pop(tenant, None)
            if stage is not self._known:
                self._apart[tenant] = stage
                if len(self._apart) > KEPT:
                    del self._apart[next(iter(self._apart))]

    def after_fork(self) -> None:
        """Restart the SDK's threads, which did not come along; without it the child keeps its first stage for ever."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._fresh_until = 0.0
            self._keeping = threading.Lock()
            _restart(self.client)
            self._listen()

    def _listen(self) -> None:
        """Hear of a bad file or a lost service, during which the SDK goes on answering from what it has."""
        self.alarm = Alarm(f"flag {self.key} has no usable answer: the last acknowledged stage stays")
        self.client.data_source_status_provider.add_listener(self._source_changed)

    def _source_changed(self, status: DataSourceStatus) -> None:
        if status.state is not DataSourceState.VALID:
            self.alarm.raise_for(f"the flag's source is {status.state.value}")
