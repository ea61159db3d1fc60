"""An application on asyncio with pools of its own: many requests at once, each a unit of work, until SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import uuid
from collections import Counter, deque
from typing import Any

from ldclient.migrations.types import Origin
from psycopg_pool import AsyncConnectionPool

from changeover.api import Place, Router, load
from changeover.errors import ChangeoverError

REQUESTS = 4
"""Requests that are served at once."""


class Application:
    """Its pools, and the orders that it made last."""

    def __init__(self, router: Router, pools: dict[Origin, AsyncConnectionPool[Any]]) -> None:
        self.router = router
        self.pools = pools
        self.known: deque[uuid.UUID] = deque(maxlen=50)

    async def insert(self, place: Place) -> int:
        """Place an order with two items."""
        made = uuid.uuid4()
        async with self.pools[place.origin].connection() as connection:
            await connection.execute("INSERT INTO orders (id, customer, placed) VALUES (%s, 'eve', now())", [made])
            async with connection.cursor() as cursor:
                items = [(made, line, f"sku {line}", line) for line in (1, 2)]
                await cursor.executemany("INSERT INTO items VALUES (%s, %s, %s, %s)", items)
        self.known.append(made)
        return 1

    async def delete(self, place: Place) -> int:
        """Take an order back, and its items."""
        taken = [random.choice(self.known) if self.known else uuid.uuid4()]
        async with self.pools[place.origin].connection() as connection:
            await connection.execute("DELETE FROM items WHERE order_id = %s", taken)
            return (await connection.execute("DELETE FROM orders WHERE id = %s", taken)).rowcount

    async def serve(self) -> tuple[str, int]:
        """Serve one request; return what it did, and to how many orders."""
        kind, work = random.choice([("inserted", self.insert), ("deleted", self.delete)])
        return kind, await self.router.rerun_async(work)


async def requests(application: Application, ended: asyncio.Event, done: Counter[str]) -> None:
    """Serve one request after the other."""
    while not ended.is_set():
        try:
            kind, count = await application.serve()
        except ChangeoverError as error:  # such as a fence that took too long: the request failed, and nothing was written
            kind, count = f"failed: {error}", 1
        done[kind] += count
        await asyncio.sleep(0.1)


async def main() -> None:
    """Serve requests until SIGTERM, and print what was done."""
    ended, done = asyncio.Event(), Counter[str]()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    with Router.connect(load("changeover.toml")) as router:
        async with (
            AsyncConnectionPool(os.environ["OLD_DSN"], open=False) as old,
            AsyncConnectionPool(os.environ["NEW_DSN"], open=False) as new,
        ):
            application = Application(router, {Origin.OLD: old, Origin.NEW: new})
            await asyncio.gather(*(requests(application, ended, done) for _ in range(REQUESTS)))
    print(json.dumps(done))


if __name__ == "__main__":
    asyncio.run(main())
