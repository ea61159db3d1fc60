"""An application that follows, changes, unfollows and reads, all through changeover's router, until SIGTERM.

It holds what every application adds: each statement twice, once for each store. Follows of 2018 stay.
"""

from __future__ import annotations

import json
import random
import signal
import threading
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from changeover.api import Router, load
from changeover.errors import ChangeoverError

USERS, CHANNELS = 50, 30
TIME = "%Y-%m-%d %H:%M:%S"

INSERT_OLD = """
INSERT INTO follows (from_user, to_channel, note) VALUES (%(user)s, %(channel)s, %(note)s)
ON CONFLICT (from_user, to_channel) DO NOTHING
"""
INSERT_NEW = """
INSERT INTO associations (entity_a, kind, entity_b, note) VALUES (%(user)s, 'follows', %(channel)s, %(note)s)
ON CONFLICT (entity_a, kind, entity_b) DO NOTHING
"""
BLOCK_OLD = "UPDATE follows SET blocked_on = %(text)s WHERE from_user = %(user)s AND to_channel = %(channel)s"
BLOCK_NEW = """
UPDATE associations SET blocked_on = %(time)s WHERE entity_a = %(user)s AND kind = 'follows' AND entity_b = %(channel)s
"""
DELETE_OLD = """
DELETE FROM follows WHERE from_user = %(user)s AND to_channel = %(channel)s AND created_at >= '2019-01-01'
"""
DELETE_NEW = """
DELETE FROM associations WHERE entity_a = %(user)s AND kind = 'follows' AND entity_b = %(channel)s AND created_at >= '2019-01-01'
"""
READ_OLD = """
SELECT to_channel, note, blocked_on::timestamp AT TIME ZONE 'UTC', created_at FROM follows WHERE from_user = %(user)s ORDER BY 1
"""
READ_NEW = """
SELECT entity_b, note, blocked_on, created_at FROM associations WHERE entity_a = %(user)s AND kind = 'follows' ORDER BY 1
"""


def write(router: Router, old: str, new: str, values: dict[str, Any]) -> int:
    """Write in the store that has authority; return how many rows it was."""
    return router.run(lambda store: store.execute(store.of(old, new), values).rowcount)


def serve(router: Router, rng: random.Random) -> tuple[str, int]:
    """Serve one request; return what it did, and to how many rows."""
    now = datetime.now(UTC).replace(microsecond=0)
    values = {"user": rng.randint(1, USERS), "channel": rng.randint(1, CHANNELS), "note": rng.choice([None, "", "ünï"])}
    values |= {"time": now, "text": now.strftime(TIME)}
    kind = rng.choice(["inserted", "updated", "deleted", "read", "read"])
    if kind == "inserted":
        return kind, write(router, INSERT_OLD, INSERT_NEW, values)
    if kind == "updated":
        return kind, write(router, BLOCK_OLD, BLOCK_NEW, values)
    if kind == "deleted":
        return kind, write(router, DELETE_OLD, DELETE_NEW, values)
    router.compare(
        old=lambda cursor: cursor.execute(READ_OLD, values).fetchall(),
        new=lambda cursor: cursor.execute(READ_NEW, values).fetchall(),
    )
    return kind, 1


def main() -> None:
    """Serve requests until SIGTERM, and print what was done."""
    ended, done, rng = threading.Event(), Counter[str](), random.Random()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Router.connect(load("changeover.toml")) as router:
        while not ended.wait(0.01):
            try:
                kind, count = serve(router, rng)
            except ChangeoverError as error:  # such as a fence that took too long: the request failed, and nothing was written
                kind, count = f"failed: {error}", 1
            done[kind] += count
    print(json.dumps(done))


if __name__ == "__main__":
    main()
