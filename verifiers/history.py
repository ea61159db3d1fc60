"""History: what the old store's stream told of some keys since a comparison, as images of the target (driver, and in tasks).

A key that is written all the time never stands still at a look, however fast the looks are; the stream has every image that it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from changeover.jobs.carrier import BATCH_EVENTS, CHANGES, PART_BYTES, identity_of
from changeover.jobs.changes import MISSING, XID, last_of_each_key
from changeover.jobs.spool import Spool
from changeover.jobs.transform import Transform
from changeover.verifiers.recheck import Key, only

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


class History:
    """A table's stream from a position on, told piece by piece.

    It tells nothing of a table where several source keys can make one target key, or where a cast to the target's types may
    change a value, nor of a change that came without one of its large values: there are the looks alone.
    """

    def __init__(self, spark: SparkSession, transform: Transform, spool: Spool, since: int) -> None:
        self.spark = spark
        self.transform = transform
        self.spool = spool
        self.until = since

    def since(self, keys: Sequence[Key]) -> Iterator[DataFrame]:
        """Yield the changes of some target keys that came since the last call."""
        if self.transform.target.owned or self.transform.casts:
            return
        since, self.until = self.until, max(self.until, self.spool.end())
        relation = self.transform.table.source_relation
        for events in self.spool.parts(since, self.until, relation, BATCH_EVENTS, PART_BYTES):
            whole = pc.and_(pc.is_in(events["op"], pa.array(CHANGES)), pc.equal(pc.list_value_length(events["missing"]), 0))
            changed = events.filter(whole)
            if len(changed):
                yield only(self.transform.changes(self._rows(changed), 0, every=True), self.transform.target.key, keys)

    def _rows(self, events: pa.Table) -> DataFrame:
        columns = [column.name for column in self.transform.source]
        every = last_of_each_key(events, identity_of(self.transform), columns, every=True)
        return self.spark.createDataFrame(every.drop_columns([XID, MISSING]))
