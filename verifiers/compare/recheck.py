"""Recheck: keys that differed while an application wrote to both stores are judged again, by positions and never by seconds.

A target may be ahead of the aligned position, because a mirrored write reaches it before the stream
does, or behind, because a mirror is under way. One side leads: the store that has authority over
the key. A key passes when the other side holds an image that the leading one held at or after the
comparison. Either a look found that image, or the stream has the commit that left it, however often
the key is written. That commit is the last one that replay had offered before the other side was
looked at, or one that came since.

A key differs when two looks in a row show the same difference. Between them the streams and every
process's mirror have passed the first look, and no commit on the key is told of up to the second.
One that is written again and again leaves the question open after some rounds, which is
`CouldNotCheck`, not "equal". So do more keys than are judged again: none is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from changeover.errors import CouldNotCheck
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.jobs.transform.transform import CUT
from changeover.names import nth, placed, reserved
from changeover.verifiers.compare.values import notation_only, text
from changeover.verifiers.compare.verdict import CANONICALISATION, MISMATCHED, Difference, RangeCount, Recheck, TableDiff

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LIMIT = 10_000
"""Keys that are judged again: their images are held in memory."""

LOOKS = 2
"""Looks in a row that must show the same of a key before it differs: what was under way at the first has come by the second."""

ROUNDS = 20
"""Looks at a key before it is called ever-changing; one that is only written often is told of by the stream long before."""

Key = tuple[str, ...]
Image = tuple[tuple[str | None, ...], ...]
"""What a side holds under a key, each row as the texts of its columns: no row, one, or more where a key is there twice."""

Read = Callable[[Sequence[Key]], "DataFrame"]
KeyChange = tuple[Key, Image | None] | None
"""A key and what a commit left of it, None where that can't be said; None instead of both: any key may have been written."""

History = Callable[[Sequence[Key]], Iterable[KeyChange]]
"""Tells, in order, what commits left of some keys since it was asked last."""


class Passage(Protocol):
    """What lets everything pass that is under way between the stores."""

    def mark(self) -> None:
        """Take this moment, and wait until the streams tell of all that was committed before it."""
        ...

    def through(self) -> None:
        """Wait until all that was under way at that moment has been offered, by the streams and by every mirror."""
        ...


@dataclass(frozen=True)
class Leading:
    """The side that has authority over a key, 0 for the source and 1 for the target, and what is told of its commits."""

    side: int
    history: History


@dataclass
class Trail:
    """What was seen of one key: the images at looks of the side that leads, what both sides held last, and its last commit."""

    side: int = 0
    held: list[Image] = field(default_factory=list)
    last: tuple[Image, Image] | None = None
    looks: int = 0
    """How many looks in a row showed the same, without a commit that was told of since the first of them."""
    commit: Image | None = None
    """What the last commit left of which the stream told, None where that is not known."""

    def hears(self, image: Image | None, types: Sequence[str]) -> bool:
        """Take what a commit left that the stream told of; return whether the other side held that at the last look."""
        self.commit, self.looks = image, 0
        return image is not None and self.last is not None and alike(image, self.last[1 - self.side], types)

    def meets(self, old: Image, new: Image, types: Sequence[str]) -> bool:
        """Take what both sides hold now; return whether the other side's image is one that the leading side has held."""
        self.looks = self.looks + 1 if self.last == (old, new) else 1
        self.last = old, new
        leading, other = self.last[self.side], self.last[1 - self.side]
        if leading not in self.held:
            self.held.append(leading)
        known = self.held if self.commit is None else [*self.held, self.commit]
        return any(alike(image, other, types) for image in known)


def dual_written(ledger: Ledger, changes: Sequence[Authority]) -> bool:
    """Return whether any application has written to both stores: a router beyond off, or authority that moved.

    Args:
        ledger: The migration's ledger.
        changes: The moves of authority.

    Returns:
        True where both may have been written.
    """
    begun = ledger.stream("verify").epoch
    return any(change.epoch > begun for change in changes) or any(beat.stage != "off" for beat in ledger.heartbeats())


def last_stage(ledger: Ledger) -> str | None:
    """Return the stage of the router that was heard last, None without any.

    Args:
        ledger: The migration's ledger.

    Returns:
        The stage's name, or None.
    """
    beats = ledger.heartbeats()
    return max(beats, key=lambda beat: beat.at).stage if beats else None


