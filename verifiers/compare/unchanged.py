"""The rows that no write has touched since authority moved: what a target that stayed at the fence can be held against.

The old store's gate keeps a cell for every mirrored write of a new epoch, in the same snapshot as the rows; those keys are left
out on both sides. The sides' ranges stay as they were read, so coverage is still proved of what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from psycopg import sql

from changeover.names import nth, placed
from changeover.position import DUAL_WRITE_ORDINAL
from changeover.stores.base.interface import EPOCH, ORDINAL, Frozen
from changeover.stores.base.pgtypes import decode
from changeover.stores.postgres.gate import GatedTable

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from changeover.jobs.transform.transform import Transform


def rows(
    spark: SparkSession, transform: Transform, old: Frozen, frames: tuple[DataFrame, DataFrame], *, aligned: bool
) -> tuple[DataFrame, DataFrame]:
    """Return both frames without the keys that the old store's gate has seen since authority moved (driver).

    Where both sides are `aligned` at one position of the new store's stream, only those are left
    out which a mirrored write has brought there ahead of it. What the stream has brought bears its
    event's position, which is no direct write's.

    Args:
        spark: The Spark session.
        transform: The table's transform.
        old: The old store, frozen.
        frames: The source's and the target's frame.
        aligned: Whether both sides are at one position of the new store's stream.

    Returns:
        Both frames, without those keys.
    """
    gated = GatedTable(*transform.table.source_name, tuple(c.name for c in transform.identity), ())
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in gated.key)
    ahead = sql.SQL(" AND {} = {}").format(sql.Identifier(ORDINAL), sql.Literal(DUAL_WRITE_ORDINAL)) if aligned else sql.SQL("")
    statement = sql.SQL("SELECT {} FROM {} WHERE {} > 0{}").format(texts, gated.row_versions, sql.Identifier(EPOCH), ahead)
    names = [nth(number) for number in range(len(gated.key))]
    row_versions = spark.createDataFrame(old.query(statement.as_string(None)), ", ".join(f"{name} string" for name in names))
    decoded = row_versions.select(
        *(decode(row_versions[name], c.type, native=False).alias(c.name) for name, c in zip(names, transform.identity, strict=True))
    )
    keys = placed(transform.keys(decoded).distinct(), transform.target.key)
    left, right = (_without(frame, keys, transform.target.key) for frame in frames)
    return left, right


def _without(frame: DataFrame, keys: DataFrame, names: Sequence[str]) -> DataFrame:
    """Return the rows whose key, the columns of these names, is not among the keys, which stand by their positions."""
    rows = placed(frame, names)
    same = [rows[nth(number)] == keys[nth(number)] for number in range(len(names))]
    return rows.join(keys, same, "left_anti").toDF(*frame.columns)
