"""An application of tenants: each call says whose row it is, and goes where authority over that user's rows is, until SIGTERM."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections import Counter
from typing import Any

from changeover.api import Router, load, returned
from changeover.errors import ChangeoverError

USERS, CHANNELS = 20, 40

PUT_OLD = "INSERT INTO follows VALUES (%s, %s) ON CONFLICT (from_user, to_channel) DO NOTHING RETURNING *"
PUT_NEW = "INSERT INTO associations VALUES (%s, 'follows', %s) ON CONFLICT (entity_a, kind, entity_b) DO NOTHING RETURNING *"
DROP_OLD = "DELETE FROM follows WHERE from_user = %s AND to_channel = %s RETURNING *"
DROP_NEW = "DELETE FROM associations WHERE entity_a = %s AND kind = 'follows' AND entity_b = %s RETURNING *"
FIND_OLD = "SELECT to_channel FROM follows WHERE from_user = %s ORDER BY 1"
FIND_NEW = "SELECT entity_b FROM associations WHERE entity_a = %s AND kind = 'follows' ORDER BY 1"


def to_new(row: Any) -> dict[str, Any]:
    """Map a row of the old table."""
    return {"entity_a": row["from_user"], "kind": "follows", "entity_b": row["to_channel"]}


def to_old(row: Any) -> dict[str, Any]:
    """Map a row of the new table."""
    return {"from_user": row["entity_a"], "to_channel": row["entity_b"]}


def follow(router: Router, user: int, channel: int) -> int:
    """Follow a channel; return how many rows were written."""
    written = router.write(
        old=lambda cursor: returned(cursor.execute(PUT_OLD, [user, channel])),
        new=lambda cursor: returned(cursor.execute(PUT_NEW, [user, channel])),
        tenant=user,
    )
    return len(written.changes)


def unfollow(router: Router, user: int, channel: int) -> int:
    """Leave a channel; return how many rows were deleted."""
    written = router.write(
        old=lambda cursor: returned(cursor.execute(DROP_OLD, [user, channel]), deleted=True),
        new=lambda cursor: returned(cursor.execute(DROP_NEW, [user, channel]), deleted=True),
        tenant=user,
    )
    return len(written.changes)


def follows(router: Router, user: int) -> list[int]:
    """Return the channels that a user follows."""
    return router.read(
        old=lambda cursor: [row[0] for row in cursor.execute(FIND_OLD, [user])],
        new=lambda cursor: [row[0] for row in cursor.execute(FIND_NEW, [user])],
        tenant=user,
    )


def serve(router: Router, rng: random.Random) -> tuple[str, int]:
    """Serve one request; return what it did, and to how many rows."""
    user, channel = rng.randint(1, USERS), rng.randint(1, CHANNELS)
    match rng.choice(["inserted", "deleted", "read"]):
        case "inserted":
            return "inserted", follow(router, user, channel)
        case "deleted":
            return "deleted", unfollow(router, user, channel)
    follows(router, user)
    return "read", 1


def main() -> None:
    """Serve requests until SIGTERM, and print what was done."""
    ended, done, rng = threading.Event(), Counter[str](), random.Random()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Router.connect(load("changeover.toml"), "public.follows", to_new=to_new, to_old=to_old) as router:
        while not ended.wait(0.01):
            try:
                kind, count = serve(router, rng)
            except ChangeoverError as error:  # such as a fence that took too long: the request failed, and nothing was written
                kind, count = f"failed: {error}", 1
            done[kind] += count
    print(json.dumps(done))


if __name__ == "__main__":
    main()
