"""An application that takes, changes and deletes orders until SIGTERM. It knows nothing of changeover.

A lake is read by others and takes over nothing, so there is no router, and no flag.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections import Counter

import psycopg

STATEMENTS = {
    "inserted": "INSERT INTO orders (customer, total, card) VALUES (%(customer)s, %(total)s, 'card')",
    "updated": "UPDATE orders SET state = 'paid', total = total + 1 WHERE id = %(id)s",
    "hidden": "UPDATE orders SET deleted_at = now() WHERE id = %(id)s AND deleted_at IS NULL",
    "shown": "UPDATE orders SET deleted_at = NULL WHERE id = %(id)s AND deleted_at IS NOT NULL",
    "deleted": "DELETE FROM orders WHERE id = %(id)s",
}


def main() -> None:
    """Write until SIGTERM, and print what was done."""
    ended, done, rng = threading.Event(), Counter[str](), random.Random()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with psycopg.connect(os.environ["OLD_DSN"], autocommit=True) as connection:
        while not ended.wait(0.01):
            kind = rng.choice(list(STATEMENTS))
            values = {"id": rng.randint(1, 700), "customer": rng.randint(1, 40), "total": rng.randint(1, 10_000) / 100}
            done[kind] += connection.execute(STATEMENTS[kind].encode(), values).rowcount
    print(json.dumps(done))


if __name__ == "__main__":
    main()
