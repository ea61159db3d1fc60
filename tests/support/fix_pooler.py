"""Fixtures for poolers: one that gives each transaction the next session of the server, as poolers in transaction mode do."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from psycopg.conninfo import make_conninfo

from changeover.session import connect

REPORTED = ("server_version", "client_encoding", "DateStyle", "TimeZone", "standard_conforming_strings")
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104


class Pooler:
    """A pooler on the loopback address: each of its sessions with the server is lent for one transaction, in turn."""

    def __init__(self, dsn: str, sessions: int) -> None:
        self.backends = [connect(dsn, "pooled") for _ in range(sessions)]
        self.lock = threading.Lock()
        self.lent = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End it, and the server's sessions."""
        self.listener.close()
        for backend in self.backends:
            backend.close()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            self._greet(client)
            asked = b""
            while message := _message(client):
                asked += message
                if message[:1] == b"X":
                    return
                if message[:1] in b"QS":  # a query, or the end of one in parts: the server will say that it is ready
                    client.sendall(self._answer(asked))
                    asked = b""

    def _greet(self, client: socket.socket) -> None:
        """Take a client without a proof, and tell it what the server's sessions report."""
        while True:
            body = _exactly(client, struct.unpack("!I", _exactly(client, 4))[0] - 4)
            if struct.unpack("!I", body[:4])[0] not in (SSL_REQUEST, GSS_REQUEST):
                break
            client.sendall(b"N")
        told = b"R" + struct.pack("!II", 8, 0)
        for name in REPORTED:
            pair = f"{name}\0{self.backends[0].info.parameter_status(name)}\0".encode()
            told += b"S" + struct.pack("!I", len(pair) + 4) + pair
        client.sendall(told + b"K" + struct.pack("!III", 12, 1, 1) + b"Z" + struct.pack("!I", 5) + b"I")

    def _answer(self, asked: bytes) -> bytes:
        with self.lock:
            backend = self.backends[self.lent % len(self.backends)]
            self.lent += 1
            with socket.socket(fileno=os.dup(backend.fileno())) as server:
                server.setblocking(True)
                server.sendall(asked)
                answer = message = _message(server)
                while message[:1] != b"Z":
                    message = _message(server)
                    answer += message
                return answer


def _message(peer: socket.socket) -> bytes:
    """Return the next message of a session that has begun, empty at its end."""
    kind = peer.recv(1)
    if not kind:
        return b""
    size = _exactly(peer, 4)
    return kind + size + _exactly(peer, struct.unpack("!I", size)[0] - 4)


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data


@contextmanager
def pooler(dsn: str, sessions: int) -> Iterator[str]:
    """Run a pooler with so many sessions of the server; yield its DSN."""
    running = Pooler(dsn, sessions)
    try:
        yield running.dsn
    finally:
        running.close()


@pytest.fixture(params=[1, 3])
def pooled_dsn(request: pytest.FixtureRequest, old_dsn: str) -> Iterator[str]:
    """Yield the DSN of a pooler in front of the old store, of one session of the server or of some."""
    with pooler(old_dsn, request.param) as dsn:
        yield dsn
