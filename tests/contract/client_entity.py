"""One SDK client of the harness's, and what the harness commands of it: operations go through the router, by both real stores.

The harness tells a migration's operation by two callbacks, one a store. Here the old store's callback is part of what the
application does there, and so is the new store's. A read posts the payload and returns the answer. A write inserts the payload
as a row and posts it, in one transaction. For the other store the mapping posts it, and the mirror brings the row through the
gate. A callback that answers by an error is an error of that store's.

A router is made for each operation, because the flag, the context and the callbacks are the operation's. It has no ledger, so
authority follows the flag. The answer waits until the mirror, the comparison and the SDK have had what there is.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from ldclient import Config, Context, LDClient
from ldclient.migrations.tracker import OpTracker
from ldclient.migrations.types import Operation, Origin, Stage

from changeover.flags.mirror.change import MirroredTable, Row, RowMapping, returned
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import Cursor
from changeover.flags.router.operations import Done, Operations
from changeover.flags.router.router import RoutedStore, Router
from tests.contract.payloads import TABLE, Payloads
from tests.support.fix_flags import PATIENCE, PATIENT

INSERT = "INSERT INTO public.payloads VALUES (%s, %s) RETURNING *"

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The harness is on this machine, whatever proxy the environment names."""

Params = Mapping[str, Any]


class CallbackFailed(Exception):
    """The harness answered a callback by an error, as it does where a store is to fail."""


def post(url: str, payload: str | None) -> str:
    """Post a payload to a callback, and return what it answers."""
    request = urllib.request.Request(url, (payload or "").encode(), method="POST")
    try:
        with OPENER.open(request, timeout=PATIENCE) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        error.close()
        raise CallbackFailed(f"the callback answered {error.code}") from error


class Asked(OpTracker):
    """Passes on to the SDK's tracker what the harness wants measured; a router of an application's measures it all."""

    def __init__(self, tracker: OpTracker, params: Params) -> None:
        self.tracker = tracker
        self.params = params

    def invoked(self, origin: Origin) -> OpTracker:
        self.tracker.invoked(origin)
        return self

    def latency(self, origin: Origin, duration: timedelta) -> OpTracker:
        if self.params.get("trackLatency"):
            self.tracker.latency(origin, duration)
        return self

    def error(self, origin: Origin) -> OpTracker:
        if self.params.get("trackErrors"):
            self.tracker.error(origin)
        return self


class MeasuredAsAsked(Operations):
    """Tells the SDK of an operation as the harness wants it told."""

    def __init__(self, stage: HarnessStage) -> None:
        self.params = stage.params
        super().__init__(stage.client, stage.key, lambda _: stage.context, stage.default)

    def record(self, done: Done) -> None:
        super().record(done if self.params.get("trackConsistency") else replace(done, consistent=None))

    def _measure(self, tracker: OpTracker, done: Done) -> None:
        super()._measure(Asked(tracker, self.params), done)


class HarnessStage(FlagStage):
    """The stage of the flag that an operation names, for the context that it names."""

    def __init__(self, client: LDClient, params: Params) -> None:
        self.params = params
        default = Stage(params["defaultStage"])
        super().__init__(client, params["key"], Context.from_dict(params["context"]), tracks=True, default=default)

    def operations(self) -> Operations:
        return MeasuredAsAsked(self)


@dataclass(frozen=True)
class Application:
    """What the application does in an operation: it reads or writes a store, which is the store's callback."""

    callbacks: Mapping[Origin, str]
    payload: str | None
    row: int

    @classmethod
    def of(cls, params: Params, row: int) -> Application:
        """Return that of an operation, which writes one row."""
        return cls({Origin.OLD: params["oldEndpoint"], Origin.NEW: params["newEndpoint"]}, params.get("payload"), row)

    def read(self, origin: Origin) -> Callable[[Cursor], str]:
        """Return what reads a store."""
        return lambda cursor: post(self.callbacks[origin], self.payload)

    def write(self, store: RoutedStore) -> str:
        """Write to the store that has authority."""
        store.execute(INSERT, [self.row, self.payload])
        store.mirror(returned(store.cursor))
        return post(self.callbacks[store.origin], self.payload)

    def mapping(self, origin: Origin) -> RowMapping:
        """Return what makes a store's row of the other one's, and tells the store's callback of it."""

        def mapped(row: Row) -> Row:
            post(self.callbacks[origin], row["payload"])
            return row

        return mapped


class ClientEntity:
    """A client, from its configuration to its end."""

    def __init__(self, configuration: Params, stores: Payloads) -> None:
        self.stores = stores
        self.client = LDClient(configured(configuration), (configuration.get("startWaitTimeMs") or 5000) / 1000)

    @property
    def usable(self) -> bool:
        """Return whether the client has the flags."""
        return bool(self.client.is_initialized())

    def evaluate(self, params: Params) -> Any:
        """Evaluate a flag of any type."""
        context = Context.from_dict(params["context"])
        if not params.get("detail"):
            return {"value": self.client.variation(params["flagKey"], context, params["defaultValue"])}
        detail = self.client.variation_detail(params["flagKey"], context, params["defaultValue"])
        return {"value": detail.value, "variationIndex": detail.variation_index, "reason": detail.reason}

    def migration_variation(self, params: Params) -> Any:
        """Return the stage that the router of the flag acts at."""
        with self._router(params, Application({}, None, 0)) as router:
            return {"result": router.stage.value}

    def migration_operation(self, params: Params) -> Any:
        """Read or write through the router; where that fails the result is the error."""
        application = Application.of(params, next(self.stores.ids))
        with self._router(params, application) as router:
            try:
                if params["operation"] == Operation.READ.value:
                    result = router.compare(old=application.read(Origin.OLD), new=application.read(Origin.NEW))
                else:
                    result = router.run(application.write)
            except CallbackFailed as error:
                result = str(error)
            if not router.drain(PATIENCE):
                raise TimeoutError("the router is not done with an operation")
        return {"result": result}

    def flush(self) -> None:
        """Send the events."""
        self.client.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """End the client."""
        self.client.close()  # type: ignore[no-untyped-call]

    def _router(self, params: Params, application: Application) -> Router:
        return Router(
            old=self.stores.endpoint(Origin.OLD), new=self.stores.endpoint(Origin.NEW), stage=HarnessStage(self.client, params),
            mirrored=[MirroredTable(TABLE, TABLE, application.mapping(Origin.NEW), application.mapping(Origin.OLD))],
            name="contract", limits=PATIENT,
        )  # fmt: skip


def configured(configuration: Params) -> Config:
    """Return the SDK's configuration for the harness's, without what no test of migrations sets."""
    streaming, events = configuration.get("streaming") or {}, configuration.get("events")
    options: dict[str, Any] = {"stream_uri": streaming.get("baseUri"), "send_events": events is not None}
    if (delay := streaming.get("initialRetryDelayMs")) is not None:
        options["initial_reconnect_delay"] = delay / 1000
    if events is not None:
        options.update(
            events_uri=events["baseUri"], events_max_pending=events.get("capacity") or 10_000,
            flush_interval=(events.get("flushIntervalMs") or 5000) / 1000,
            diagnostic_opt_out=not events.get("enableDiagnostics", False),
            all_attributes_private=events.get("allAttributesPrivate", False),
            private_attributes=events.get("globalPrivateAttributes") or [],
            omit_anonymous_contexts=events.get("omitAnonymousContexts", False),
            enable_event_compression=events.get("enableGzip", False),
        )  # fmt: skip
    return Config(configuration["credential"], **options)
