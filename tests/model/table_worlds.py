"""Worlds at statement level: gate, loader, barrier, sweep, TRUNCATE, collection and catch-up on one gated table at once.

Each world is a handful of processes, their programs compiled from the product's sequences. The oracle knows nothing of the
gate: the row that a key must end with is the last one that the source gave it, by the order of the source's commits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from changeover.position import Version, image_version
from tests.model.gate import Cell, Chunk
from tests.model.rules import Rules
from tests.model.server import Moment, Operation, Process, ServerWorld, Session, Turn, Waits
from tests.model.statements import Compiler, GatedRows, Key, Touched, Work

V0 = image_version(10)


def at(lsn: int, ordinal: int = 0) -> Version:
    """Return the version of an event."""
    return Version(0, lsn, ordinal)


def put(lsn: int) -> Cell:
    """Return an offer of the row as it was at a place in the log."""
    return Cell(at(lsn), f"r{lsn}")


def gone(lsn: int) -> Cell:
    """Return an offer of a delete."""
    return Cell(at(lsn), None)


OPEN, LOADED = Chunk(), Chunk(1, True)


@dataclass
class Table:
    """A world in the making: a gated table, what is in it, and the processes that work on it."""

    name: str
    rules: Rules
    keys: tuple[Key, ...]
    rows: Mapping[Key, str] = field(default_factory=dict)
    row_versions: Mapping[Key, Touched] = field(default_factory=dict)
    chunk: Chunk = OPEN
    processes: list[Process] = field(default_factory=list)
    last: dict[Key, tuple[Version, object]] = field(default_factory=dict)
    closer: int | None = None

    def __post_init__(self) -> None:
        self.places = GatedRows(self.keys, V0)
        self.compiler = Compiler(self.places, self.rules)
        for key, row in self.rows.items():
            self.last[key] = (V0, row)
        for key, (version, _) in self.row_versions.items():
            self.last[key] = (version, self.rows.get(key))

    def _know(self, offers: Mapping[Key, Cell]) -> None:
        for key, offer in offers.items():
            self.last[key] = max(self.last.get(key, (V0, None)), (offer.version, offer.image), key=lambda one: one[0])

    def writer(self, name: str, *batches: Mapping[Key, Cell], lives: int = 0) -> Table:
        """Add a process that offers batches through the gate, a transaction each; after a death it offers all of them again."""
        program: tuple[Operation, ...] = ()
        for offers in batches:
            self._know(offers)
            program += self._next_batch(offers) if program else ()
            program += self.compiler.transaction(self.rules.gate, Work(offers))
        return self._add(Process(name, program, tuple(sorted(batches[0])), lives))

    def catch_up(self, name: str, *batches: tuple[int, Mapping[Key, Cell]], lives: int = 0) -> Table:
        """Add a replay whose position, committed with each batch, is the gate; a batch comes with its end."""
        program: tuple[Operation, ...] = ()
        for applied, offers in batches:
            self._know(offers)
            work = Work(offers, self.rules.caught_up_floor(0, applied))
            program += self._next_batch(offers) if program else ()
            program += self.compiler.procedure(self.rules.catch_up, work)
        return self._add(Process(name, program, tuple(sorted(batches[0][1])), lives))

    def _next_batch(self, offers: Mapping[Key, Cell]) -> tuple[Operation, ...]:
        """Between two transactions a process takes its next batch, which is nobody else's concern."""
        keys = tuple(sorted(offers))

        def idle(turn: Turn) -> bool:
            turn.batch = keys
            return True

        return (Operation("takes a batch", lambda turn: None, idle),)

    def loader(self, name: str, images: Mapping[Key, str], lives: int = 0) -> Table:
        """Add an attempt at the one chunk: it claims the chunk, then loads its images and marks it."""
        offers = {key: Cell(V0, image) for key, image in images.items()}
        for key, image in images.items():
            self.last.setdefault(key, (V0, image))

        def claim(turn: Turn) -> None:
            chunk = cast(Chunk, turn.wait_for(self.places.chunk).value)
            turn.token, (claimed,) = self.rules.claimed((chunk,))
            turn.write(self.places.chunk, claimed)
            turn.commit()

        program = (Operation("claims the chunk", claim), *self.compiler.transaction(self.rules.load, Work(offers)))
        return self._add(Process(name, program, tuple(sorted(images)), lives))

    def close(self) -> Table:
        """Add the process that closes the table after the last chunk's commit."""

        def loaded(turn: Turn) -> None:
            if not self.rules.closable((cast(Chunk, turn.rows[self.places.chunk].value),), 1, 1, False):
                raise Waits

        work = Work({key: gone(0) for key in self.keys})
        self.closer = len(self.processes)
        program = (Operation("sees every chunk loaded", loaded), *self.compiler.procedure(self.rules.close, work))
        return self._add(Process("closer", program, work.keys))

    def collect(self, upto: Version, replay: str | None = None) -> Table:
        """Add a collection up to a version; the position is below it until `replay`, where that is named, has ended."""
        waited = [place for place, one in enumerate(self.processes) if one.name == replay]

        def allowed(turn: Turn) -> None:
            closed = self.closer is None or self._ended(turn.sessions, self.closer)
            behind = any(not self._ended(turn.sessions, place) for place in waited)
            if not self.rules.collectable(closed, 0 if behind else upto.lsn + 1, upto):
                raise Waits

        work = Work({key: gone(0) for key in self.keys}, upto)
        program = (Operation("may collect", allowed), *self.compiler.procedure(self.rules.collect, work))
        return self._add(Process("collector", program, work.keys))

    def truncate(self, lsn: int) -> Table:
        """Add a replay of TRUNCATE."""
        offers = {key: gone(lsn) for key in self.keys}
        self._know(offers)
        work = Work(offers, self.rules.truncated_floor(at(lsn)))
        return self._add(Process("truncate", self.compiler.procedure(self.rules.truncate, work), work.keys))

    def _ended(self, sessions: Sequence[Session], place: int) -> bool:
        return sessions[place].at >= len(self.processes[place].program)

    def _add(self, process: Process) -> Table:
        self.processes.append(process)
        return self

    def world(self) -> ServerWorld:
        """Return the finished world."""
        rows = self.places.before(self.rows, self.row_versions, self.chunk)
        return ServerWorld(self.name, tuple(self.processes), rows, self._judge, self._judge_end)

    def _judge(self, state: Moment) -> str | None:
        """I3: after the close no row lives beside its tombstone."""
        if self.closer is None or not self._ended(state.sessions, self.closer):
            return None
        for key in self.keys:
            row_versions = state.rows[self.places.row_versions[key]].value
            if row_versions is not None and cast(Touched, row_versions)[1] and state.rows[self.places.row[key]].value is not None:
                return f"I3: {key} lives beside its tombstone after the close"
        return None

    def _judge_end(self, state: Moment) -> str | None:
        """I1: every key has the last row that the source gave it."""
        for key in self.keys:
            found, wanted = state.rows[self.places.row[key]].value, self.last.get(key, (V0, None))[1]
            if found != wanted:
                return f"I1: {key} is {found} and was last {wanted} in the source"
        return None


