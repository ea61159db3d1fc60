"""Cases of other projects as values: the data files beside this module, read and checked, and what they draw at random drawn.

A merge case offers events, a copy case plays steps of a copy beside a source that is written to. README.md says how both read.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from changeover.position import Version, image_version
from tests.model.gate import Cell

HERE = Path(__file__).parent
L0 = 100
V0 = image_version(L0)

Key = tuple[str, ...]
Image = tuple[str | None, ...]
Cells = dict[Key, Cell]

KEYS, VALUES = 2, 3
"""Columns of a key and of an image in every store: shorter ones are filled up with empty texts and with NULL."""

AXES = ("commits", "places")
"""A sequence number is either a commit of its own or a place in one commit, whose LSN is that of the images."""


class Event(NamedTuple):
    """An event as a spool would hold it: an image or None for a delete, and the old key of a row that was given another one."""

    version: Version
    key: Key
    image: Image | None
    old_key: Key | None = None


@dataclass(frozen=True)
class MergeCase:
    """Events in batches, what the keys held before them, and which cells they leave; `ends` are alternatives."""

    name: str
    source: str
    batches: tuple[tuple[Event, ...], ...]
    ends: tuple[Cells, ...]
    sees: str = "both"
    theirs: Cells | None = None

    def seen(self, cells: Cells) -> Cells:
        """Return what of some cells their test looks at."""
        wanted = {"rows": (True,), "tombstones": (False,), "both": (True, False)}[self.sees]
        return {key: cell for key, cell in cells.items() if (cell.image is not None) in wanted}


@dataclass(frozen=True)
class CopyCase:
    """A source's rows, ranges of its keys, and the steps of a copy and of writers, in order."""

    name: str
    source: str
    rows: Mapping[tuple[int, ...], Image]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    steps: tuple[Mapping[str, Any], ...]
    target_key: int = 1
    end: Mapping[Key, Image] | None = field(default=None)

    def target(self, key: Sequence[int]) -> Key:
        """Return the target's key of a source key."""
        return wide(key[: self.target_key])


def wide(parts: Sequence[Any]) -> Key:
    """Return a key in as many texts as the stores have columns."""
    return (*map(str, parts), *[""] * (KEYS - len(parts)))


def image(values: Sequence[Any]) -> Image:
    """Return an image in as many values as the stores have columns."""
    return (*map(str, values), *[None] * (VALUES - len(values)))


def placed(at: int, axis: str) -> Version:
    """Return the version of a sequence number."""
    return Version(0, L0 + at, 0) if axis == "commits" else Version(0, L0, 2 * at)


def documents() -> dict[str, dict[str, Any]]:
    """Return the data files by name."""
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.toml"))}


def merge_cases(axis: str) -> list[MergeCase]:
    """Return every merge case, drawn ones included, with its sequence numbers placed on an axis."""
    return [
        case
        for document in documents().values()
        for case in (
            *(_merge_case(entry, axis, document) for entry in document.get("merge", [])),
            *(case for entry in document.get("converge", []) for case in _converging(entry, axis, document)),
        )
    ]


def copy_cases() -> list[CopyCase]:
    """Return every copy case, drawn ones included."""
    return [
        case
        for document in documents().values()
        for case in (
            *(_copy_case(entry, document) for entry in document.get("copy", [])),
            *(case for entry in document.get("writer", []) for case in _written(entry, document)),
        )
    ]


