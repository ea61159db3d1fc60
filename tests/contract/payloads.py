"""Two real stores with a table of payloads each, and the gate of both: each may have authority, and be mirrored to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from ldclient.migrations.types import Origin

from changeover.embedded.server import EmbeddedServer
from changeover.flags.router.endpoint import PgEndpoint
from changeover.position import Version
from changeover.session import connect
from changeover.stores.postgres.gate import install_gate
from tests.support.fix_postgres import fresh_database

TABLE = "public.payloads"
CREATE = f"CREATE TABLE {TABLE} (id bigint PRIMARY KEY, payload text)"
FLOOR = Version(0, 0, 0)
"""Nothing is older: each operation writes a row of its own, so none is ever late."""


@dataclass(frozen=True)
class Payloads:
    """Both stores; `ids` gives each operation's row a key of its own."""

    dsns: dict[Origin, str]
    ids: Iterator[int]

    @classmethod
    @contextmanager
    def on(cls, server: EmbeddedServer) -> Iterator[Payloads]:
        """Make both databases with their tables and gates, and drop them at the end."""
        with fresh_database(server, "contract_old") as old, fresh_database(server, "contract_new") as new:
            for dsn in (old, new):
                with connect(dsn, "contract") as connection:
                    connection.execute(CREATE)
                    install_gate(connection, "public", "payloads", ("id",), FLOOR)
            yield cls({Origin.OLD: old, Origin.NEW: new}, count(1))

    def endpoint(self, origin: Origin) -> PgEndpoint:
        """Return a store as the router reaches it."""
        return PgEndpoint(self.dsns[origin])

    def rows(self, origin: Origin) -> list[str | None]:
        """Return the payloads that a store has, in the order of their keys."""
        with connect(self.dsns[origin], "contract") as connection:
            return [payload for (payload,) in connection.execute("SELECT payload FROM public.payloads ORDER BY id")]
