"""Histories of keys: what commits of the old store left of some, as its stream tells it, in images of the target.

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
from changeover.jobs.transform.transform import Transform
from changeover.spark.failures import from_spark
from changeover.stores.base.interface import DELETED, LSN
from changeover.verifiers.compare.recheck import Image, Key, only, texts

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PART_EVENTS = 50_000
"""Events whose images are in memory at once."""

WRITTEN_ALIKE = re.compile(r"smallint|integer|bigint|uuid|text|character varying(\(\d+\))?")
"""Types of a key that the stream and an image write alike, so that other keys' changes need not be looked at."""

KeyChange = tuple[Key, Image] | None
"""A key, and what a commit left of it; None where something was passed over, after which nobody knows what a key was last."""


class History:
    """A table's stream from a position on, read in the order of its commits.

    It tells nothing of a table where several source keys may make one target key, or where a cast
    to the target's types may change a value. It passes over a change that came without one of its
    large values, a part with a row that can't be carried over, and a transaction that is too large.
    Of those the looks alone judge.
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
            A key and its row, which a delete has none of; None for changes that it can't tell.

        Raises:
            FolderFailed: The spool can't be read.
        """
        transform = self.transform
        if transform.target.owned or transform.casts or transform.table.function is not None:
            return
        start, self.until = self.until, max(self.until, self.spool.end())
        while start < self.until:
            stop = self.spool.reach(start, self.until, PART_EVENTS, PART_BYTES)  # which splits no transaction
            parts = self.spool.parts(start, stop, transform.table.source_relation, 4 * PART_EVENTS, PART_BYTES)
            events = list(islice(parts, 2))
            start = stop
            whole = [kept(part, _whole(part)) for part in events]
            if len(events) == 1:
                yield from self._images(whole[0], keys)
            if len(events) > 1 or sum(map(len, whole)) < sum(map(len, events)):
                yield None

    def _images(self, events: pa.Table, keys: Sequence[Key]) -> Iterator[KeyChange]:
        transform = self.transform
        identity, columns = identity_of(transform), [column.name for column in transform.source]
        commits = last_of_each_key(events, identity, columns, commits=True).drop_columns([XID, MISSING])
        moved = transform.source_key(identity)
        if moved is not None and all(WRITTEN_ALIKE.fullmatch(column.type) for column in transform.identity):
            commits = _of_keys(commits, identity, [transform.target.key.index(name) for name in moved], keys)
        if not len(commits):
            return
        try:
            with from_spark(transform.table.source, "changes of keys that are judged again"):
                frame = only(transform.changes(self.spark.createDataFrame(commits), 0, every=True), transform.target.key, keys)
                rows = texts(frame, sorted(transform.target.names), transform.target.key, LSN, DELETED).collect()
        except (RowRefused, TextRefused):  # replay does not offer it either, where a later change of its key is there
            yield None
            return
        for row in sorted(rows, key=lambda row: int(row[LSN])):
            yield tuple(row["key"]), () if row[DELETED] else (tuple(row["row"]),)


def _whole(events: pa.Table) -> pa.ChunkedArray:
    """Return which events are changes of a row with all of its values; the others are a TRUNCATE, or notes."""
    return pc.and_(pc.is_in(events["op"], pa.array(CHANGES)), pc.equal(pc.list_value_length(events["missing"]), 0))


def _of_keys(commits: pa.Table, identity: Sequence[str], places: Sequence[int], keys: Sequence[Key]) -> pa.Table:
    """Return the changes of some target keys, which have the source key's columns unchanged at these places."""
    asked = {tuple(key[position] for position in places) for key in keys}
    own = zip(*(commits[name].to_pylist() for name in identity), strict=True)
    return commits.filter(pa.array([commit_key in asked for commit_key in own], pa.bool_()))
