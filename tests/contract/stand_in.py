"""What the harness serves, as far as the tests of the service need it: the flags' stream, the events' sink and two callbacks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ldclient.migrations.types import Origin

from changeover.flags.flagfile import VARIATIONS


def flag(key: str, variation: int, **more: Any) -> dict[str, Any]:
    """Return a migration flag that serves one stage to everybody."""
    return {
        "key": key, "on": True, "version": 1, "variations": VARIATIONS, "fallthrough": {"variation": variation},
        "offVariation": 0, "salt": key, **more,
    }  # fmt: skip


@dataclass
class StandIn:
    """The flags that the stream has, what the callbacks answer, and what came: calls of (store, payload), events, raw bodies."""

    url: str = ""
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[Origin, tuple[int, str]] = field(default_factory=dict)
    calls: list[tuple[Origin, str]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def operations(self) -> list[dict[str, Any]]:
        """Return the events of operations, each with its measurements by their key."""
        told = [event for event in self.events if event["kind"] == "migration_op"]
        return [{**event, **{one["key"]: one.get("values", one.get("value")) for one in event["measurements"]}} for event in told]


class StandInHandler(BaseHTTPRequestHandler):
    """Answers what the SDK and the service ask."""

    stand_in: StandIn
    protocol_version = "HTTP/1.1"  # the SDK reads a stream as it comes only where it is chunked

    def do_GET(self) -> None:
        """Send all flags on the stream, which stays open."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        data = json.dumps({"path": "/", "data": {"flags": self.stand_in.flags, "segments": {}}})
        event = f"event: put\ndata: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.flush()
        self.stand_in.ended.wait()

    def do_POST(self) -> None:
        """Take events, or a callback's payload."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name = self.path.removeprefix("/")
        status, answer = 202, ""
        if name in ("old", "new"):
            origin = Origin(name)
            self.stand_in.calls.append((origin, body))
            status, answer = self.stand_in.answers.get(origin, (200, "hello"))
        else:
            self.stand_in.bodies.append(body)
            self.stand_in.events.extend(json.loads(body))
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Serve on a port of this machine."""
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (StandInHandler,), {"stand_in": stand_in}))
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield stand_in
    finally:
        stand_in.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