def ghost(rules: Rules) -> Table:
    """The race that the product exists for: a loader, three live writes of one key, and the close."""
    table = Table("ghost", rules, ("k",)).loader("loader", {"k": "r10"})
    return table.writer("mirror", {"k": gone(20)}).writer("other mirror", {"k": put(30)}).writer("replay", {"k": gone(40)}).close()


def batches(rules: Rules) -> Table:
    """A replay's batch of two keys, both also written directly, while their chunk is loaded."""
    table = Table("batches", rules, ("a", "b")).loader("loader", {"a": "a10", "b": "b10"})
    return table.writer("replay", {"a": gone(30), "b": put(31)}).writer("mirror", {"a": put(20), "b": gone(21)}).close()


def ghost_repeated(rules: Rules) -> Table:
    """The same with a loader and a replay that die anywhere, once each, and begin again, and a second key beside it."""
    table = Table("ghost, repeated", rules, ("a", "b")).loader("loader", {"a": "r10", "b": "b10"}, lives=1)
    return table.writer("mirror", {"a": put(30)}).writer("replay", {"a": gone(20)}, {"a": gone(40), "b": put(41)}, lives=1).close()


def repeats(rules: Rules) -> Table:
    """Loader and replay die anywhere, once each, and begin again."""
    table = Table("repeats", rules, ("k",)).loader("loader", {"k": "r10"}, lives=1)
    return table.writer("replay", {"k": put(20)}, {"k": gone(30)}, lives=1).close()


