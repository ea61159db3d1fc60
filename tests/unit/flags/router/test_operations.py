"""What LaunchDarkly's dashboards of a migration are told: every operation, sent by the SDK itself to a server of the test's."""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient import Config, LDClient
from ldclient.migrations.types import Operation, Origin, Stage

from changeover.errors import SecretMissing
from changeover.flags import flagfile
from changeover.flags.flagfile import FileSource
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import Cursor
from changeover.flags.router.follower import LedgerAuthority
from changeover.flags.router.operations import Asked, Done
from changeover.flags.router.router import Router
from changeover.flags.router.runtime import Limits
from changeover.spec import load
from tests.support.fix_flags import FLAG, FOLLOWS, MIGRATION, PATIENCE, PATIENT, Follow, FollowRead, Stores, wait_until, wrote

Events = list[dict[str, Any]]

KINDS = ("index", "feature", "debug", "migration_op")
"""The kinds of events that have a context."""

TENANTS = """
name = "follows"
[source]
dsn = "env:OLD_DSN"
[target.new]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.follows"
target = "public.associations"
key = ["subject", "object"]
[table.columns]
subject = "from_user"
object = "to_channel"
[work]
path = "work"
[flag]
key = "follows-store"
target = "new"
context = "from_user"
"""


@contextmanager
def collecting() -> Iterator[tuple[str, Events, list[str]]]:
    """Serve what the SDK sends its events to; yields the address, the events of operations that came, and all of it as it came."""
    events: Events = []
    bodies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            sent = json.loads(bodies[-1])
            events.extend(event for event in sent if event["kind"] == "migration_op")
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", events, bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sending(flag_file: Path, address: str) -> LDClient:
    """Make a client that follows the flag file and sends its events."""
    return LDClient(
        Config(
            "sdk-key", update_processor_class=lambda config, store, ready: FileSource(flag_file, 0.05, config, store, ready),
            events_uri=address, flush_interval=0.1, diagnostic_opt_out=True,
        )
    )  # fmt: skip


@pytest.fixture
def told(
    stores: Stores, flag_file: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Router, Events, Callable[[Stage], None]]]:
    """Make a router whose client sends events; yields it, what was sent, and what switches its stage. With limits it mirrors."""
    limits: Limits | None = getattr(request, "param", None)
    with collecting() as (address, events, _):
        client = sending(flag_file, address)
        router = Router(
            old=stores.endpoint(Origin.OLD), new=stores.endpoint(Origin.NEW), stage=FlagStage(client, FLAG, tracks=True),
            authority=LedgerAuthority(stores.new_dsn, MIGRATION), name=MIGRATION, limits=limits or PATIENT,
            mirrored=[FOLLOWS] if limits else [],
        )  # fmt: skip

        def switch(stage: Stage) -> None:
            flagfile.write_stage(flag_file, FLAG, stage)
            wait_until(lambda: router.stage is stage)

        yield router, events, switch
        router.close()
        client.close()  # type: ignore[no-untyped-call]


def measured(event: dict[str, Any], key: str) -> dict[str, Any]:
    return next((one for one in event["measurements"] if one["key"] == key), {})


def test_each_operation_is_told_with_what_became_of_it(
    stores: Stores, told: tuple[Router, Events, Callable[[Stage], None]], make_follow: Callable[..., Follow]
) -> None:
    router, events, switch = told
    follow = make_follow(1)
    switch(Stage.DUALWRITE)
    router.run(lambda store: follow.put_old(store.cursor))
    with pytest.raises(psycopg.errors.UndefinedTable), router.read() as store:
        store.execute("SELECT 1 FROM nowhere")
    with router.route():
        pass
    wait_until(lambda: len(events) >= 3)
    assert [event["operation"] for event in events] == ["write", "read", "write"]
    for event in events:
        assert event["evaluation"]["value"] == "dualwrite"
        assert measured(event, "invoked")["values"] == {"old": True}
        assert measured(event, "latency_ms")["values"]["old"] >= 0
    assert [measured(event, "error").get("values") for event in events] == [None, {"old": True}, None]

    switch(Stage.SHADOW)
    for agree in (False, True):
        if agree:
            stores.new.execute("INSERT INTO associations SELECT 1, 1, '{\"note\": \"hello\"}', '{a,NULL}', now()")
            stores.new.execute("UPDATE associations SET seen = %s", [seen(stores)])
        router.compare(old=follow.find_old, new=follow.find_new, experiment=FollowRead())
        assert router.drain(PATIENCE)
    wait_until(lambda: len(events) >= 5)
    for event, consistent in zip(events[3:], (False, True), strict=True):
        assert (event["operation"], measured(event, "consistent")["value"]) == ("read", consistent)
        assert measured(event, "invoked")["values"] == {"old": True, "new": True}
    assert "hello" not in json.dumps(events)