def judge(
    diff: TableDiff, differences: Path, run: str, *, pg_types: Mapping[str, str], source: Read, target: Read,
    leading: Callable[[Key], Leading], passage: Passage,
) -> tuple[TableDiff, Recheck]:  # fmt: skip
    """Return the diff with the keys left out that were in flight (driver).

    Args:
        diff: What the comparison found.
        differences: The Delta table of the rows that differ.
        run: The run's name there.
        pg_types: PostgreSQL's types that the comparison went by.
        source: What reads the source's present rows of some target keys.
        target: What reads the target's present rows of them.
        leading: Which side has authority over a key, and what tells of its commits.
        passage: What lets through whatever is under way between the sides.

    Returns:
        The diff without the keys in flight, and how many they were.

    Raises:
        CouldNotCheck: More keys differ than are judged again, or only those are left that never
            stood still.
    """
    rows = _rows(differences, run)
    keys = sorted({_key(row, diff.key) for row in rows if row["class"] != CANONICALISATION})
    if len(keys) > LIMIT or diff.kept < diff.difference_rows:
        problem = (
            f"{max(len(keys), diff.differing_keys):,} keys differ while both stores are written, and no more than {LIMIT:,} are"
            f" judged again: run verify in a quieter moment, or at the stage off; they are in {differences}"
        )
        raise CouldNotCheck(diff.table, problem)
    passed, hot = _settle(keys, _Sides(diff, pg_types, source, target), leading, passage)
    left = [row for row in rows if _key(row, diff.key) not in passed]
    if hot and not set(keys) - passed - hot:
        problem = f"{len(hot):,} {'key' if len(hot) == 1 else 'keys'} kept changing while both stores were written"
        raise CouldNotCheck(diff.table, f"{problem}: run verify again in a quieter moment")
    if passed:
        _replace_rows(differences, run, left)
    return _without(diff, rows, passed), Recheck(rechecked=len(keys), in_flight=len(passed), hot=len(hot))


@dataclass(frozen=True)
class _Sides:
    """Both sides of the keys in question, and how their columns are compared."""

    diff: TableDiff
    pg_types: Mapping[str, str]
    source: Read
    target: Read

    @property
    def names(self) -> list[str]:
        """Return the columns of an image, in its order."""
        return sorted(self.pg_types)

    @property
    def types(self) -> list[str]:
        """Return PostgreSQL's types of them."""
        return [self.pg_types[name] for name in self.names]

    def now(self, keys: Sequence[Key]) -> tuple[dict[Key, Image], dict[Key, Image]]:
        """Return what each side holds now."""
        frames, names = (self.source(keys), self.target(keys)), self.names
        old, new = (images(frame, names, self.diff.key) for frame in frames)
        types = [self.pg_types[name] for name in self.diff.key]
        strangers = {key for key in (old.keys() | new.keys()) - set(keys) if not _another_notation(key, keys, types)}
        if strangers:  # a key whose text is not what was asked for would be taken for one that is gone
            raise CouldNotCheck(self.diff.table, f"the key {min(strangers)} came back for one that was asked for")
        return old, new


def _another_notation(key: Key, asked: Sequence[Key], types: Sequence[str]) -> bool:
    """Return whether a key was asked for, but is written otherwise since: then what was asked for is gone."""
    return any(all(map(notation_only, types, key, known)) for known in asked)


def _settle(
    keys: Sequence[Key], sides: _Sides, leading: Callable[[Key], Leading], passage: Passage
) -> tuple[set[Key], set[Key]]:  # fmt: skip
    """Return (keys that passed, keys that never stood still); the others differ.

    Whatever was under way at a look has passed before the next one. So a key of which both show the same differs, unless a commit
    on it was told of that came in between.
    """
    trails = {key: Trail(leading(key).side) for key in keys}
    passed: set[Key] = set()
    for number in count():
        passage.mark()
        judged = _hear(trails, leading, sides.types)
        passed |= judged
        standing = {key for key, trail in trails.items() if trail.looks >= LOOKS}
        trails = {key: trail for key, trail in trails.items() if key not in judged | standing}
        if not trails or number == ROUNDS:
            break
        passage.through()
        old, new = sides.now(sorted(trails))
        judged = {key for key, trail in trails.items() if trail.meets(old.get(key, ()), new.get(key, ()), sides.types)}
        passed |= judged
        trails = {key: trail for key, trail in trails.items() if key not in judged}
    return passed, set(trails)


def _hear(trails: Mapping[Key, Trail], leading: Callable[[Key], Leading], types: Sequence[str]) -> set[Key]:
    """Take what the streams told of keys; return those whose other side held at the last look what a commit has left since."""
    passed = set()
    led: dict[int, tuple[Leading, list[Key]]] = {}
    for key in sorted(trails):
        lead = leading(key)
        led.setdefault(lead.side, (lead, []))[1].append(key)
    for lead, keys in led.values():
        for change in lead.history(keys):
            if change is None:
                for key in keys:
                    trails[key].hears(None, types)
            elif change[0] in keys and trails[change[0]].hears(change[1], types):
                passed.add(change[0])
    return passed