def _origin(entry: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    source = document["source"]
    return f"{source['project']}, {source['licence']}: {source['repository']} {source['folder']}/{source['files'][entry['file']]}"


def _events(entries: Sequence[Mapping[str, Any]], width: int, axis: str) -> tuple[Event, ...]:
    return tuple(
        Event(placed(one["at"], axis), wide(one["put"][:width]), image(one["put"][width:]))
        if "put" in one
        else Event(placed(one["at"], axis), wide(one["delete"]), None)
        for one in entries
    )


def _merge_case(entry: Mapping[str, Any], axis: str, document: Mapping[str, Any]) -> MergeCase:
    width = entry.get("key", 1)

    def cells(name: str) -> Cells:
        # the last of a key: theirs may keep a tombstone beside a row
        return {one.key: Cell(one.version, one.image) for one in _events(entry[name], width, axis)}

    batches = [_events(batch, width, axis) for batch in entry["batches"]]
    before = _events(entry.get("before", []), width, axis)
    ends = ["ours" if "ours" in entry else "end", *(["or_end"] if "or_end" in entry else [])]
    return MergeCase(
        entry["name"],
        _origin(entry, document),
        tuple(batch for batch in (before, *batches) if batch),
        tuple(cells(name) for name in ends),
        entry.get("sees", "both"),
        cells("end") if "ours" in entry else None,
    )


def _converging(entry: Mapping[str, Any], axis: str, document: Mapping[str, Any]) -> Iterator[MergeCase]:
    """Draw events, shuffle them and cut them into batches; the end is what they leave in order, by plain overwriting."""
    for seed in entry["seeds"]:
        random = Random(seed)
        ordered = _drawn(entry, random, axis)
        end: Cells = {}
        for one in ordered:
            end[one.key] = Cell(one.version, one.image)
        shuffled = random.sample(ordered, len(ordered))
        cuts = [place * len(shuffled) // entry["batches"] for place in range(entry["batches"] + 1)]
        batches = [tuple(shuffled[cuts[place] : cuts[place + 1]]) for place in range(entry["batches"])]
        name = f"{entry['name']}, seed {seed}"
        yield MergeCase(name, _origin(entry, document), tuple(batch for batch in batches if batch), (end,))


def _drawn(entry: Mapping[str, Any], random: Random, axis: str) -> list[Event]:
    events = []
    at = 0
    for number in range(entry["keys"]):
        live = False
        for _ in range(random.randint(1, entry["events_of_a_key"])):
            may_go = live or not entry["only_live_rows_are_deleted"]
            live = not (may_go and random.random() < entry["delete"])
            values = (random.choice(("red", "blue", "green", "yellow")), str(random.randrange(100)), str(random.random() < 0.5))
            row = tuple(None if random.random() < entry["null"] else value for value in values)
            event = Event(placed(at, axis), wide([number]), row if live else None)
            events += [event] * (entry["times"] if random.random() < entry["repeated"] else 1)
            at += 1
    return events


def _copy_case(entry: Mapping[str, Any], document: Mapping[str, Any]) -> CopyCase:
    width = entry.get("source_key", 1)
    target = entry.get("target_key", 1)
    return CopyCase(
        entry["name"],
        _origin(entry, document),
        {tuple(row[:width]): image(row[width:]) for row in entry["rows"]},
        tuple((tuple(low), tuple(high)) for low, high in entry["chunks"]),
        tuple(entry["steps"]),
        target,
        {wide(row[:target]): image(row[target:]) for row in entry["end"]},
    )


def _written(entry: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[CopyCase]:
    """Draw a writer beside a copy: inserts, updates and deletes, a third each, before and after each chunk is read."""
    for seed in entry["seeds"]:
        random = Random(seed)
        rows: dict[tuple[int, ...], Image] = {(number,): image([f"row {number}"]) for number in range(1, entry["rows"] + 1)}
        lows = range(1, entry["rows"] + 1, entry["chunk"])
        chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((low,), (low + entry["chunk"] - 1,)) for low in lows]
        chunks[-1] = (chunks[-1][0], (10**6,))
        writes = _writes(random, list(rows), entry["writes"])
        steps: list[dict[str, Any]] = []
        for number in range(len(chunks)):
            some = [{"write": [next(writes)]} for _ in range(entry["writes"] // len(chunks))]
            half = random.randrange(len(some))
            steps += [*some[:half], {"read": number}, *some[half:], *([{"stream": random.randint(1, 9)}] if number % 2 else [])]
            steps += [{"die": number}, {"again": True}] if number in entry["ends_after"] else []
            steps += [{"load": number}]
        yield CopyCase(f"{entry['name']}, seed {seed}", _origin(entry, document), rows, tuple(chunks), tuple(steps))


def _writes(random: Random, there: list[tuple[int, ...]], most: int) -> Iterator[dict[str, list[Any]]]:
    following = len(there) + 1
    for number in range(most):
        kind = random.choice(("insert", "update", "delete"))
        place = random.randrange(len(there))
        if kind == "insert":
            there.append((following,))
            yield {kind: [following, f"write {number}"]}
            following += 1
        elif kind == "update":
            yield {kind: [*there[place], f"write {number}"]}
        else:
            yield {kind: [*there.pop(place)]}