def seen(stores: Stores) -> Any:
    row = stores.old.execute("SELECT seen FROM follows").fetchone()
    assert row is not None
    return row[0]


def test_what_a_fence_refused_is_told_once_it_is_done(
    stores: Stores, told: tuple[Router, Events, Callable[[Stage], None]], make_follow: Callable[..., Follow]
) -> None:
    router, events, switch = told
    switch(Stage.SHADOW)
    follow = make_follow(1)
    stores.refuse(Origin.OLD)
    timer = threading.Timer(0.3, stores.fence_to_new_done)
    timer.start()
    router.run(lambda store: store.of(follow.put_old, follow.put_new)(store.cursor))
    timer.join()
    router.close()
    wait_until(lambda: events)
    assert [measured(event, "invoked")["values"] for event in events] == [{"new": True}]


@pytest.mark.parametrize("told", [PATIENT], indirect=True, ids=["mirrors"])
def test_a_mirrored_write_is_told_once_with_both_stores(
    stores: Stores, told: tuple[Router, Events, Callable[[Stage], None]], make_follow: Callable[..., Follow]
) -> None:
    router, events, switch = told
    switch(Stage.DUALWRITE)
    stores.new.execute("ALTER TABLE associations ADD CHECK (attributes->>'note' <> 'refused')")
    for number, note in enumerate(("hello", "refused")):
        follow = make_follow(number, note=note)
        assert wrote(router, follow.put_old, follow.put_new).mirrored
    wait_until(lambda: len(events) >= 2)
    router.close()
    assert [measured(event, "invoked")["values"] for event in events] == [{"old": True, "new": True}] * 2
    assert [measured(event, "error").get("values") for event in events] == [None, {"new": True}]
    assert all(set(measured(event, "latency_ms")["values"]) == {"old", "new"} for event in events)


@pytest.mark.parametrize("told", [replace(PATIENT, mirror_queue=1, close_wait=0)], indirect=True, ids=["full"])
def test_a_store_that_a_write_was_never_offered_to_is_not_told_as_asked(
    stores: Stores, told: tuple[Router, Events, Callable[[Stage], None]], make_follow: Callable[..., Follow]
) -> None:
    router, events, switch = told
    switch(Stage.DUALWRITE)
    with stores.new.transaction():
        stores.new.execute("LOCK TABLE associations")
        writes = [wrote(router, follow.put_old, follow.put_new) for follow in map(make_follow, range(4))]
        dropped = [write.mirrored for write in writes].count(False)
        assert dropped >= 2
        wait_until(lambda: len(events) >= dropped)
        assert [measured(event, "invoked")["values"] for event in events] == [{"old": True}] * dropped
    wait_until(lambda: len(events) == 4)
    assert [measured(event, "invoked")["values"] for event in events[dropped:]] == [{"old": True, "new": True}] * (4 - dropped)


def test_the_authority_of_a_compared_read_is_told_as_its_caller_found_it(
    stores: Stores, told: tuple[Router, Events, Callable[[Stage], None]]
) -> None:
    router, events, switch = told
    switch(Stage.SHADOW)
    asked: list[str] = []

    def old(cursor: Cursor) -> int:
        asked.append("old")
        if len(asked) > 1:
            cursor.execute("SELECT 1 FROM nowhere")
        return 1

    assert router.compare(old=old, new=lambda cursor: 2) == 1
    wait_until(lambda: events)
    assert len(asked) == 2
    (event,) = events
    assert measured(event, "error") == measured(event, "consistent") == {}
    assert set(measured(event, "latency_ms")["values"]) == {"old", "new"}


ADDRESSES = [f"user{number}@example.com" for number in range(50)]
SECRET = b"the application's own"


