"""An application that keeps moments: text in the old table, timestamptz in the new one. It serves requests until SIGTERM."""

from __future__ import annotations

import json
import random
import signal
import threading
import uuid
from collections import Counter, deque
from datetime import UTC, datetime
from typing import Any

from changeover.api import Router, load
from changeover.errors import ChangeoverError

TIME = "%Y-%m-%d %H:%M:%S.%f"

INSERT_OLD = "INSERT INTO entries (entry_id, data) VALUES (%(id)s, %(text)s)"
INSERT_NEW = "INSERT INTO moments (moment_id, created_date) VALUES (%(id)s, %(time)s)"
UPDATE_OLD = "UPDATE entries SET data = %(text)s WHERE entry_id = %(id)s"
UPDATE_NEW = "UPDATE moments SET created_date = %(time)s WHERE moment_id = %(id)s"
DELETE_OLD = "DELETE FROM entries WHERE entry_id = %(id)s"
DELETE_NEW = "DELETE FROM moments WHERE moment_id = %(id)s"
READ_OLD = "SELECT data::timestamp AT TIME ZONE 'UTC' FROM entries WHERE entry_id = %(id)s"
READ_NEW = "SELECT created_date FROM moments WHERE moment_id = %(id)s"


class Application:
    """What the application keeps in memory: the entries that it made last."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.rng = random.Random()
        self.known: deque[uuid.UUID] = deque(maxlen=200)

    def write(self, old: str, new: str, values: dict[str, Any]) -> int:
        """Write in the store that has authority; return how many rows it was."""
        return self.router.run(lambda store: store.execute(store.of(old, new), values).rowcount)

    def serve(self) -> tuple[str, int]:
        """Serve one request; return what it did, and to how many rows."""
        now = datetime.now(UTC)
        values = {"id": self.rng.choice(self.known or [uuid.uuid4()]), "time": now, "text": now.strftime(TIME)}
        match self.rng.choice(["inserted", "inserted", "updated", "deleted", "read", "read"]):
            case "inserted":
                values["id"] = uuid.uuid4()
                count = self.write(INSERT_OLD, INSERT_NEW, values)
                self.known.append(values["id"])
                return "inserted", count
            case "updated":
                return "updated", self.write(UPDATE_OLD, UPDATE_NEW, values)
            case "deleted":
                return "deleted", self.write(DELETE_OLD, DELETE_NEW, values)
        self.router.compare(
            old=lambda cursor: cursor.execute(READ_OLD, values).fetchall(),
            new=lambda cursor: cursor.execute(READ_NEW, values).fetchall(),
        )
        return "read", 1


def main() -> None:
    """Serve requests until SIGTERM, and print what was done."""
    ended, done = threading.Event(), Counter[str]()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Router.connect(load("changeover.toml")) as router:
        application = Application(router)
        while not ended.wait(0.01):
            try:
                kind, count = application.serve()
            except ChangeoverError as error:  # such as a fence that took too long: the request failed, and nothing was written
                kind, count = f"failed: {error}", 1
            done[kind] += count
    print(json.dumps(done))


if __name__ == "__main__":
    main()
