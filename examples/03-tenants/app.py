"""An application of tenants: each call says whose row it is, and goes where authority over that user's rows is, until SIGTERM."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections import Counter

from changeover.api import Router, load
from changeover.errors import ChangeoverError

USERS, CHANNELS = 20, 40

PUT_OLD = "INSERT INTO follows VALUES (%s, %s) ON CONFLICT (from_user, to_channel) DO NOTHING"
PUT_NEW = "INSERT INTO associations VALUES (%s, 'follows', %s) ON CONFLICT (entity_a, kind, entity_b) DO NOTHING"
DROP_OLD = "DELETE FROM follows WHERE from_user = %s AND to_channel = %s"
DROP_NEW = "DELETE FROM associations WHERE entity_a = %s AND kind = 'follows' AND entity_b = %s"
FIND_OLD = "SELECT to_channel FROM follows WHERE from_user = %s ORDER BY 1"
FIND_NEW = "SELECT entity_b FROM associations WHERE entity_a = %s AND kind = 'follows' ORDER BY 1"


def follow(router: Router, user: int, channel: int) -> int:
    """Follow a channel; return how many rows were written."""
    return router.run(lambda store: store.execute(store.of(PUT_OLD, PUT_NEW), [user, channel]).rowcount, tenant=user)


def unfollow(router: Router, user: int, channel: int) -> int:
    """Leave a channel; return how many rows were deleted."""
    return router.run(lambda store: store.execute(store.of(DROP_OLD, DROP_NEW), [user, channel]).rowcount, tenant=user)


def follows(router: Router, user: int) -> list[int]:
    """Return the channels that a user follows."""
    return router.compare(
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