def flag_that_tells_of_all(path: Path, key: str) -> None:
    """Have everything sent of a flag that the SDK can send, with one tenant at live by a rule on the private attribute."""
    flagfile.write_stage(path, FLAG, Stage.SHADOW)
    document = json.loads(path.read_text())
    clause = {"attribute": key, "op": "in", "values": ADDRESSES[:1], "contextKind": "owner"}
    document["flags"][FLAG].update(
        trackEvents=True, debugEventsUntilDate=4_000_000_000_000,
        rules=[{"id": "one", "clauses": [clause], "variation": flagfile.VARIATIONS.index("live"), "trackEvents": True}],
    )  # fmt: skip
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("secret", [SECRET, None], ids=["private", "clear"])
def test_no_event_has_a_tenants_value_where_the_flag_is_private_and_every_kind_has_it_elsewhere(
    flag_file: Path, secret: bytes | None
) -> None:
    flag_that_tells_of_all(flag_file, "tenant" if secret else "key")
    with collecting() as (address, _, bodies):
        client = sending(flag_file, address)
        stage = FlagStage(client, FLAG, kind="owner", tracks=True, secret=secret)
        assert [stage.stage(tenant) for tenant in ADDRESSES[:2]] == [Stage.LIVE, Stage.SHADOW]
        operations = stage.operations()
        assert operations is not None
        for tenant in ADDRESSES:
            stage.stage(tenant)
            operations.record(Done(Operation.READ, tenant, [Asked(Origin.OLD, 0.001)]))
        operations.close()
        client.close()  # type: ignore[no-untyped-call]
    events = [event for body in bodies for event in json.loads(body)]
    sent = {kind: json.dumps([event for event in events if event["kind"] == kind]) for kind in KINDS}
    for kind, text in sent.items():
        assert [address for address in ADDRESSES if address in text] == ([] if secret else ADDRESSES), kind
    keys = {event["context"]["key"] for event in events if event["kind"] == "migration_op"}
    assert len(keys) == len(ADDRESSES), "each tenant has a key of its own"
    if secret:
        assert hmac.digest(SECRET, ADDRESSES[0].encode(), "sha256").hex() in keys
        assert not any("example.com" in body for body in bodies)


def test_a_spec_that_is_private_has_the_routers_client_send_no_tenant(
    stores: Stores, flag_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("OLD_DSN", stores.old_dsn), ("NEW_DSN", stores.new_dsn)):
        monkeypatch.setenv(name, value)
    path = tmp_path / "follows.toml"
    path.write_text(f'{TENANTS}private = "env:TENANT_SECRET"\nfile = "{flag_file}"\n')
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    with collecting() as (address, _, bodies):
        client = sending(flag_file, address)
        monkeypatch.delenv("TENANT_SECRET", raising=False)
        with pytest.raises(SecretMissing, match=r"flag\.private"):
            Router.connect(load(path), client=client)
        Router.connect(load(path)).close()  # the file's client sends nothing, so nothing needs the secret
        monkeypatch.setenv("TENANT_SECRET", SECRET.decode())
        with Router.connect(load(path), client=client) as router:
            assert router.stage_of(918273645001) is Stage.SHADOW
        client.close()  # type: ignore[no-untyped-call]
    assert bodies
    assert not any("918273645001" in body for body in bodies)


def test_what_the_router_has_sampled_by_the_flags_ratio_is_not_sampled_once_more(
    stores: Stores, flag_file: Path, told: tuple[Router, Events, Callable[[Stage], None]]
) -> None:
    router, events, switch = told
    flag = flagfile.read_flag(flag_file, FLAG)
    flagfile.write_flag(flag_file, FLAG, {**flag, "migration": {"checkRatio": 1_000}})
    switch(Stage.SHADOW)
    sampling = router._running().comparisons.sampling
    wait_until(lambda: sampling.share == 0.001)
    sampling.ratio = lambda: 1  # what follows is as the router's luck would have it
    wait_until(lambda: sampling.share == 1.0)
    for _ in range(10):
        router.compare(old=lambda cursor: 1, new=lambda cursor: 1)
    assert router.drain(PATIENCE)
    wait_until(lambda: len(events) >= 10)
    consistent = [measured(event, "consistent") for event in events]
    assert consistent == [{"key": "consistent", "value": True, "samplingRatio": 1_000}] * 10


def test_a_read_that_is_not_compared_is_told_as_the_authoritys_alone(
    stores: Stores, flag_file: Path, told: tuple[Router, Events, Callable[[Stage], None]]
) -> None:
    router, events, switch = told
    switch(Stage.SHADOW)
    router._running().comparisons.sampling.ratio = lambda: 0
    wait_until(lambda: router._running().comparisons.sampling.share == 0.0)
    router.compare(old=lambda cursor: 1, new=lambda cursor: 1)
    wait_until(lambda: events)
    assert measured(events[0], "invoked")["values"] == {"old": True}
    assert measured(events[0], "consistent") == {}
