"""Histories of keys: what a store's commits left of some, as its stream tells it, in images of the target.

A key that is written all the time never stands still at a look, however fast the looks are; the stream has every image that it had.
Runs on the driver, and in tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from changeover.errors import RowRefused, TextRefused
from changeover.jobs.apply.applier import CHANGES, PART_BYTES, identity_of
from changeover.jobs.apply.batch import MISSING, XID, last_of_each_key
from changeover.jobs.spool.events import kept
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform.transform import AT_LSN, Transform
from changeover.spark.failures import from_spark
from changeover.stores.base.interface import DELETED, LSN
from changeover.verifiers.compare.recheck import Image, Key, KeyChange, only, texts

if TYPE_CHECKING:
    from pyspark.sql import Row, SparkSession

PART_EVENTS = 50_000
"""Events whose images are in memory at once."""

WRITTEN_ALIKE = re.compile(r"smallint|integer|bigint|uuid|text|character varying(\(\d+\))?")
"""Types of a key that the stream and an image write alike, so that other keys' changes need not be looked at."""


class History:
    """A table's stream from a position on, read in the order of its commits.

    Of some commits it tells that they wrote a key, and not what they left of it. That is so where
    several source keys may make one target key, where a cast to the target's types may change a
    value, and behind a function of the spec's; and of a change that came without one of its large
    values. It passes over a TRUNCATE, a part with a row that can't be carried over, and a
    transaction that is too large: any key may have been written by then.
    """

    def __init__(self, spark: SparkSession, transform: Transform, spool: Spool, since: int) -> None:
        self.spark = spark
        self.transform = transform
        self.spool = spool
        self.until = since

    def changes(self, keys: Sequence[Key]) -> Iterator[KeyChange]:
        """Yield what came since the last call, of some target keys; what a replay brings that begins afterwards comes whole.

        Args:
            keys: The target keys, their values as texts.

        Yields:
            A key and its row, which a delete has none of; None for a row, or for both, where it
            can't tell.

        Raises:
            FolderFailed: The spool can't be read.
        """
        transform = self.transform
        start, self.until = self.until, max(self.until, self.spool.end())
        while start < self.until:
            stop = self.spool.reach(start, self.until, PART_EVENTS, PART_BYTES)  # which splits no transaction
            parts = self.spool.parts(start, stop, transform.table.source_relation, 4 * PART_EVENTS, PART_BYTES)
            events = list(islice(parts, 2))
            start = stop
            changed = [kept(part, pc.is_in(part["op"], pa.array(CHANGES))) for part in events]
            if len(events) == 1:
                yield from self._images(changed[0], keys)
            if len(events) > 1 or sum(map(len, changed)) < sum(map(len, events)):
                yield None

    def _images(self, events: pa.Table, keys: Sequence[Key]) -> Iterator[KeyChange]:
        transform = self.transform
        identity, columns = identity_of(transform), [column.name for column in transform.source]
        commits = last_of_each_key(events, identity, columns, commits=True).drop_columns([XID])
        moved = transform.source_key(identity)
        places = [transform.target.key.index(name) for name in moved] if moved is not None else None
        if any(WRITTEN_ALIKE.fullmatch(column.type) is None for column in transform.identity):
            places = None
        if places is not None:
            commits = _of_keys(commits, identity, places, keys)
        partial = pc.greater(pc.list_value_length(commits[MISSING]), 0)
        told: list[tuple[int, Key, Image | None]] = []
        told += _written(commits.filter(partial), identity, places, keys) if places is not None else []
        whole = commits.filter(pc.invert(partial)).drop_columns([MISSING])
        try:
            told += self._rows(whole, keys) if len(whole) else []
        except (RowRefused, TextRefused):  # replay does not offer it either, where a later change of its key is there
            yield None
            return
        yield from ((key, image) for _, key, image in sorted(told, key=lambda one: one[0]))
        if places is None and len(whole) < len(commits):
            yield None

    def _rows(self, commits: pa.Table, keys: Sequence[Key]) -> list[tuple[int, Key, Image | None]]:
        """Return the LSN, the target key, and what is left of it, of changes with all of their values."""
        transform = self.transform
        with from_spark(transform.table.source, "changes of keys that are judged again"):
            frame = only(transform.changes(self.spark.createDataFrame(commits), 0, every=True), transform.target.key, keys)
            rows = texts(frame, sorted(transform.target.names), transform.target.key, LSN, DELETED).collect()
        unsaid = transform.target.owned or bool(transform.casts) or transform.table.function is not None

        def image(row: Row) -> Image | None:
            return None if unsaid else () if row[DELETED] else (tuple(row["row"]),)

        return [(int(row[LSN]), tuple(row["key"]), image(row)) for row in rows]


def _written(commits: pa.Table, identity: Sequence[str], places: Sequence[int], keys: Sequence[Key]) -> list[tuple[int, Key, None]]:
    """Return the LSN and the target key of changes that came without a value, so that nobody can say what they left."""
    asked: dict[tuple[str, ...], list[Key]] = {}
    for key in keys:
        asked.setdefault(tuple(key[position] for position in places), []).append(key)
    rows = zip(commits[AT_LSN].to_pylist(), zip(*(commits[name].to_pylist() for name in identity), strict=True), strict=True)
    return [(lsn, key, None) for lsn, own in rows for key in asked.get(own, [])]


def _of_keys(commits: pa.Table, identity: Sequence[str], places: Sequence[int], keys: Sequence[Key]) -> pa.Table:
    """Return the changes of some target keys, which have the source key's columns unchanged at these places."""
    asked = {tuple(key[position] for position in places) for key in keys}
    own = zip(*(commits[name].to_pylist() for name in identity), strict=True)
    return commits.filter(pa.array([commit_key in asked for commit_key in own], pa.bool_()))
