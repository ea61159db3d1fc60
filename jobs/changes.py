"""Changes: spooled events made ready for the transform, one key each and with whole rows.

An update that gave its row another key is two changes, the old key's delete and a put of the new one. A large value that an update
left unchanged, and PostgreSQL therefore out of the stream, is neither NULL nor the target's, it is the source row's. It is read by
key in one snapshot in which every transaction of the batch is visible: a commit stands in the log before other sessions see it, so
a row might else be older than its event. The row may be newer; whatever made it so is later in the stream and is offered then. A
row that is gone by now is deleted later in the stream, so its put is left out. Only the columns that were not sent are taken, in
the text in which the stream would have sent them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from changeover.errors import CouldNotFinish
from changeover.jobs.transform import Transform
from changeover.session import application_name
from changeover.spec import Spec
from changeover.stores.postgres import exporting
from changeover.stores.reader import ExportedSnapshot, ReadTable, read_texts

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

VISIBLE_SECONDS = 30.0
"""How long a commit may stay invisible, as it does while it waits for a synchronous standby."""

XIDS = 2**32


def keys_apart(events: DataFrame) -> DataFrame:
    """Return the events with each update that gave its row another key as two: the old one's delete, and right after it a put."""
    from pyspark.sql import functions as F

    moved = (F.col("op") == F.lit("U")) & F.col("key").isNotNull()
    itself = F.struct("op", "ordinal", "missing")
    gone = F.struct(F.lit("D").alias("op"), "ordinal", F.array().cast("array<string>").alias("missing"))
    put = F.struct("op", (F.col("ordinal") + 1).alias("ordinal"), "missing")
    each = events.withColumn("_each", F.explode(F.when(moved, F.array(gone, put)).otherwise(F.array(itself))))
    return each.withColumns({name: F.col(f"_each.{name}") for name in ("op", "ordinal", "missing")}).drop("_each")


@contextmanager
def completed(
    spec: Spec, spark: SparkSession, transform: Transform, events: DataFrame, partial: pa.Table, snapshot: ExportedSnapshot | None,
    dsn: str,
) -> Iterator[DataFrame]:  # fmt: skip
    """Yield the events with whole rows; `partial` are row, missing and xid of those that are not (driver, read in tasks).

    The store at `dsn` is read, in `snapshot` where one is given, which must hold all of the updates.
    """
    from pyspark.sql import functions as F

    application = application_name(spec.name, "replay")
    identity = [c.name for c in transform.identity]
    names = sorted({name for missing in partial["missing"].to_pylist() for name in missing} & {c.name for c in transform.source})
    keys = sorted({tuple(dict(row)[name] for name in identity) for row in partial["row"].to_pylist()})
    read = ReadTable(*transform.table.source_name, tuple(c for c in transform.source if c.name in names), transform.identity)
    with ExitStack() as held:
        seen = snapshot or held.enter_context(_seeing(dsn, application, pc.unique(partial["xid"]).to_pylist()))
        present = read_texts(spark, dsn, application, read, keys, seen)
        same = [F.col("row")[name] == present[f"_text{place}"] for place, name in enumerate(identity)]
        texts = F.create_map(*(part for name in names for part in (F.lit(name), present[name])))
        unsent = F.map_filter(texts, lambda name, _: F.array_contains("missing", name))
        whole = F.size("missing") == 0
        joined = events.join(present, [~whole, *same], "left").where(whole | present["_text0"].isNotNull())
        yield joined.withColumn("row", F.when(whole, F.col("row")).otherwise(F.map_concat("row", unsent))).select(*events.columns)


@contextmanager
def _seeing(dsn: str, application: str, xids: Collection[int]) -> Iterator[ExportedSnapshot]:
    """Hold an exported snapshot in which all of the transactions are visible."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with exporting(dsn, application) as (_, snapshot):
            hidden = [xid for xid in xids if not visible(xid, snapshot.visible)]
            if not hidden:
                yield snapshot
                return
        if time.monotonic() > deadline:
            raise CouldNotFinish(
                f"replay: transaction {hidden[0]} is in the stream, but after {VISIBLE_SECONDS:g} s it is not visible yet:"
                " does its commit wait for a synchronous standby?"
            )
        time.sleep(0.05)


def visible(xid: int, snapshot: str) -> bool:
    """Return whether a snapshot, as `pg_current_snapshot()` prints it, shows a committed transaction, whose xid has 32 bits (pure).

    Such an id belongs to the 2^31 transactions before or after the snapshot's (PostgreSQL, Routine Vacuuming, Preventing
    Transaction ID Wraparound Failures).
    """
    _, following, running = snapshot.split(":")
    first_unseen = int(following)
    whole = first_unseen - first_unseen % XIDS + xid
    if whole >= first_unseen + XIDS // 2:
        whole -= XIDS
    elif whole < first_unseen - XIDS // 2:
        whole += XIDS
    return whole < first_unseen and str(whole) not in running.split(",")
