"""The result of a task: the one row in which a Spark task of any store says what it did.

An error of ours is yielded as data, because Spark would wrap what a task raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from changeover.errors import CouldNotFinish
from changeover.stores.base.interface import Counts

if TYPE_CHECKING:
    import pyarrow as pa


OUTCOME = "offered bigint, taken bigint, failure binary"
"""What a task yields: what it did, or the error that ended it."""


def partition() -> int:
    """Return the number of the partition that this task works on (task).

    Returns:
        The number, from 0.

    Raises:
        CouldNotFinish: No Spark task is running here.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is None:
        raise CouldNotFinish("a task of a load ran outside of Spark")
    return context.partitionId()


def outcome(counts: Counts | None, failure: bytes | None = None) -> pa.RecordBatch:
    """Return a task's one row (task).

    Args:
        counts: What the task did, None where it failed.
        failure: Its error, as `failure_of` packs it.

    Returns:
        A batch of one row, which the driver reads.
    """
    import pyarrow as pa

    offered, taken = (counts.offered, counts.taken) if counts else (None, None)
    return pa.RecordBatch.from_arrays(
        [pa.array([offered], pa.int64()), pa.array([taken], pa.int64()), pa.array([failure], pa.binary())],
        names=["offered", "taken", "failure"],
    )