def images(frame: DataFrame, names: Sequence[str], key: Sequence[str]) -> dict[Key, Image]:
    """Return each key's rows as exact texts of the named columns, in their order."""
    held: dict[Key, Image] = {}
    for row in sorted(texts(frame, names, key).collect(), key=repr):
        held[tuple(row["key"])] = (*held.get(tuple(row["key"]), ()), tuple(row["row"]))
    return held


def only(rows: DataFrame, names: Sequence[str], keys: Sequence[Key]) -> DataFrame:
    """Return the rows of some target keys (driver).

    Args:
        rows: The rows.
        names: The key's columns.
        keys: The keys, their values as texts.

    Returns:
        A frame of the same columns.
    """
    from pyspark.sql import functions as F

    types = dict(rows.dtypes)
    own = [nth(number) for number in range(len(names))]
    asked = [f"{name}_asked" for name in own]
    keys_asked = rows.sparkSession.createDataFrame([tuple(key) for key in keys], ", ".join(f"{name} string" for name in asked))
    same = [
        text(F.col(own_column), types[name]) == F.col(asked_for)
        for own_column, name, asked_for in zip(own, names, asked, strict=True)
    ]
    return placed(rows, names).join(keys_asked, same, "left_semi").toDF(*rows.columns)


def texts(frame: DataFrame, names: Sequence[str], key: Sequence[str], *more: str) -> DataFrame:
    """Return each row's key and named columns as exact texts, and more columns as they are (driver)."""
    from pyspark.sql import functions as F

    types, columns = dict(frame.dtypes), frame.columns
    keys, values = ([text(F.col(nth(columns.index(name))), types[name]) for name in chosen] for chosen in (key, names))
    if CUT in types:
        plain, cut = [name for name in columns if not reserved(name)], nth(columns.index(CUT))
        cuts = frame.select(f"{CUT}.*").columns
        values = [
            F.coalesce(F.col(f"{cut}.{position}"), value) if (position := nth(plain.index(name))) in cuts else value
            for name, value in zip(names, values, strict=True)
        ]
    own = [F.col(nth(columns.index(name))).alias(name) for name in more]
    return placed(frame, columns).select(F.array(*keys).alias("key"), F.array(*values).alias("row"), *own)


def alike(left: Image, right: Image, types: Sequence[str]) -> bool:
    """Return whether two images are the same but for notation; a key that is there twice is like nothing."""
    if len(left) != len(right) or len(left) > 1:
        return False
    return all(
        notation_only(kind, one, other)
        for rows in zip(left, right, strict=True)
        for kind, one, other in zip(types, *rows, strict=True)
    )


def _rows(differences: Path, run: str) -> list[dict[str, Any]]:
    return DeltaTable(str(differences)).to_pyarrow_table(filters=[("run", "=", run)]).to_pylist()  # type: ignore[no-any-return]


def _key(row: dict[str, Any], names: Sequence[str]) -> Key:
    values = dict(row["key"])
    return tuple(str(values[name]) for name in names)


def _replace_rows(differences: Path, run: str, rows: list[dict[str, Any]]) -> None:
    """Keep of this run only the keys that still differ, so that the table says what the verdict says."""
    table = DeltaTable(str(differences))
    schema = pa.schema(table.schema().to_arrow())
    table.delete("run = '{}'".format(run.replace("'", "''")))
    if rows:
        write_deltalake(table, pa.Table.from_pylist(rows, schema=schema), mode="append")


def _without(diff: TableDiff, rows: list[dict[str, Any]], passed: set[Key]) -> TableDiff:
    """Return the diff as it is without the keys that passed, of the rows that were found."""
    gone = [row for row in rows if _key(row, diff.key) in passed]
    classes = Counter(row["class"] for row in {_key(row, diff.key): row for row in gone}.values())
    columns = Counter(name for row in gone if row["class"] == MISMATCHED for name in row["columns"] or ())
    left = {name: count - columns[name] for name, count in diff.columns.items() if count > columns[name]}
    nothing = diff.difference_rows == len(gone)

    def stays(difference: Difference) -> bool:
        return tuple(str(difference.key[name]) for name in diff.key) not in passed

    def settled(ranges: tuple[RangeCount, ...]) -> tuple[RangeCount, ...]:
        return tuple(replace(each, different=0) for each in ranges) if nothing else ranges

    return replace(
        diff, counts={kind: count - classes[kind] for kind, count in diff.counts.items()}, columns=left,
        equal_rows=diff.equal_rows + len(passed), sample=tuple(filter(stays, diff.sample)),
        difference_rows=diff.difference_rows - len(gone),
        kept=diff.kept - len(gone), source_ranges=settled(diff.source_ranges), target_ranges=settled(diff.target_ranges),
    )  # fmt: skip
