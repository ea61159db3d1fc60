"""The service that LaunchDarkly's sdk-test-harness commands: clients are made, commanded and ended over HTTP.

Only what the group `migrations` needs is declared as a capability, and only its commands are known.
"""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

from tests.contract.client_entity import ClientEntity
from tests.contract.payloads import Payloads

CAPABILITIES = ("server-side", "migrations", "event-sampling", "inline-context-all", "anonymous-redaction")

COMMANDS = {
    "evaluate": ClientEntity.evaluate,
    "migrationVariation": ClientEntity.migration_variation,
    "migrationOperation": ClientEntity.migration_operation,
}


class Service:
    """The clients that the harness made, by their path."""

    def __init__(self, stores: Payloads) -> None:
        self.stores = stores
        self.clients: dict[str, ClientEntity] = {}
        self._numbers = count(1)

    def create(self, params: dict[str, Any]) -> str | None:
        """Make a client and return its path; None where it has no flags and may not be without."""
        client = ClientEntity(params["configuration"], self.stores)
        if not client.usable and not params["configuration"].get("initCanFail", False):
            client.close()
            return None
        path = f"/clients/{next(self._numbers)}"
        self.clients[path] = client
        return path

    def close(self) -> None:
        """End the clients that the harness left."""
        for client in self.clients.values():
            client.close()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    service: Service

    def do_GET(self) -> None:
        """Say what the service can do."""
        self._answer(HTTPStatus.OK, {"name": "changeover", "capabilities": CAPABILITIES})

    def do_POST(self) -> None:
        """Make a client, or command one."""
        params = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            if self.path == "/":
                self._create(params)
            else:
                self._command(params)
        except Exception:  # the harness shows the answer's text with the test that failed
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, traceback.format_exc())

    def do_DELETE(self) -> None:
        """End a client."""
        client = self.service.clients.pop(self.path, None)
        if client is not None:
            client.close()
        self._answer(HTTPStatus.NOT_FOUND if client is None else HTTPStatus.ACCEPTED)

    def _create(self, params: dict[str, Any]) -> None:
        path = self.service.create(params)
        if path is None:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "the client has no flags")
        else:
            self._answer(HTTPStatus.CREATED, location=path)

    def _command(self, params: dict[str, Any]) -> None:
        client, command = self.service.clients.get(self.path), params["command"]
        if client is None:
            self._answer(HTTPStatus.NOT_FOUND)
        elif command == "flushEvents":
            client.flush()
            self._answer(HTTPStatus.ACCEPTED)
        elif command in COMMANDS:
            self._answer(HTTPStatus.OK, COMMANDS[command](client, params[command]))
        else:
            self._answer(HTTPStatus.BAD_REQUEST)

    def _answer(self, status: HTTPStatus, body: Any = None, location: str | None = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if location is not None:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def serving(stores: Payloads) -> Iterator[str]:
    """Serve on a port of this machine; yields the address."""
    service = Service(stores)
    handler = type("ServiceHandler", (Handler,), {"service": service})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.02])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        service.close()
