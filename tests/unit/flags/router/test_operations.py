"""What LaunchDarkly's dashboards of a migration are told: every operation, sent by the SDK itself to a server of the test's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient import Config, LDClient
from ldclient.migrations.types import Origin, Stage

from changeover.flags import flagfile
from changeover.flags.flagfile import FileSource
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.follower import LedgerAuthority
from changeover.flags.router.router import Router
from tests.support.fix_flags import FLAG, MIGRATION, PATIENCE, PATIENT, Follow, FollowRead, Stores, wait_until

Events = list[dict[str, Any]]


@contextmanager
def collecting() -> Iterator[tuple[str, Events]]:
    """Serve what the SDK sends its events to; yields the address, and the events of operations that came."""
    events: Events = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
        yield f"http://127.0.0.1:{server.server_port}", events
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def told(stores: Stores, flag_file: Path) -> Iterator[tuple[Router, Events, Callable[[Stage], None]]]:
    """Make a router whose client sends events; yields it, what was sent, and what switches its stage."""
    with collecting() as (address, events):
        client = LDClient(
            Config(
                "sdk-key", update_processor_class=lambda config, store, ready: FileSource(flag_file, 0.05, config, store, ready),
                events_uri=address, flush_interval=0.1, diagnostic_opt_out=True,
            )
        )  # fmt: skip
        router = Router(
            old=stores.endpoint(Origin.OLD), new=stores.endpoint(Origin.NEW), stage=FlagStage(client, FLAG, tracks=True),
            authority=LedgerAuthority(stores.new_dsn, MIGRATION), name=MIGRATION, limits=PATIENT,
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