def zombie(rules: Rules) -> Table:
    """Two attempts at one chunk, the earlier of which nobody could stop, and a delete."""
    table = Table("zombie", rules, ("k",)).loader("attempt", {"k": "r10"}).loader("other attempt", {"k": "r10"})
    return table.writer("replay", {"k": gone(20)}).close()


def collection(rules: Rules) -> Table:
    """Row versions are collected while a write from below a tombstone comes late, and newer ones go on."""
    row_versions = {"a": (at(20), True), "b": (at(18), False)}
    table = Table("collection", rules, ("a", "b"), {"b": "r18"}, row_versions, LOADED).collect(at(20))
    return table.writer("late mirror", {"a": put(15)}).writer("mirror", {"b": put(30)}).writer("replay", {"b": gone(40)}, lives=1)


def collection_while_loading(rules: Rules) -> Table:
    """A collection is asked for while chunks are pending."""
    table = Table("collection while loading", rules, ("a", "b")).loader("loader", {"a": "a10", "b": "b10"})
    return table.writer("replay", {"a": gone(20)}).close().collect(at(20), "replay")


def truncated(rules: Rules) -> Table:
    """TRUNCATE while a chunk is loaded, and while writes from before and after it arrive in any order."""
    table = Table("truncate", rules, ("a", "b")).loader("loader", {"a": "a10"}).truncate(20)
    return table.writer("late mirror", {"a": put(15)}).writer("mirror", {"b": put(30)}).close()


def truncated_behind(rules: Rules) -> Table:
    """TRUNCATE of a loaded table beside a newer row of the same key, and a late older one."""
    table = Table("truncate behind a newer row", rules, ("k",), rows={"k": "r10"}, chunk=LOADED).truncate(20)
    return table.writer("late mirror", {"k": put(15)}).writer("mirror", {"k": put(30)})


def caught_up(rules: Rules) -> Table:
    """Replay with its position as the gate, killed anywhere, while direct writes appear, late and new."""
    table = Table("catch-up by position", rules, ("a", "b"), rows={"a": "a10", "b": "b10"}, chunk=LOADED)
    table.catch_up("replay", (25, {"a": gone(20), "b": put(22)}), (45, {"a": put(40), "b": put(42)}), lives=1)
    return table.writer("late mirror", {"a": put(15)}).writer("mirror", {"a": put(30)}).writer("new mirror", {"b": gone(50)})


def caught_up_twice(rules: Rules) -> Table:
    """Two replays of one table, one of which lost its lease without knowing, with the position as the gate."""
    table = Table("two replays by position", rules, ("k",), rows={"k": "r10"}, chunk=LOADED)
    table.catch_up("replay", (25, {"k": gone(20)}), (35, {"k": put(30)}), lives=1)
    return table.catch_up("other replay", (45, {"k": put(40)}), (55, {"k": gone(50)})).writer("mirror", {"k": put(40)})


def caught_up_while_loading(rules: Rules) -> Table:
    """The position as the gate of a table whose chunk is pending: allowed by no rule of the product, so only a mutant starts it."""
    table = Table("catch-up while loading", rules, ("a", "b")).loader("loader", {"a": "a10", "b": "b10"})
    if rules.catches_up_while_loading:
        return table.catch_up("replay", (25, {"a": gone(20)})).close()
    return table.writer("replay", {"a": gone(20)}).close()


TABLES: Mapping[str, Callable[[Rules], Table]] = {
    make.__name__: make
    for make in (
        ghost, ghost_repeated, batches, repeats, zombie, collection, collection_while_loading, truncated, truncated_behind,
        caught_up, caught_up_twice, caught_up_while_loading,
    )
}  # fmt: skip
"""Every world of one gated table, by name."""
