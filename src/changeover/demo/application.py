"""The demo's application, a process of its own: it follows and unfollows channels through the router, and never stops.

Every write and read goes through the router from the first one on; nothing here knows about backfill or replay. What an
application adds is below: each statement for the old table and for the new one. A status file, replaced in one step several
times a second, says what it did; any error counts. It ends on SIGTERM, or when its parent is gone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from changeover.demo.schema import KEY, RESERVED_USERS, SOURCE, TARGET, Shape
from changeover.errors import ChangeoverError
from changeover.flags.alarm import reason_of
from changeover.flags.mirror.change import Row
from changeover.flags.router.endpoint import Cursor
from changeover.flags.router.router import Experiment, Router
from changeover.names import qualified
from changeover.spec import load

WRITERS = 4
READ_EVERY = 3
STATUS_SECONDS = 0.2
DRAIN_SECONDS = 10.0
BLOCKED = "%Y-%m-%d %H:%M:%S"
NEW_NAMES = {"from_user": "entity_a", "to_channel": "entity_b"}
NOTES = ("", "NULL", None, "Grüße aus Köln", "ライブ配信中", 'a "quoted" \\ note', "two\nlines", "🎮 speedruns")


def as_association(row: Row) -> dict[str, Any]:
    """Return a follow, or a part of one, as an association: names, the kind, and the text timestamp read as UTC."""
    values = {NEW_NAMES.get(name, name): value for name, value in row.items()}
    if values.get("blocked_on") is not None:
        values["blocked_on"] = datetime.strptime(values["blocked_on"], BLOCKED).replace(tzinfo=UTC)
    return {**values, "kind": "follows"}


class Side:
    """The application's statements for one of the two tables."""

    def __init__(self, table: str, mapping: Callable[[Row], Row], order: str) -> None:
        self.table = sql.Identifier(*qualified(table))
        self.mapping = mapping
        self.order = sql.Identifier(order)

    def follow(self, cursor: Cursor, row: Row) -> int:
        """Insert a follow, or bring one that is there up to date; return how many rows were written, as the others do."""
        key, values = self._mapped(row)
        names = [*key, *values]
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT ({}) DO UPDATE SET {}").format(
            self.table, _names(names), sql.SQL(", ").join(sql.Placeholder() for _ in names), _names(list(key)),
            sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in values),
        )  # fmt: skip
        return cursor.execute(statement, [_value(value) for value in (*key.values(), *values.values())]).rowcount

    def change(self, cursor: Cursor, row: Row) -> int:
        """Change some columns of a follow, if it is there."""
        key, values = self._mapped(row)
        assignments = sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in values)
        statement = sql.SQL("UPDATE {} SET {} WHERE {}").format(self.table, assignments, _equal(list(key)))
        return cursor.execute(statement, [_value(value) for value in (*values.values(), *key.values())]).rowcount

    def unfollow(self, cursor: Cursor, row: Row) -> int:
        """Delete a follow, if it is there."""
        key, _ = self._mapped(row)
        return cursor.execute(sql.SQL("DELETE FROM {} WHERE {}").format(self.table, _equal(list(key))), list(key.values())).rowcount

    def follow_and_unfollow(self, cursor: Cursor, row: Row) -> int:
        """Do both in one transaction, which leaves no row behind."""
        return self.follow(cursor, row) + self.unfollow(cursor, row)

    def channels(self, cursor: Cursor, user: Row) -> list[Row]:
        """Return a user's first twenty follows, in the order of channels."""
        key, _ = self._mapped(user)
        statement = sql.SQL("SELECT * FROM {} WHERE {} ORDER BY {} LIMIT 20").format(self.table, _equal(list(key)), self.order)
        cursor.execute(statement, list(key.values()))
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def _mapped(self, row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
        mapped = self.mapping(row)
        key = {name: mapped[name] for name in mapped if name in (*KEY, *NEW_NAMES.values(), "kind")}
        return key, {name: value for name, value in mapped.items() if name not in key}


def _names(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _equal(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in names)


def _value(value: Any) -> Any:
    return Jsonb(value) if isinstance(value, dict) else value


OLD = Side(SOURCE, dict, "to_channel")
NEW = Side(TARGET, as_association, "entity_b")


class FollowRead(Experiment):
    """How answers of the two stores are compared: as associations, floats as text, since NaN is never equal to itself."""

    name = "a user's channels"

    def clean(self, value: Any) -> Any:
        """Return the rows under the new names, with floats as text."""
        rows = [as_association(row) if "from_user" in row else row for row in value]
        return [{name: repr(v) if isinstance(v, float) else v for name, v in row.items()} for row in rows]


class Application:
    """Writers, readers among them, and the counts; threads of one process."""

    def __init__(self, router: Router, shape: Shape) -> None:
        self.router = router
        self.shape = shape
        self.stop = threading.Event()
        self.traceless = threading.Event()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._longest = 0.0
        self._last_error: str | None = None
        self._threads = [threading.Thread(target=self._write_on, args=(n,), name=f"writer-{n}") for n in range(WRITERS)]

    def start(self) -> None:
        """Start the writers."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Let every writer end its write, and the router what it compares."""
        self.stop.set()
        for thread in self._threads:
            thread.join()
        self.router.drain(DRAIN_SECONDS)

    def status(self) -> dict[str, Any]:
        """Return what was done so far; `longest_write` is in seconds and holds a fence's pause too."""
        with self._lock:
            kinds = ("writes", "inserts", "updates", "deletes", "transient", "reads", "errors")
            counts: dict[str, Any] = {kind: self._counts[kind] for kind in kinds}
            quiet = self._counts["traceless"] == WRITERS
            counts.update(longest_write=round(self._longest, 4), last_error=self._last_error, traceless=quiet)
        return {**counts, "stage": self.router.stage.value, "router": self.router.counters()}

    def _write_on(self, number: int) -> None:
        rng = random.Random(number)
        gone: deque[Row] = deque(maxlen=100)
        due = time.monotonic()
        write: Callable[[random.Random, deque[Row]], None] = self._write
        for turn in range(sys.maxsize):
            due = max(due + WRITERS / self.shape.writes_per_second, time.monotonic() - 1.0)
            if self.stop.wait(max(0.0, due - time.monotonic())):
                return
            if self.traceless.is_set() and write != self._leave_no_trace:
                write = self._leave_no_trace
                self._count("traceless")
            self._tried(write, rng, gone)
            if turn % READ_EVERY == 0:
                self._tried(self._read, rng)

    def _tried(self, action: Callable[..., None], *arguments: object) -> None:
        """An application has a request to answer for each of these: whatever goes wrong is counted, and the next comes."""
        try:
            action(*arguments)
        except Exception as error:
            with self._lock:
                self._counts["errors"] += 1
                self._last_error = f"{reason_of(error)}: {error}" if isinstance(error, ChangeoverError) else reason_of(error)

    def _write(self, rng: random.Random, gone: deque[Row]) -> None:
        key = self._key(rng)
        kind = rng.choices(("updates", "deletes", "inserts"), (55, 22, 23))[0]
        if kind == "updates":
            self._routed(kind, "change", lambda: {**key, **changed_columns(rng)})
        elif kind == "deletes":
            self._routed(kind, "unfollow", lambda: key)
            gone.append(key)
        else:
            again = gone.popleft() if gone and rng.random() < 0.3 else key
            self._routed(kind, "follow", lambda: {**again, **all_columns(rng)})

    def _leave_no_trace(self, rng: random.Random, gone: deque[Row]) -> None:
        key = {**self._key(rng), "to_channel": self.shape.channels + rng.randint(1, 1_000_000)}
        self._routed("transient", "follow_and_unfollow", lambda: {**key, **all_columns(rng)})

    def _routed(self, kind: str, action: str, make: Callable[[], Row]) -> None:
        started = time.monotonic()
        written = self.router.run(lambda store: getattr(store.of(OLD, NEW), action)(store.cursor, make()))
        with self._lock:
            self._longest = max(self._longest, time.monotonic() - started)
        if written:
            self._count("writes")
            self._count(kind)

    def _read(self, rng: random.Random) -> None:
        user = {"from_user": self._key(rng)["from_user"]}
        key = self._key(rng) if rng.random() < 0.5 else user
        self.router.compare(
            old=lambda cursor: OLD.channels(cursor, key), new=lambda cursor: NEW.channels(cursor, key), experiment=READ
        )
        self._count("reads")

    def _key(self, rng: random.Random) -> dict[str, Any]:
        return {
            "from_user": rng.randint(RESERVED_USERS + 1, self.shape.users),
            "to_channel": rng.randint(1, self.shape.channels),
        }

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


READ = FollowRead()


def changed_columns(rng: random.Random) -> dict[str, Any]:
    """Return some columns with new values; the moment is that of the attempt, in whichever store it runs."""
    values = all_columns(rng)
    chosen = rng.sample([name for name in values if name not in ("created_at", "updated_at")], 2)
    return {**{name: values[name] for name in chosen}, "updated_at": values["updated_at"]}


def all_columns(rng: random.Random) -> dict[str, Any]:
    """Return a whole follow but for its key."""
    now = datetime.now(UTC)
    number = rng.randint(0, 10**9)
    blocked = datetime(2019, 1, 1, tzinfo=UTC) + timedelta(seconds=number % 10**8)
    return {
        "notify": rng.random() < 0.7,
        "settings": rng.choice([None, {}, {"push": True, "email": f"Łukasz {number}", "quiet": [number % 24, None]}]),
        "note": rng.choice((*NOTES, f"note {number}")),
        "weight": rng.choice([None, round(number / 10_000, 4)]),
        "score": rng.choice([None, float("nan"), -0.0, number / 7]),
        "credit": rng.choice([None, number * 10**27 + 1]),
        "tags": rng.choice([None, [], ["", None, "NULL", 'q"x\\y'], [f"tag {number}"]]),
        "levels": rng.choice([None, [1, None, 3], [number]]),
        "blocked_on": rng.choice([None, blocked.strftime(BLOCKED)]),
        "created_at": now,
        "updated_at": now,
    }


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Replace the status file in one step."""
    passing = path.with_suffix(".new")
    passing.write_text(json.dumps(status), encoding="utf-8")
    passing.replace(path)


def run(spec_path: str, status_path: Path, rows: int) -> int:
    """Run until SIGTERM, or until the parent is gone; return 1 when any request met an error."""
    parent = os.getppid()
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    with Router.connect(load(spec_path)) as router:
        application = Application(router, Shape(rows))
        signal.signal(signal.SIGUSR1, lambda *_: application.traceless.set())
        application.start()
        while not ending.wait(STATUS_SECONDS) and os.getppid() == parent:
            write_status(status_path, {**application.status(), "ended": False})
        application.end()
        last = {**application.status(), "ended": True}
    write_status(status_path, last)
    return 1 if last["errors"] else 0


if __name__ == "__main__":
    from changeover.demo.application import run as entry  # the same module object as everybody else's

    sys.exit(entry(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
