"""Recheck: keys that differed while both stores were being written are judged again until they stand still.

A target may be ahead of the aligned position, because a dual write reaches it before the stream does, or behind, because a mirror
is under way. A key passes as soon as the target holds an image that the source held at or after the comparison. A key that differs
and stands still is a difference; one that never stands still leaves the question open, which is `CouldNotCheck`, not "equal".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from changeover.errors import CouldNotCheck
from changeover.jobs.entries import Authority
from changeover.jobs.ledger import Ledger
from changeover.verifiers.verdict import CANONICALISATION, MISMATCHED, Difference, RangeCount, Recheck, TableDiff

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LIMIT = 10_000
"""Keys that are judged again; where more differ, those beyond count as they were found."""

SETTLED_SECONDS = 3.0
"""How long both sides of a key must stand still before it counts as different: longer than a mirror's or a batch's way."""

PATIENCE_SECONDS = 30.0
FEWEST_ROUNDS = 10
"""Looks at a key before it is called ever-changing: on a slow machine a round takes seconds."""

Key = tuple[str, ...]
Read = Callable[[Sequence[Key]], "DataFrame"]


@dataclass
class Trail:
    """What was seen of one key: every source image, the last of both sides, and since when they stand still."""

    source: set[str | None] = field(default_factory=set)
    last: tuple[str | None, str | None] | None = None
    since: float = 0.0


def dual_written(ledger: Ledger, authority: Authority) -> bool:
    """Return whether any application has written to both stores: a router beyond off, or authority that moved."""
    return authority.epoch > 0 or any(beat.stage != "off" for beat in ledger.heartbeats())


def last_stage(ledger: Ledger) -> str | None:
    """Return the stage of the router that was heard last, None without any."""
    beats = ledger.heartbeats()
    return max(beats, key=lambda beat: beat.at).stage if beats else None


def judge(
    diff: TableDiff, differences: Path, run: str, *, source: Read, target: Read, between: Callable[[], object]
) -> tuple[TableDiff, Recheck]:
    """Return the diff with the keys left out that were in flight (driver).

    `source` and `target` read the present rows of some target keys; `between` is called before each round, to let changes
    arrive. Raises CouldNotCheck when nothing but ever-changing or unjudged keys is left.
    """
    found = _rows(differences, run)
    keys = sorted({_key(row, diff.key) for row in found if row["class"] != CANONICALISATION})
    chosen = keys[:LIMIT]
    passed, hot = _settle(chosen, diff.key, source, target, between)
    left = [row for row in found if _key(row, diff.key) not in passed]
    still = set(chosen) - passed - hot
    if not still and (hot or len(keys) > len(chosen)):
        what = f"{len(hot)} keys kept changing" if hot else f"{len(keys) - len(chosen)} differing keys were not judged again"
        raise CouldNotCheck(diff.table, f"{what} while both stores were written: run verify again in a quieter moment")
    if passed:
        _replace_rows(differences, run, left)
    return _without(diff, found, passed), Recheck(rechecked=len(chosen), in_flight=len(passed), hot=len(hot))


def _settle(
    keys: Sequence[Key], names: Sequence[str], source: Read, target: Read, between: Callable[[], object]
) -> tuple[set[Key], set[Key]]:
    """Return (keys that passed, keys that never stood still)."""
    trails = {key: Trail() for key in keys}
    passed: set[Key] = set()
    started = time.monotonic()
    rounds = 0
    while trails:
        rounds += 1
        between()
        asked = sorted(trails)
        old = images(source(asked), names)
        new = images(target(asked), names)
        now = time.monotonic()
        for key in asked:
            trail = trails[key]
            trail.source.add(old.get(key))
            if new.get(key) in trail.source:
                passed.add(key)
                del trails[key]
            elif trail.last != (old.get(key), new.get(key)):
                trail.last, trail.since = (old.get(key), new.get(key)), now
        if all(now - trail.since >= SETTLED_SECONDS for trail in trails.values()):
            return passed, set()
        if now - started > PATIENCE_SECONDS and rounds >= FEWEST_ROUNDS:
            return passed, {key for key, trail in trails.items() if now - trail.since < SETTLED_SECONDS}
        time.sleep(0.2)
    return passed, set()


def images(frame: DataFrame, names: Sequence[str]) -> dict[Key, str]:
    """Return each row as JSON text by its key: both sides have the same types, so equal text is equal rows."""
    from pyspark.sql import functions as F

    whole = F.to_json(F.struct(*sorted(frame.columns)), {"ignoreNullFields": "false"}).alias("image")
    rows = frame.select(*(F.col(f"`{name}`").cast("string") for name in names), whole).collect()
    return {tuple(row[: len(names)]): row["image"] for row in rows}


def _rows(differences: Path, run: str) -> list[dict[str, Any]]:
    return DeltaTable(str(differences)).to_pyarrow_table(filters=[("run", "=", run)]).to_pylist()  # type: ignore[no-any-return]


def _key(row: dict[str, Any], names: Sequence[str]) -> Key:
    values = dict(row["key"])
    return tuple(str(values[name]) for name in names)


def _replace_rows(differences: Path, run: str, rows: list[dict[str, Any]]) -> None:
    """Keep of this run only the keys that still differ, so that the table says what the verdict says."""
    table = DeltaTable(str(differences))
    schema = pa.schema(table.schema().to_arrow())
    table.delete(f"run = '{run}'")
    if rows:
        write_deltalake(table, pa.Table.from_pylist(rows, schema=schema), mode="append")


def _without(diff: TableDiff, found: list[dict[str, Any]], passed: set[Key]) -> TableDiff:
    """Return the diff as it is without the keys that passed, of the rows that were found."""
    gone = [row for row in found if _key(row, diff.key) in passed]
    classes = Counter(row["class"] for row in {_key(row, diff.key): row for row in gone}.values())
    columns = Counter(name for row in gone if row["class"] == MISMATCHED for name in row["columns"] or ())
    left = {name: count - columns[name] for name, count in diff.columns.items() if count > columns[name]}
    nothing = diff.found == len(gone)

    def stays(one: Difference) -> bool:
        return tuple(str(one.key[name]) for name in diff.key) not in passed

    def settled(ranges: tuple[RangeCount, ...]) -> tuple[RangeCount, ...]:
        return tuple(replace(each, different=0) for each in ranges) if nothing else ranges

    return replace(
        diff, counts={kind: count - classes[kind] for kind, count in diff.counts.items()}, columns=left,
        equal_rows=diff.equal_rows + len(passed), sample=tuple(filter(stays, diff.sample)), found=diff.found - len(gone),
        kept=diff.kept - len(gone), source_ranges=settled(diff.source_ranges), target_ranges=settled(diff.target_ranges),
    )  # fmt: skip
